"""Turns your own text or conversations into the shards that train.py reads.

    python prepare_dataset.py --input_file_path=data/train.txt --output_dir=data/mine

Reads, by extension:
  .txt    UTF-8 texts separated by <|endoftext|>; blanks around a text are dropped
  .jsonl  one JSON object a line: {"text": "..."}, {"question": "...", "answer": "..."} or
          {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]}
Everything is encoded as ordinary text, so a control token spelled in it is just characters. Only
`trust_control_tokens` changes that, for a .txt in the chat layout, where every example is
<|startoftext|><|user|>...<|assistant|>...<|endoftext|>, the part from <|user|> on once a turn.

Writes train.npz, val.npz and manifest.json. The old ones stay until the new ones are complete, and
the same settings give the same bytes. Memory stays flat; one example has to fit.
"""

import hashlib
import json
import os
import reprlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import UserError, config_from_constants, run_script
from dataset import ShardWriter
from files import locked
from manifest import make_manifest, publish
from tokenizer import (
    END_OF_TEXT,
    START_OF_TEXT,
    check_messages,
    load_tokenizer,
    parse_chat,
    to_utf8,
)

# input and output
input_file_path = "data/train.txt"  # .txt or .jsonl, see above
output_dir = "data"  # where train.npz, val.npz and manifest.json go
trust_control_tokens = False  # True: the .txt is in the chat layout and its control tokens count

# split
val_split = 0.01  # fraction of the examples kept for validation
val_file_path = ""  # a file of validation examples; val_split is then not used
seed = 1337  # of the shuffle, which also draws the validation examples

CHUNK_BYTES = 1 << 20  # read at a time
BATCH_CHARACTERS = 4 << 20  # encoded at a time
BATCH_EXAMPLES = 8192

# An example: ("text", str), ("chat", messages) or ("empty", None), and where it is in the file.
Example = tuple[str, Any, str]


def split_file(
    path: Path, separator: bytes, on_bytes: Callable[[bytes], None]
) -> Iterator[tuple[int, str, bool]]:
    """The pieces of a UTF-8 file between separators: (byte offset, text, whether it is the last).

    Holds one piece and one chunk in memory. A byte order mark is skipped. Calls `on_bytes` with
    everything it reads. Raises UserError with the byte offset for bytes that are not UTF-8.
    """

    def decoded(offset: int, piece: bytes) -> str:
        try:
            return piece.decode("utf-8").removeprefix("\ufeff" if offset == 0 else "")
        except UnicodeDecodeError as error:
            where = offset + error.start
            raise UserError(f"{path}: not UTF-8 at byte {where}: save the file as UTF-8") from None

    buffer, offset, searched = bytearray(), 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            on_bytes(chunk)
            buffer += chunk
            start = 0
            while (end := buffer.find(separator, max(start, searched))) >= 0:
                yield offset + start, decoded(offset + start, buffer[start:end]), False
                start = end + len(separator)
            del buffer[:start]
            offset += start
            searched = max(0, len(buffer) - len(separator) + 1)
    yield offset, decoded(offset, buffer), True


def read_txt(path: Path, on_bytes: Callable[[bytes], None]) -> Iterator[Example]:
    """Plain texts between `<|endoftext|>`; a blank piece after the last separator is no example."""
    for offset, text, last in split_file(path, END_OF_TEXT.encode(), on_bytes):
        text = text.strip()
        if text:
            yield "text", text, f"byte {offset}"
        elif not last:
            yield "empty", None, f"byte {offset}"


def read_chat_txt(path: Path, on_bytes: Callable[[bytes], None]) -> Iterator[Example]:
    """Conversations in the chat layout, each checked; only the file's last may lack its end."""
    for number, (offset, text, last) in enumerate(
        split_file(path, START_OF_TEXT.encode(), on_bytes)
    ):
        if number > 0:
            where = f"example {number} at byte {offset - len(START_OF_TEXT)}"
            try:
                yield "chat", parse_chat(text, may_lack_end=last), where
            except ValueError as error:
                raise UserError(f"{path}, {where}: {error}: correct it") from None
        elif text.strip():
            raise UserError(
                f"{path} does not begin with {START_OF_TEXT}, as every example must with "
                "trust_control_tokens=True: correct the file, or leave that setting off"
            )


