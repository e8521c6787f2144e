"""Prepares FineWeb-Edu, or any Parquet files of web text: writes the shards that train.py reads.

    python prepare_dataset_fineweb.py                               # sample-10BT, from the hub
    python prepare_dataset_fineweb.py --source="my/folder/*.parquet" --output_dir=data/mine
    torchrun --nproc_per_node=4 prepare_dataset_fineweb.py          # or --rank=0 --world_size=4

After an interruption of any kind the same command resumes with the next input file, and the shards
have the same bytes as those of an uninterrupted run. Each input file is prepared as a separate
part, so several processes, or machines that share `output_dir`, need no communication; the last one
to finish writes manifest.json. Until then everything is in `output_dir`/.preparing.

A hash of a document's `id` decides whether it is for validation, and the order of the documents of
a file. Every document is encoded as ordinary text and ends with <|endoftext|>.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.files import file_sha256, locked
from common.manifest import read_manifest
from common.prefetch import Prefetcher
from common.settings import config_from_constants, run_script
from dataset import ShardWriter
from preparation import hub_download
from preparation.filters import Documents
from preparation.input_files import (
    InputFile,
    check_disk,
    files_identity,
    input_files,
    is_local,
    refuse_if_changed,
)
from preparation.local_files import LocalFile, local_files
from preparation.output_folder import refuse_other_dataset
from preparation.resumable_parts import (
    DOWNLOAD,
    SCRIPT,
    STAGING,
    Part,
    check_sizes,
    claim,
    finish,
    part_folder,
    read_record,
    read_records,
    refuse_if_different,
)
from tokenizer import load_tokenizer

# where the text comes from
source = "HuggingFaceFW/fineweb-edu"  # a dataset of the hub, or local files: "my/folder/*.parquet"
config_name = (
    "sample-10BT"  # its configuration on the hub: 14 files, 26.56 GiB, 9,672,101 documents
)
revision = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"  # its commit on the hub
download_dir = ""  # keeps the downloaded files; "": each one is deleted after use
output_dir = "data/fineweb_edu_sample_10BT"  # folder of the shards; train.py's default data_dir
tokenizer = "hastings/hastings.json"  # your own: a folder with a tokenizer.json

# which documents are kept; "" or 0 turns a filter off
language_filter = "en"  # value of the column `language`
language_score_threshold = 0.95  # lowest `language_score`
min_int_score = 3  # 4 or 5: the highest quality only; the published set has nothing below 3
remove_duplicates = False  # keep the first of exactly equal texts

# how they are stored
val_split = 0.0005  # fraction of the documents kept for validation
shard_size = 500_000_000  # tokens in a shard, about

# who does the work
workers = 0  # threads of the tokenizer; 0: one for each core
rank = -1  # number of this process among `world_size`; -1: as torchrun says, or the only one
world_size = 0  # number of processes; 0: as torchrun says, or 1

SETTINGS = (  # which decide the bytes of the shards
    "language_filter",
    "language_score_threshold",
    "min_int_score",
    "remove_duplicates",
    "val_split",
    "shard_size",
)


class Progress:
    """The progress of this process: totals, and a bar on a terminal."""

    def __init__(self, files: list[InputFile], todo: list[InputFile]):
        self.documents = self.text_bytes = self.passed = self.tokens = 0
        self.start = time.perf_counter()
        total, todo_bytes = (sum(file.bytes for file in group) for group in (files, todo))
        self.bar = tqdm(
            total=max(1, total),
            initial=total - todo_bytes,
            # Off without a terminal, and where another process of torchrun draws one.
            disable=True if int(os.environ.get("LOCAL_RANK") or 0) else None,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def __str__(self) -> str:
        seconds = max(1e-9, time.perf_counter() - self.start)
        return (
            f"{self.documents / seconds:,.0f} documents/s, "
            f"{self.text_bytes / seconds / 1e6:,.1f} MB/s, {self.tokens / 1e6:,.1f}M tokens, "
            f"{self.passed / max(1, self.documents):.1%} kept"
        )

    def advance(self, batch: Documents, tokens: int, file_bytes: int) -> None:
        self.documents += batch.rows_read
        self.text_bytes += batch.bytes_read
        self.passed += len(batch.texts)
        self.tokens += tokens
        self.bar.set_postfix_str(str(self), refresh=False)
        self.bar.update(batch.share_of_file * file_bytes)


def open_parts(
    output: Path,
    config: Any,
    files: list[InputFile],
    indices: list[int],
    identity: dict[str, Any],
    stack: ExitStack,
) -> Iterator[tuple[Path, Part]]:
    """Locks the part of each input file and downloads the file: yields (path, part).

    `stack` closes the parts that are not stored.
    """
    for index in indices:
        file, folder, resources = files[index], part_folder(output, index), ExitStack()
        stack.push(resources)
        folder.mkdir(parents=True, exist_ok=True)
        resources.enter_context(locked(folder, SCRIPT))
        # Another process may have stored this part in between, or even finished the dataset.
        if read_record(folder / "part.json") or (output / "manifest.json").exists():
            resources.close()
            continue
        claim(output, identity)  # the folder may have been removed, and be another run's by now
        if isinstance(file, LocalFile):
            path, sha256 = file.path, file_sha256(file.path)
        else:
            path = folder / DOWNLOAD
            if config.download_dir:
                path = Path(config.download_dir, file.name)
            hub_download.download(file, path)
            sha256 = file.sha256 or file_sha256(path)
        writer = resources.enter_context(ShardWriter(folder))
        yield path, Part(folder, file, sha256, resources, writer)


def prepare_parts(
    output: Path,
    config: Any,
    tokenizer: Any,
    files: list[InputFile],
    indices: Iterable[int],
    identity: dict[str, Any],
) -> None:
    """Prepares the input files at `indices`, except those that are prepared already.

    At most four files are in progress: one is downloaded, one waits, one is encoded, one stored.
    """
    todo = []
    for index in indices:
        folder = part_folder(output, index)
        if read_record(folder / "part.json") is None:
            todo.append(index)
        else:  # left by a run that was killed between the two
            (folder / DOWNLOAD).unlink(missing_ok=True)
    progress = Progress([files[i] for i in indices], [files[i] for i in todo])
    stack = ExitStack()
    parts = Prefetcher(open_parts(output, config, files, todo, identity, stack), depth=1)
    storing: Future | None = None
    try:
        with stack, ThreadPoolExecutor(1) as pool:
            for path, part in parts:
                part.encode(path, config, tokenizer, progress.advance)
                if storing:
                    storing.result()
                storing = pool.submit(part.store, config, identity)
            if storing:
                storing.result()
    finally:
        parts.close(wait=False)  # the next run resumes a download
        progress.bar.close()
    if todo:
        print(progress)


def identity_of(config: Any, tokenizer: Any, files: str) -> dict[str, Any]:
    """Everything the shards depend on: equal identities give equal bytes."""
    identity = {name: getattr(config, name) for name in SETTINGS}
    if not is_local(config.source):
        identity |= {name: getattr(config, name) for name in ("source", "config_name", "revision")}
    return identity | {"tokenizer": tokenizer.sha256, "files": files}


def read_finished(output: Path, config: Any, tokenizer: Any) -> dict[str, Any] | None:
    """The manifest if `output` holds this dataset, complete; UserError if it holds another one."""
    manifest = read_manifest(output)
    if manifest is None:
        shards = sorted(output.glob("*.npz"))
        if shards and not (output / STAGING).is_dir():
            raise UserError(
                f"{shards[0]} is there without a manifest.json: choose another --output_dir, or "
                "move it away"
            )
        return None
    old, files = manifest["settings"], []
    if is_local(config.source):
        with suppress(UserError):  # the input may be gone
            files = local_files(config.source)
    names = files_identity(files) if files else old.get("files")
    refuse_if_different(output, "a finished", output, old, identity_of(config, tokenizer, names))
    if files:
        refuse_if_changed(manifest["sources"], files)
    check_sizes(output, manifest)
    return manifest


def print_summary(manifest: dict[str, Any], output: Path, tokenizer_name: str) -> None:
    flag = "" if tokenizer_name == tokenizer else f" --tokenizer={tokenizer_name}"
    files = manifest["files"].items()
    train = [entry for name, entry in files if name.startswith("train")]
    val = manifest["files"]["val.npz"]
    train_counts = (sum(entry[name] for entry in train) for name in ("documents", "tokens"))
    rows = [("read", manifest["documents_read"], None)]
    rows += [(f"- {why}", n["documents"], n["tokens"]) for why, n in manifest["dropped"].items()]
    rows += [(f"train, in {len(train)} shards", *train_counts)]
    rows += [("val", val["documents"], val["tokens"])]
    print(f"\n{'':32}{'documents':>14}{'tokens':>18}")
    for name, documents, tokens in rows:
        print(f"{name:32}{documents:14,}{'' if tokens is None else f'{tokens:,}':>18}")
    print(
        f"{manifest['text_bytes'] / manifest['tokens']:.2f} bytes a token; the tokens that a filter"
        " dropped are as the source's token_count says\n"
        f"next: python train.py --data_dir={output}{flag}"
    )


def rank_and_world_size(config: Any) -> tuple[int, int]:
    """(rank, world size) of this process, from the settings or torchrun's environment."""
    try:
        rank = config.rank if config.rank >= 0 else int(os.environ.get("RANK") or -1)
        world_size = config.world_size or int(os.environ.get("WORLD_SIZE") or 1)
    except ValueError as error:
        raise UserError(f"RANK or WORLD_SIZE in the environment: {error}: unset them") from None
    if world_size == 1:
        rank = max(rank, 0)
    if not 0 <= rank < world_size:
        raise UserError(
            f"rank={rank} is not one of world_size={world_size}: ranks go from 0 to "
            "world_size - 1, give both"
        )
    return rank, world_size


