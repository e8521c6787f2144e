"""Prepares your own text or conversations: writes the shards that train.py reads.

    python prepare_dataset.py --input_file_path=data/train.txt --output_dir=data/mine
    python prepare_dataset.py --hf_dataset=Nikity/Kyoto-Corpus --output_dir=data/kyoto

Reads, by extension:
  .txt      UTF-8 texts separated by <|endoftext|>; blanks around a text are dropped
  .jsonl    one JSON object a line: {"text": "..."}, {"question": "...", "answer": "..."} or
            {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]}
  .parquet  rows with these columns, others are not read; also a folder or "a/pattern*.parquet"
or a dataset of the Hugging Face Hub with these columns (or a folder in the same form).
Everything is encoded as ordinary text, including a control token that is spelled in it. Only
`trust_control_tokens` changes that, for a .txt in the chat layout, where every example is
<|startoftext|><|user|>...<|assistant|>...<|endoftext|>, the part from <|user|> on for each turn.

Writes train.npz, val.npz and manifest.json. The old ones are replaced only when the new ones are
complete, and the same settings give the same bytes. Memory use is constant, except that one example
has to fit.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError, printable
from common.files import check_free_space, locked
from common.manifest import make_manifest, publish
from common.settings import config_from_constants, run_script, settings_of
from dataset import ShardWriter
from preparation.example_readers import Input, open_input
from preparation.output_folder import STAGING_FOLDERS, refuse_other_dataset
from tokenizer import load_tokenizer

# input and output
input_file_path = "data/train.txt"  # .txt, .jsonl or .parquet, see above
output_dir = "data"  # where train.npz, val.npz and manifest.json go
tokenizer = "hastings/hastings.json"  # your own: a folder with a tokenizer.json
trust_control_tokens = False  # True: the .txt is in the chat layout, with real control tokens

# a dataset of the Hugging Face Hub in place of input_file_path
hf_dataset = ""  # such as "Nikity/Kyoto-Corpus", or a folder
hf_config = ""  # one of its configurations; "": the default one
hf_split = "train"  # its split that is prepared
hf_revision = ""  # a commit, tag or branch; "": the newest

# split
val_split = 0.01  # fraction of the examples kept for validation
val_file_path = ""  # validation examples, any file as above; val_split is then not used
seed = 1337  # seed of the shuffle, which also draws the validation examples

SCRIPT = "prepare_dataset.py"
BATCH_CHARACTERS, BATCH_EXAMPLES = 4 << 20, 8192  # encoded at a time, at most


def is_blank(kind: str, content: Any) -> bool:
    """Whether an example has no text, or is a conversation with a blank turn."""
    if kind == "chat":
        return not all(turn["content"].strip() for turn in content)
    return kind == "empty" or not content.strip()


def encode_input(source: Input, tokenizer: Any, writer: ShardWriter) -> dict[str, Any]:
    """Encodes every example of an input into `writer`, in order.

    Returns {"sources", "kind", "dropped", "text_bytes"} for the manifest. Raises UserError for a
    mistake in the input and when it has no example.
    """
    dropped, text_bytes, kind, batch, size = Counter(), 0, None, [], 0

    with tqdm(
        total=source.size,
        desc=printable(source.name),
        unit=source.unit,
        unit_scale=True,
        disable=None,
    ) as bar:

        def encode_batch() -> int:
            if kind == "text":
                ids, ends = tokenizer.encode_documents(batch)
            else:
                conversations = tokenizer.encode_chat_batch(batch)
                ids = np.concatenate(conversations)
                ends = np.cumsum([len(chat) for chat in conversations])
            writer.add_flat(ids, ends)
            bar.set_postfix_str(f"{writer.tokens / 1e6:,.1f}M tokens", refresh=False)
            batch.clear()
            return int(tokenizer.token_bytes[ids].sum())

        for example_kind, content, position in source.examples(bar.update):
            if is_blank(example_kind, content):
                dropped["empty"] += 1
                continue
            if kind not in (None, example_kind):
                raise UserError(
                    f"{position}: a {example_kind} example after {kind} examples: put the two "
                    "kinds into files of their own"
                )
            kind = example_kind
            batch.append(content)
            size += len(content) if kind == "text" else sum(len(t["content"]) for t in content)
            if size >= BATCH_CHARACTERS or len(batch) >= BATCH_EXAMPLES:
                text_bytes, size = text_bytes + encode_batch(), 0
        if batch:
            text_bytes += encode_batch()
    if kind is None:
        raise UserError(f"{source} holds no examples: nothing but blanks, add some text")
    return {
        "sources": source.sources(),
        "kind": kind,
        "dropped": dropped,
        "text_bytes": text_bytes,
    }


def split(order: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits `order` into (training, validation); UserError if one of them would be empty."""
    n_val = round(len(order) * fraction)
    if not 0 < n_val < len(order):
        example = f", such as {max(0.05, 1.5 / len(order)):.2f}," if len(order) > 2 else ""
        raise UserError(
            f"val_split={fraction} of {len(order)} examples leaves {n_val} for validation and "
            f"{len(order) - n_val} for training: choose another val_split{example} or give "
            "val_file_path"
        )
    return order[n_val:], order[:n_val]


@contextmanager
def locked_output(output: Path) -> Iterator[None]:
    """Makes `output` and locks it for this run; UserError if it is not ours to write to."""
    new_folders = [folder for folder in (output, *output.parents) if not os.path.exists(folder)]
    with ExitStack() as stack:
        stack.callback(remove_empty, new_folders)
        with write_errors(output):
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(output, "preparation"))
        refuse_other_dataset(output, SCRIPT)
        yield


@contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """A temporary directory in the locked `output`."""
    staging = output / STAGING_FOLDERS[SCRIPT]
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
        with write_errors(output):
            staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def write_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {output} ({reason}): set --output_dir=...") from None


def remove_empty(folders: list[Path]) -> None:
    """Removes those of the folders, innermost first, that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def check_settings(config: Any) -> None:
    if not config.val_file_path and not 0 < config.val_split < 1:
        raise UserError(f"val_split={config.val_split} is not between 0 and 1: try 0.01")
    if config.seed < 0:
        raise UserError(f"seed={config.seed} is negative: choose 0 or more")
    defaults = settings_of(globals())
    overrides = {name for name in defaults if getattr(config, name) != defaults[name]}
    if config.hf_dataset and "input_file_path" in overrides:
        raise UserError(
            f"both hf_dataset={config.hf_dataset} and input_file_path={config.input_file_path} are "
            "given: choose one of them"
        )
    if config.hf_dataset and config.trust_control_tokens:
        raise UserError("trust_control_tokens is for .txt files only: turn it off for hf_dataset")
    hf_settings = overrides & {"hf_config", "hf_split", "hf_revision"}
    if hf_settings and not config.hf_dataset:
        raise UserError(f"{min(hf_settings)} is given without hf_dataset: name the dataset as well")


def is_same_file(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.samefile(path, other)


def open_inputs(config: Any) -> list[Input]:
    """[the input] or [the input, the input of the validation examples]."""
    trusted, val_inputs = config.trust_control_tokens, []
    if config.val_file_path:
        val_inputs = [open_input(config.val_file_path, "val_file_path", trusted)]
        if not config.hf_dataset and is_same_file(config.input_file_path, config.val_file_path):
            print("note: val_file_path is the input too, so nothing will be new in validation")
    if config.hf_dataset:
        from preparation.hub_dataset import HubDataset

        names = config.hf_dataset, config.hf_config, config.hf_split, config.hf_revision
        return [HubDataset(*names), *val_inputs]
    return [open_input(config.input_file_path, "input_file_path", trusted), *val_inputs]


def prepare(config: Any, inputs: list[Input], tokenizer: Any, staging: Path) -> dict[str, Any]:
    """Writes train.npz and val.npz into `staging`; returns the manifest."""
    files, results = {}, []
    with ShardWriter(staging) as writer:
        results.append(encode_input(inputs[0], tokenizer, writer))
        order = np.random.default_rng(config.seed).permutation(writer.documents)
        if not config.val_file_path:
            order, val_order = split(order, config.val_split)
            files["val.npz"] = writer.write(staging / "val.npz", val_order)
        files["train.npz"] = writer.write(staging / "train.npz", order)
    if config.val_file_path:
        with ShardWriter(staging) as writer:
            results.append(encode_input(inputs[1], tokenizer, writer))
            files["val.npz"] = writer.write(staging / "val.npz")
    if len({result["kind"] for result in results}) > 1:
        raise UserError(
            f"{inputs[0]} holds {results[0]['kind']} examples but {inputs[1]} "
            f"{results[1]['kind']} examples: both must be of one kind"
        )
    settings = {
        "val_split": None if config.val_file_path else config.val_split,
        "trust_control_tokens": config.trust_control_tokens,
        "seed": config.seed,
    }
    return make_manifest(
        kind=results[0]["kind"],
        tokenizer=tokenizer,
        sources=[source for result in results for source in result["sources"]],
        settings=settings,
        dropped={
            reason: {"documents": count, "tokens": 0}
            for reason, count in sum((result["dropped"] for result in results), Counter()).items()
        },
        files=files,
    ) | {"text_bytes": sum(result["text_bytes"] for result in results)}


def print_summary(manifest: dict[str, Any], output: Path, tokenizer_name: str) -> None:
    bytes_per_token = manifest["text_bytes"] / manifest["tokens"]
    print(
        f"{manifest['documents']:,} {manifest['kind']} examples, {manifest['tokens']:,} tokens, "
        f"{bytes_per_token:.2f} bytes per token"
    )
    for reason, dropped in manifest["dropped"].items():
        print(f"dropped {dropped['documents']:,} ({reason})")
    for name, entry in manifest["files"].items():
        print(f"{output / name}: {entry['documents']:,} examples, {entry['tokens']:,} tokens")
    finetune = "--finetune=True --finetune_" if manifest["kind"] == "chat" else "--"
    flag = "" if tokenizer_name == tokenizer else f" --tokenizer={tokenizer_name}"
    print(f"next: python train.py {finetune}data_dir={output}{flag}")


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    check_settings(config)
    tokenizer = load_tokenizer(config.tokenizer)
    output = Path(config.output_dir)
    with locked_output(output):
        inputs = open_inputs(config)
        # The shards have about half the bytes of the text, and are twice on the disk for a while.
        text_bytes = sum(source.bytes for source in inputs)
        what, advice = "the dataset may need up to", "make room if the disk fills up"
        check_free_space(output, text_bytes, what, advice, is_error=False)
        with staging_directory(output) as staging:
            manifest = prepare(config, inputs, tokenizer, staging)
            publish(staging, output, manifest)
    print_summary(manifest, output, config.tokenizer)
    return 0


if __name__ == "__main__":
    run_script(main)