def read_jsonl(path: Path, on_bytes: Callable[[bytes], None]) -> Iterator[Example]:
    """One example a line; blank lines are skipped."""
    for number, (_, line, _) in enumerate(split_file(path, b"\n", on_bytes), 1):
        if not line.strip():
            continue
        try:
            kind, content = example_of(parse_line(line))
            texts = [content] if kind == "text" else [turn["content"] for turn in content]
            for text in texts if "\\u" in line else ():  # an escape can spell half a character
                to_utf8(text)
        except ValueError as error:
            array = line.lstrip().startswith("[")
            hint = "write one object a line, not one array" if array else "correct it"
            raise UserError(f"{path}, line {number}: {error}: {hint}") from None
        yield kind, content, f"line {number}"


def parse_line(line: str) -> Any:
    """The JSON value of a line; ValueError if there is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    except ValueError:  # Python reads integers of at most 4,300 digits
        raise ValueError("a number is too long") from None


def example_of(row: Any) -> tuple[str, Any]:
    """The kind and content of one JSON row; ValueError if it is none of the three forms."""
    forms = '{"text"}, {"messages"} or {"question", "answer"}'
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, expected an object: {forms}")
    present = [name for name in ("text", "messages", "question") if name in row]
    if len(present) != 1:
        found = " and ".join(present) or f"only {reprlib.repr(list(row))}"
        raise ValueError(f"expected exactly one of {forms}, found {found}")
    if present == ["text"]:
        if not isinstance(row["text"], str):
            raise ValueError(f'"text" is not a string but {type(row["text"]).__name__}')
        return "text", row["text"]
    if present == ["messages"]:
        check_messages(row["messages"])
        if row["messages"][-1]["role"] != "assistant":
            raise ValueError("the conversation ends with a user turn, without an answer")
        return "chat", row["messages"]
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str):
            kind = type(row[name]).__name__ if name in row else "missing"
            raise ValueError(f'"{name}" is not a string but {kind}')
    return "chat", [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def is_blank(kind: str, content: Any) -> bool:
    """Whether an example has nothing to learn from: no text, or a turn that says nothing."""
    if kind == "chat":
        return not all(turn["content"].strip() for turn in content)
    return kind == "empty" or not content.strip()


def encode_file(path: Path, trusted: bool, tokenizer: Any, writer: ShardWriter) -> dict[str, Any]:
    """Adds every example of a file to `writer`, in file order.

    Returns the file's "source" for the manifest, its "kind", what was "dropped" and the
    "text_bytes" encoded. Raises UserError for a mistake in the file and when it has no example.
    """
    digest, dropped, text_bytes, kind, batch, size = hashlib.sha256(), Counter(), 0, None, [], 0

    with tqdm(
        total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, disable=None
    ) as bar:

        def on_bytes(chunk: bytes) -> None:
            digest.update(chunk)
            bar.update(len(chunk))

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

        read = read_chat_txt if trusted else read_txt
        if path.suffix.lower() == ".jsonl":
            read = read_jsonl
        for example_kind, content, where in read(path, on_bytes):
            if is_blank(example_kind, content):
                dropped["empty"] += 1
                continue
            if kind not in (None, example_kind):
                raise UserError(
                    f"{path}, {where}: a {example_kind} example after {kind} examples: put the two "
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
        raise UserError(f"{path} holds no examples: nothing but blanks, add some text")
    source = {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return {"source": source, "kind": kind, "dropped": dropped, "text_bytes": text_bytes}


def split(order: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The parts of `order` for training and for validation; UserError if one would be empty."""
    n_val = round(len(order) * fraction)
    if not 0 < n_val < len(order):
        raise UserError(
            f"val_split={fraction} of {len(order)} examples leaves {n_val} for validation and "
            f"{len(order) - n_val} for training: choose another val_split, or give val_file_path"
        )
    return order[n_val:], order[:n_val]