def check_settings(config: Any) -> None:
    if not config.source:
        raise UserError("source is empty: name a dataset of the hub or local Parquet files")
    if not 0 < config.val_split < 1:
        raise UserError(f"val_split={config.val_split} is not between 0 and 1: try 0.0005")
    if config.shard_size < 1:
        raise UserError(f"shard_size={config.shard_size} is not a number of tokens: try 500000000")
    if not 0 <= config.language_score_threshold <= 1:
        raise UserError("language_score_threshold is a probability: give 0 to 1")
    if not 0 <= config.min_int_score <= 5:
        raise UserError("min_int_score goes from 0 to 5: give 0 to turn it off")
    if not config.output_dir:
        raise UserError("output_dir is empty: name a folder")
    if config.workers < 0:
        raise UserError(f"workers={config.workers} is negative: 0 stands for all cores")
    if not is_local(config.source) and not config.revision:
        raise UserError("revision is empty: name a commit of the dataset, or --revision=main")


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    check_settings(config)
    rank, world_size = rank_and_world_size(config)
    if hasattr(os, "sched_getaffinity"):  # on Linux: the cores that Slurm assigned
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    # gigatoken and tokenizers read this when they start.
    os.environ["RAYON_NUM_THREADS"] = str(config.workers or max(1, cores))
    tokenizer, output = load_tokenizer(config.tokenizer), Path(config.output_dir)
    refuse_other_dataset(output, SCRIPT)
    if manifest := read_finished(output, config, tokenizer):
        shutil.rmtree(output / STAGING, ignore_errors=True)
        print(f"{output} is finished already, there is nothing to do")
        print_summary(manifest, output, config.tokenizer)
        return 0

    files = input_files(config)
    identity = identity_of(config, tokenizer, files_identity(files))
    records = read_records(output, files, identity)
    todo = [file for file, record in zip(files, records, strict=True) if not record]
    check_disk(output, config, todo)
    if any(records):
        n_done = len(files) - len(todo)
        print(f"going on: {n_done} of {len(files)} files are prepared already")
    claim(output, identity)
    own_indices = range(rank, len(files), world_size)
    try:
        prepare_parts(output, config, tokenizer, files, own_indices, identity)
    except KeyboardInterrupt:
        n_done = sum((part_folder(output, i) / "part.json").exists() for i in range(len(files)))
        print(
            f"\n{n_done} of {len(files)} files are prepared: run the same command to go on",
            file=sys.stderr,
        )
        raise

    with locked(output, "preparation", wait=True):
        manifest = read_finished(output, config, tokenizer)
        if manifest:  # by another process in between
            shutil.rmtree(output / STAGING, ignore_errors=True)
        else:
            refuse_other_dataset(output, SCRIPT)
            records = read_records(output, files, identity)
            if n_missing := records.count(None):
                print(
                    f"this process is done; the others have {n_missing} of {len(files)} files "
                    "left, and the last one finishes the dataset"
                )
                return 0
            manifest = finish(output, config, tokenizer, records)
    print_summary(manifest, output, config.tokenizer)
    return 0


if __name__ == "__main__":
    run_script(main)
