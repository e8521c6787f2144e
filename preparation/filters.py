"""Filters the documents of a Parquet file of web text, and counts what each filter drops.

The columns are FineWeb's: `text` and `id`, and those of the active filters.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import UserError
from preparation.parquet import NUMBER, STRING, ParquetFile

COLUMNS = {
    "text": STRING,
    "id": STRING,
    "language": STRING,
    "language_score": NUMBER,
    "int_score": NUMBER,
    "token_count": NUMBER,
}
EMPTY = "empty text"
BATCH_BYTES = 4 << 20  # of text worth encoding at a time, on all cores


@dataclass
class Counts:
    """The documents of a file read so far, and those dropped: {reason: {"documents", "tokens"}}."""

    documents: int = 0
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    first_empty: int | None = None  # row group of the first document without text

    def drop(self, reason: str, documents: int, tokens: int) -> None:
        entry = self.dropped.setdefault(reason, {"documents": 0, "tokens": 0})
        entry["documents"] += documents
        entry["tokens"] += tokens


class Documents(NamedTuple):
    """A batch of n documents that passed the filters, and how much of the file it took."""

    texts: list[bytes]  # UTF-8
    keys: np.ndarray  # (n,) uint64, hashes of the ids
    text_hashes: np.ndarray  # (n, 2) uint64, or (0, 2) without remove_duplicates
    text_bytes: int
    rows_read: int
    bytes_read: int
    share_of_file: float

    @classmethod
    def concatenate(cls, batches: list["Documents"]) -> "Documents":
        texts, keys, hashes, *numbers = zip(*batches, strict=True)
        return cls(sum(texts, []), np.concatenate(keys), np.concatenate(hashes), *map(sum, numbers))


def filters(config: Any) -> dict[str, tuple[str, Callable[[pa.Array], pa.Array]]]:
    """The active filters: {reason for a drop: (column, function from the column to a mask)}."""
    language, score = config.language_filter, config.language_score_threshold
    active = {EMPTY: ("text", lambda column: pc.match_substring_regex(column, r"\S"))}
    if language:
        reason = f"language is not {language}"
        active[reason] = ("language", lambda column: pc.equal(column, language))
    if score:
        reason = f"language_score < {score:g}"
        active[reason] = ("language_score", lambda column: at_least(column, score))
    if config.min_int_score:
        reason = f"int_score < {config.min_int_score}"
        active[reason] = ("int_score", lambda column: at_least(column, config.min_int_score))
    return active


def at_least(column: pa.Array, threshold: float) -> pa.Array:
    """Compares floats in the column's type: a float32 0.95 is not less than 0.95."""
    if pa.types.is_floating(column.type):
        threshold = pa.scalar(threshold, column.type)
    return pc.greater_equal(column, threshold)


def read_documents(path: Path, config: Any, counts: Counts) -> Iterator[Documents]:
    """Yields the documents that pass, in file order and in batches of about BATCH_BYTES.

    `config` has `language_filter`, `language_score_threshold`, `min_int_score` ("" or 0 turns one
    off; a null passes none) and `remove_duplicates`. `counts` takes the tokens of a dropped
    document from the column `token_count`, if there is one. Raises UserError, with the file and
    where possible the row group, for a file that cannot be read.
    """
    batches: list[Documents] = []
    for batch in filtered_batches(path, config, counts):
        batches.append(batch)
        text_bytes = sum(batch.text_bytes for batch in batches)
        bytes_read = sum(batch.bytes_read for batch in batches)
        if text_bytes >= BATCH_BYTES or bytes_read >= 4 * BATCH_BYTES:
            yield Documents.concatenate(batches)
            batches = []
    if batches:
        yield Documents.concatenate(batches)


def filtered_batches(path: Path, config: Any, counts: Counts) -> Iterator[Documents]:
    active = filters(config)
    names = {"text", "id", "token_count"} | {column for column, _ in active.values()}
    columns = {name: kind for name, kind in COLUMNS.items() if name in names}
    file = ParquetFile(path, columns, optional=("token_count",))
    for reason in active:
        counts.drop(reason, 0, 0)
    for group, first_row, batch in file.batches():
        if batch.column("id").null_count:
            row = first_row + pc.index(pc.is_null(batch.column("id")), True).as_py()
            raise UserError(f"{path}, row group {group}, row {row}: the document has no id")
        keep = np.ones(len(batch), dtype=bool)
        for reason, (column, passes) in active.items():
            mask = pc.fill_null(passes(batch.column(column)), False).to_numpy(False)
            drop = keep & ~mask
            keep &= mask
            if drop.any():
                tokens = 0
                if "token_count" in file.columns:
                    column = batch.column("token_count").filter(pa.array(drop))
                    tokens = int(pc.sum(column).as_py() or 0)
                counts.drop(reason, int(drop.sum()), tokens)
                if reason == EMPTY and counts.first_empty is None:
                    counts.first_empty = group
        counts.documents += len(batch)
        texts, ids = (batch.column(name).filter(pa.array(keep)) for name in ("text", "id"))
        text_bytes = pc.sum(pc.binary_length(texts)).as_py() or 0
        texts, ids = texts.cast(pa.large_binary()).to_pylist(), ids.to_pylist()
        keys = np.frombuffer(digests((name.encode() for name in ids), 8), ">u8")
        hashes = np.frombuffer(digests(texts if config.remove_duplicates else [], 16), "<u8")
        yield Documents(
            texts,
            keys.astype(np.uint64),
            hashes.reshape(-1, 2),
            text_bytes,
            len(batch),
            batch.column("text").nbytes,
            len(batch) / file.rows,
        )


def digests(values: Iterable[bytes], size: int) -> bytes:
    return b"".join(hashlib.blake2b(value, digest_size=size).digest() for value in values)