def check_input(path: Path, name: str, trusted: bool) -> None:
    """UserError unless `path` is a file that this script reads."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: give {name} one .txt or .jsonl file")
    if not path.exists():
        raise UserError(f"{path} does not exist: put your text there, or set --{name}=...")
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise UserError(f"{path}: only .txt and .jsonl are read: convert it or rename it")
    if trusted and path.suffix.lower() != ".txt":
        raise UserError(f"trust_control_tokens is for .txt files only: turn it off for {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(64).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not start:
        raise UserError(f"{path} is empty: put your text there")
    if not trusted and start.lstrip().startswith(START_OF_TEXT.encode()):
        print(
            f"note: {path} looks like the chat layout but is encoded as ordinary text; "
            "add --trust_control_tokens=True if you trust the file"
        )


@contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """An empty directory in `output` for the time of one run; UserError if it cannot be made."""
    staging = output / ".preparing"
    new = [folder for folder in (output, *output.parents) if not os.path.exists(folder)]
    with ExitStack() as stack:
        stack.callback(remove_empty, new)
        try:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(output, "prepare_dataset.py"))
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
            staging.mkdir()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write to {output} ({reason}): set --output_dir=...") from None
        yield staging


def remove_empty(folders: list[Path]) -> None:
    """Removes those of the folders, the innermost first, that are there and hold nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def note_little_room(output: Path, inputs: Iterable[Path]) -> None:
    """Says so if the disk may fill up: 2 bytes a token of about 4 bytes, twice until the end."""
    free, needed = shutil.disk_usage(output).free, sum(path.stat().st_size for path in inputs)
    if free < needed:
        print(
            f"note: {output} has {free / 1e6:,.0f} MB free, up to {needed / 1e6:,.0f} MB may be "
            "needed"
        )


def prepare(config: Any, tokenizer: Any, staging: Path) -> dict[str, Any]:
    """Writes both shards into `staging` and returns the manifest."""
    files, results = {}, []
    trusted = config.trust_control_tokens
    with ShardWriter(staging) as writer:
        results.append(encode_file(Path(config.input_file_path), trusted, tokenizer, writer))
        order = np.random.default_rng(config.seed).permutation(writer.documents)
        if not config.val_file_path:
            order, val_order = split(order, config.val_split)
            files["val.npz"] = writer.write(staging / "val.npz", val_order)
        files["train.npz"] = writer.write(staging / "train.npz", order)
    if config.val_file_path:
        with ShardWriter(staging) as writer:
            results.append(encode_file(Path(config.val_file_path), trusted, tokenizer, writer))
            files["val.npz"] = writer.write(staging / "val.npz")
    if len({result["kind"] for result in results}) > 1:
        raise UserError(
            f"{config.input_file_path} holds {results[0]['kind']} examples but "
            f"{config.val_file_path} {results[1]['kind']} examples: both must be of one kind"
        )
    settings = {
        "val_split": None if config.val_file_path else config.val_split,
        "trust_control_tokens": trusted,
        "seed": config.seed,
    }
    return make_manifest(
        kind=results[0]["kind"],
        tokenizer=tokenizer,
        sources=[result["source"] for result in results],
        settings=settings,
        dropped={
            reason: {"documents": count, "tokens": 0}
            for reason, count in sum((result["dropped"] for result in results), Counter()).items()
        },
        files=files,
    ) | {"text_bytes": sum(result["text_bytes"] for result in results)}


def print_summary(manifest: dict[str, Any], output: Path) -> None:
    per_token = manifest["text_bytes"] / manifest["tokens"]
    print(
        f"{manifest['documents']:,} {manifest['kind']} examples, {manifest['tokens']:,} tokens, "
        f"{per_token:.2f} bytes per token"
    )
    for reason, dropped in manifest["dropped"].items():
        print(f"dropped {dropped['documents']:,} ({reason})")
    for name, entry in manifest["files"].items():
        print(f"{output / name}: {entry['documents']:,} examples, {entry['tokens']:,} tokens")
    finetune = "--finetune=True --finetune_" if manifest["kind"] == "chat" else "--"
    print(f"next: python train.py {finetune}data_dir={output}")


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    if not config.val_file_path and not 0 < config.val_split < 1:
        raise UserError(f"val_split={config.val_split} is not between 0 and 1: try 0.01")
    if config.seed < 0:
        raise UserError(f"seed={config.seed} is negative: choose 0 or more")
    inputs = {"input_file_path": Path(config.input_file_path)}
    if config.val_file_path:
        inputs["val_file_path"] = Path(config.val_file_path)
    for name, path in inputs.items():
        check_input(path, name, config.trust_control_tokens)

    tokenizer = load_tokenizer()
    output = Path(config.output_dir)
    with staging_directory(output) as staging:
        note_little_room(output, inputs.values())
        manifest = prepare(config, tokenizer, staging)
        publish(staging, output, manifest)
    print_summary(manifest, output)
    return 0


if __name__ == "__main__":
    run_script(main)
