"""Resumable parts of a dataset, one per input file, prepared by any number of processes.

Part i is the folder `output`/.preparing/part-0000i: its shards, and part.json as soon as they are
complete. Once all parts are complete, `finish` moves the shards into `output` and writes
manifest.json. Every file present is complete, so an interrupted run can be resumed from any point.
"""

import json
import os
import shutil
from array import array
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError, printable
from common.files import atomic_file, locked
from common.manifest import make_manifest, write_manifest
from common.prefetch import Prefetcher
from dataset import NpzDataset, ShardWriter
from preparation.filters import EMPTY, Counts, read_documents
from preparation.input_files import InputFile, refuse_if_changed
from preparation.local_files import LocalFile
from preparation.output_folder import NO_DATA, STAGING_FOLDERS, refuse_other_dataset

SCRIPT = "prepare_dataset_fineweb.py"
STAGING = STAGING_FOLDERS[SCRIPT]
DOWNLOAD = "input.parquet"  # in a part's folder
DUPLICATE = "duplicate text"
SOURCE = ("name", "bytes", "sha256")
DUPLICATES_AT_A_TIME = 4 << 20  # documents compared at a time


@dataclass
class Part:
    """The part of one input file in progress: first `encode`, then `store`."""

    folder: Path
    file: InputFile
    sha256: str
    resources: ExitStack  # the lock and the writer
    writer: ShardWriter
    counts: Counts = field(default_factory=Counts)
    keys: array = field(default_factory=lambda: array("Q"))
    text_hashes: bytearray = field(default_factory=bytearray)
    text_bytes: int = 0

    def encode(self, path: Path, config: Any, tokenizer: Any, on_batch: Callable) -> None:
        """Encodes the documents of the file at `path` that pass the filters into the writer.

        Calls `on_batch(batch, number of tokens, bytes of the file)` after each batch.
        """
        batches = Prefetcher(read_documents(path, config, self.counts))
        try:
            for batch in batches:
                ids, ends = tokenizer.encode_documents(batch.texts)
                self.writer.add_flat(ids, ends)
                self.keys.frombytes(batch.keys.tobytes())
                self.text_hashes += batch.text_hashes.tobytes()
                self.text_bytes += batch.text_bytes
                on_batch(batch, len(ids), self.file.bytes)
        finally:
            batches.close()
        if isinstance(self.file, LocalFile):
            self.file.refuse_if_rewritten()

    def store(self, config: Any, identity: dict[str, Any]) -> dict[str, Any]:
        """Writes the shards in the order of the keys, then part.json; returns its content."""
        keys = np.frombuffer(self.keys, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        n_val = int(np.searchsorted(keys[order], np.uint64(config.val_split * 2.0**64)))
        val, train = np.split(order, [n_val])
        with self.resources:
            writer = self.writer
            shard_orders = split_by_tokens(train, writer.lengths(train), config.shard_size)
            shards = [
                writer.write(self.folder / f"train-{i:05d}.npz", documents)
                for i, documents in enumerate(shard_orders)
            ]
            val_entry = writer.write(self.folder / "val.npz", val)
            if config.remove_duplicates:
                hashes = np.frombuffer(self.text_hashes, dtype="<u8").reshape(-1, 2)
                with atomic_file(self.folder / "text_hashes.npy") as file:
                    np.save(file, hashes[np.concatenate([train, val])])
            record = {
                "identity": identity,
                "source": {
                    "name": self.file.name,
                    "bytes": self.file.bytes,
                    "sha256": self.sha256,
                    "modified": getattr(self.file, "modified", None),
                },
                "documents": self.counts.documents,
                "text_bytes": self.text_bytes,
                "dropped": self.counts.dropped,
                "shards": shards,
                "val": val_entry,
            }
            write_record(self.folder / "part.json", record)
        (self.folder / DOWNLOAD).unlink(missing_ok=True)
        documents = sum(entry["documents"] for entry in [*shards, val_entry])
        tokens = sum(entry["tokens"] for entry in [*shards, val_entry])
        empty = self.counts.dropped[EMPTY]["documents"]
        note = f"; {empty:,} without text, from row group {self.counts.first_empty} on"
        tqdm.write(
            f"{printable(self.file.name)}: {documents:,} of {self.counts.documents:,} documents "
            f"kept, {tokens:,} tokens{note if empty else ''}"
        )
        return record


def split_by_tokens(order: np.ndarray, lengths: np.ndarray, shard_size: int) -> list[np.ndarray]:
    """Splits documents into consecutive groups of about `shard_size` tokens, none empty."""
    if not len(order):
        return []
    shard = (np.cumsum(lengths) - 1) // shard_size
    return np.split(order, np.flatnonzero(np.diff(shard)) + 1)


def part_folder(output: Path, index: int) -> Path:
    return output / STAGING / f"part-{index:05d}"


def read_record(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file of the staging folder, None if it does not exist yet."""
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError
        return record
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: delete it and run again") from None


def write_record(path: Path, record: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(record, indent=1).encode("ascii"))


def claim(output: Path, identity: dict[str, Any]) -> None:
    """Makes the staging folder that of a run with this identity; UserError if it is another's."""
    staging = output / STAGING
    path = staging / "run.json"
    if read_record(path) == identity:
        return
    output.mkdir(parents=True, exist_ok=True)
    # Not for a run of prepare_dataset.py, which holds the lock until it is done.
    wait = not (output / STAGING_FOLDERS["prepare_dataset.py"]).exists()
    with locked(output, "preparation", wait):
        refuse_other_dataset(output, SCRIPT)
        if (output / "manifest.json").exists():  # another process has finished
            return
        claimed = read_record(path)
        if claimed and not is_empty(staging):
            refuse_if_different(output, "an unfinished", staging, claimed, identity)
        staging.mkdir(exist_ok=True)
        write_record(path, identity)


def is_empty(staging: Path) -> bool:
    """Whether nothing has been prepared in the staging folder, and no process is at it."""
    with suppress(UserError):
        for folder in staging.glob("part-*"):
            with locked(folder, SCRIPT):  # removes the lock file of a killed process
                pass
        return all(path.is_dir() or path.name in NO_DATA for path in staging.rglob("*"))
    return False


def read_records(
    output: Path, files: list[InputFile], identity: dict[str, Any]
) -> list[dict[str, Any] | None]:
    """The record of each input file's part, None if it is not complete.

    UserError if a part was prepared with another identity or from another file.
    """
    staging = output / STAGING
    records = [read_record(part_folder(output, i) / "part.json") for i in range(len(files))]
    for record in filter(None, records):
        refuse_if_different(output, "an unfinished", staging, record["identity"], identity)
    refuse_if_changed([record and record["source"] for record in records], files)
    return records


def refuse_if_different(
    output: Path, state: str, remove: Path, old: dict[str, Any], new: dict[str, Any]
) -> None:
    """UserError if settings differ, with all of them."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        changes = ", ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in names)
        raise UserError(
            f"{output} holds {state} dataset with other settings ({changes}): set them back, "
            f"choose another --output_dir, or delete {remove}"
        )


def find_duplicates(paths: list[Path]) -> list[np.ndarray]:
    """Marks the documents (n,) bool of each part that repeat the text of an earlier document.

    `paths` are the files with the hashes (n, 2) uint64 of each part. They are compared in slices by
    value, so that memory use is constant, and one file is open at a time.
    """
    duplicates = [np.zeros(len(np.load(path, mmap_mode="r")), dtype=bool) for path in paths]
    starts = np.cumsum([0, *map(len, duplicates)])
    n_slices = 1 + int(starts[-1]) // DUPLICATES_AT_A_TIME
    for number in range(n_slices):
        values, positions = [], []
        for start, path in zip(starts, paths, strict=False):
            hashes = np.load(path, mmap_mode="r")
            indices = np.flatnonzero(hashes[:, 0] % n_slices == number)
            values.append(hashes[indices])
            positions.append(start + indices)
        values, positions = np.concatenate(values), np.concatenate(positions)
        order = np.lexsort((values[:, 1], values[:, 0]))  # stable: the first one stays first
        values, positions = values[order], positions[order]
        repeats = positions[1:][(values[1:] == values[:-1]).all(axis=1)]
        part = np.searchsorted(starts, repeats, side="right") - 1
        for i in np.unique(part):
            duplicates[i][repeats[part == i] - starts[i]] = True
    return duplicates


def drop_documents(path: Path, drop: np.ndarray, target: Path) -> dict[str, Any]:
    """Writes the shard `path` without the documents marked in `drop` (n,) bool to `target`."""
    with ShardWriter(target.parent) as writer:
        append_documents(NpzDataset(path), np.flatnonzero(~drop), writer)
        return writer.write(target)


def append_documents(data: NpzDataset, documents: np.ndarray, writer: ShardWriter) -> None:
    """Adds the `documents` (indices) of a shard to `writer`, some at a time."""
    for start in range(0, len(documents), 256):
        writer.add_batch([data[i] for i in documents[start : start + 256]])


def count_tokens(
    data: NpzDataset, documents: np.ndarray, token_bytes: np.ndarray
) -> tuple[int, int]:
    """(tokens, bytes of text) of the `documents` (indices) of a shard."""
    tokens = sum(len(data[i]) for i in documents)
    return tokens, sum(int(token_bytes[data[i]].sum()) for i in documents)


def plan_shards(
    output: Path, config: Any, tokenizer: Any, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Assigns the final names once all parts are complete: {"moves", "manifest"}.

    Merges the validation documents and removes duplicates, into new files: the parts' own files
    stay as they are, so this can be repeated.
    """
    staging = output / STAGING
    counts = Counts()
    for record in records:
        counts.documents += record["documents"]
        for reason, entry in record["dropped"].items():
            counts.drop(reason, entry["documents"], entry["tokens"])
    text_bytes = sum(record["text_bytes"] for record in records)
    parts = [Path(part_folder(output, index).name) for index in range(len(records))]
    duplicates: list[np.ndarray] = []
    if config.remove_duplicates:
        duplicates = find_duplicates([staging / part / "text_hashes.npy" for part in parts])
        counts.drop(DUPLICATE, 0, 0)

    shards: list[tuple[Path, dict[str, Any]]] = []
    with ShardWriter(staging) as val:
        for index, (part, record) in enumerate(zip(parts, records, strict=True)):
            start = 0
            names = [f"train-{i:05d}.npz" for i in range(len(record["shards"]))] + ["val.npz"]
            for name, entry in zip(names, [*record["shards"], record["val"]], strict=True):
                path, end = part / name, start + entry["documents"]
                drop = duplicates[index][start:end] if duplicates else np.zeros(end - start, bool)
                start = end
                data = NpzDataset(staging / path)
                if drop.any():
                    documents = np.flatnonzero(drop)
                    tokens, n_bytes = count_tokens(data, documents, tokenizer.token_bytes)
                    counts.drop(DUPLICATE, len(documents), tokens)
                    text_bytes -= n_bytes
                if name == "val.npz":
                    append_documents(data, np.flatnonzero(~drop), val)
                elif not drop.any():
                    shards.append((path, entry))
                elif not drop.all():
                    unique = path.with_suffix(".unique.npz")
                    entry = drop_documents(staging / path, drop, staging / unique)
                    shards.append((unique, entry))
        val_entry = val.write(staging / "val.npz")

    if not shards:
        reasons = ", ".join(f"{n['documents']:,} {reason}" for reason, n in counts.dropped.items())
        raise UserError(
            f"none of the {counts.documents:,} documents passed the filters ({reasons}): loosen "
            f"them and delete {staging}"
        )
    if not val_entry["documents"]:
        raise UserError(
            f"val_split={config.val_split} leaves no document for validation: set a larger one and "
            f"delete {staging}"
        )
    moves, entries = {}, {}
    for i, (path, entry) in enumerate(shards):
        name = f"train-{i:05d}-of-{len(shards):05d}.npz"
        moves[name], entries[name] = path.as_posix(), entry
    moves["val.npz"], entries["val.npz"] = "val.npz", val_entry
    manifest = make_manifest(
        kind="text",
        tokenizer=tokenizer,
        sources=[{name: record["source"][name] for name in SOURCE} for record in records],
        settings=records[0]["identity"],
        dropped=counts.dropped,
        files=entries,
    ) | {"documents_read": counts.documents, "text_bytes": text_bytes}
    return {"moves": moves, "manifest": manifest}


def check_sizes(output: Path, manifest: dict[str, Any]) -> None:
    """UserError unless every shard of the manifest exists with its size."""
    for name, entry in manifest["files"].items():
        path = output / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path} is missing or damaged: delete {output} and run again")


def finish(
    output: Path, config: Any, tokenizer: Any, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Moves the shards into `output` and writes the manifest; can be repeated after any failure."""
    staging = output / STAGING
    layout = read_record(staging / "layout.json")
    if layout is None:
        layout = plan_shards(output, config, tokenizer, records)
        write_record(staging / "layout.json", layout)
    for name, path in layout["moves"].items():
        with suppress(FileNotFoundError):  # an earlier run has moved it
            os.replace(staging / path, output / name)
    check_sizes(output, layout["manifest"])
    write_manifest(output / "manifest.json", layout["manifest"])
    shutil.rmtree(staging, ignore_errors=True)
    return layout["manifest"]
