"""Reads the documents of a Parquet file of web text that pass the filters, and counts the others.

The columns are FineWeb's: `text` and `id`, and those that a filter in use needs. All the work is
done on whole columns.
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
    """What was read of a file so far, and what was dropped: {reason: {"documents", "tokens"}}."""

    documents: int = 0
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    first_empty: int | None = None  # row group of the first document without text

    def drop(self, reason: str, documents: int, tokens: int) -> None:
        entry = self.dropped.setdefault(reason, {"documents": 0, "tokens": 0})
        entry["documents"] += documents
        entry["tokens"] += tokens


class Documents(NamedTuple):
    """Some documents that passed, n of them, and how much of the file was read to find them."""

    texts: list[bytes]  # UTF-8
    keys: np.ndarray  # (n,) uint64, hashes of the ids
    text_hashes: np.ndarray  # (n, 2) uint64, or (0, 2) if they are not wanted
    text_bytes: int
    rows_read: int
    bytes_read: int
    share_of_file: float

    @classmethod
    def joined(cls, batches: list["Documents"]) -> "Documents":
        texts, keys, hashes, *numbers = zip(*batches, strict=True)
        return cls(sum(texts, []), np.concatenate(keys), np.concatenate(hashes), *map(sum, numbers))


def filters(config: Any) -> dict[str, tuple[str, Callable[[pa.Array], pa.Array]]]:
    """Of each filter: why it drops a document -> (column, function of the column to what stays)."""
    language, score = config.language_filter, config.language_score_threshold
    chosen = {EMPTY: ("text", lambda column: pc.match_substring_regex(column, r"\S"))}
    if language:
        reason = f"language is not {language}"
        chosen[reason] = ("language", lambda column: pc.equal(column, language))
    if score:
        reason = f"language_score < {score:g}"
        chosen[reason] = ("language_score", lambda column: at_least(column, score))
    if config.min_int_score:
        reason = f"int_score < {config.min_int_score}"
        chosen[reason] = ("int_score", lambda column: at_least(column, config.min_int_score))
    return chosen


def at_least(column: pa.Array, least: float) -> pa.Array:
    """Compares floats in their own type: a float32 0.95 is not less than 0.95."""
    if pa.types.is_floating(column.type):
        least = pa.scalar(least, column.type)
    return pc.greater_equal(column, least)


def read_documents(path: Path, config: Any, counts: Counts) -> Iterator[Documents]:
    """Yields the documents that pass, in file order and in batches of about BATCH_BYTES.

    `config` has `language_filter`, `language_score_threshold`, `min_int_score` ("" or 0 turns one
    off; a null passes none) and `remove_duplicates`. The tokens that `counts` gives for a dropped
    document are those that the column `token_count`, if there is one, says. Raises UserError,
    naming the file and where it can the row group, for what cannot be read.
    """
    waiting: list[Documents] = []
    for batch in passing(path, config, counts):
        waiting.append(batch)
        kept = sum(batch.text_bytes for batch in waiting)
        if kept >= BATCH_BYTES or sum(batch.bytes_read for batch in waiting) >= 4 * BATCH_BYTES:
            yield Documents.joined(waiting)
            waiting = []
    if waiting:
        yield Documents.joined(waiting)


def passing(path: Path, config: Any, counts: Counts) -> Iterator[Documents]:
    chosen = filters(config)
    needed = {"text", "id", "token_count"} | {column for column, _ in chosen.values()}
    columns = {name: kind for name, kind in COLUMNS.items() if name in needed}
    file = ParquetFile(path, columns, optional=("token_count",))
    for reason in chosen:
        counts.drop(reason, 0, 0)
    for group, first_row, batch in file.batches():
        if batch.column("id").null_count:
            row = first_row + pc.index(pc.is_null(batch.column("id")), True).as_py()
            raise UserError(f"{path}, row group {group}, row {row}: the document has no id")
        keep = np.ones(len(batch), dtype=bool)
        for reason, (column, passes) in chosen.items():
            passed = pc.fill_null(passes(batch.column(column)), False).to_numpy(False)
            dropped = keep & ~passed
            keep &= passed
            if dropped.any():
                tokens = 0
                if "token_count" in file.columns:
                    column = batch.column("token_count").filter(pa.array(dropped))
                    tokens = int(pc.sum(column).as_py() or 0)
                counts.drop(reason, int(dropped.sum()), tokens)
                if reason == EMPTY and counts.first_empty is None:
                    counts.first_empty = group
        counts.documents += len(batch)
        texts, ids = (batch.column(name).filter(pa.array(keep)) for name in ("text", "id"))
        text_bytes = pc.sum(pc.binary_length(texts)).as_py() or 0
        texts, ids = texts.cast(pa.large_binary()).to_pylist(), ids.to_pylist()
        yield Documents(
            texts,
            np.frombuffer(digests((name.encode() for name in ids), 8), ">u8").astype(np.uint64),
            np.frombuffer(digests(texts if config.remove_duplicates else [], 16), "<u8").reshape(
                -1, 2
            ),
            text_bytes,
            len(batch),
            batch.column("text").nbytes,
            len(batch) / file.rows,
        )


def digests(values: Iterable[bytes], size: int) -> bytes:
    return b"".join(hashlib.blake2b(value, digest_size=size).digest() for value in values)
