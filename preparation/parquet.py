"""Reads Parquet files a batch of rows at a time, with errors that name the file and row group."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from common.errors import UserError

BATCH_ROWS, BATCH_BYTES = 512, 2 << 20  # at most, though one row may have more
STRING, NUMBER, ANY = "string", "number", "any"


def is_string(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold texts; the type of an empty one may be null."""
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return (
        pt.is_string(kind)
        or pt.is_large_string(kind)
        or (pt.is_string_view(kind) or pt.is_null(kind))
    )


def is_number(kind: pa.DataType) -> bool:
    number = pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)
    return number or pt.is_null(kind)


def plain(batch: pa.RecordBatch, columns: dict[str, str]) -> pa.RecordBatch:
    """The same values in types that pyarrow can compute with: no dictionaries, views, halves."""
    for i, (name, kind) in enumerate(zip(batch.schema.names, batch.schema.types, strict=True)):
        target = {STRING: pa.large_string(), NUMBER: pa.float64()}.get(columns.get(name))
        if pt.is_string(kind) or pt.is_float32(kind) or pt.is_integer(kind) or target is None:
            continue
        if pt.is_float16(kind):
            target = pa.float32()
        batch = batch.set_column(i, name, batch.column(i).cast(target))
    return batch


FITS = {STRING: is_string, NUMBER: is_number, ANY: lambda kind: True}


class ParquetFile:
    """A Parquet file of which only some columns are read, a batch of rows at a time.

    `columns` maps the names of the columns to STRING, NUMBER or ANY; those of `optional` may be
    missing, and `self.columns` says which are there. Raises UserError, naming the file and where it
    can the row group, if it is not a whole Parquet file or if a column is missing or of another
    type. Memory is that of a few batches, whose rows are as many as fit into BATCH_BYTES.
    """

    def __init__(
        self, path: str | Path, columns: dict[str, str], optional: tuple[str, ...] = ()
    ) -> None:
        self.path, self.kinds = Path(path), columns
        try:
            file = open(path, "rb")  # by Python, which can open a name that is not UTF-8
            self.file = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        except (pa.ArrowException, OSError) as error:
            raise self.unreadable(error) from None
        schema = self.file.schema_arrow
        self.columns = [name for name in columns if name not in optional or name in schema.names]
        for name in self.columns:
            if schema.names.count(name) != 1:
                found = ", ".join(schema.names) or "none"
                raise UserError(f"{self.path} has no column '{name}' (its columns: {found})")
            kind = schema.field(name).type
            if not FITS[columns[name]](kind):
                raise UserError(
                    f"{self.path} has '{name}' as {kind}, not as a {columns[name]}: convert the "
                    "column, or use another file"
                )

    @property
    def rows(self) -> int:
        return self.file.metadata.num_rows

    @property
    def names(self) -> list[str]:
        """The names of all columns that the file has."""
        return self.file.schema_arrow.names

    def uncompressed_bytes(self) -> int:
        """What the columns that are read take uncompressed, by the file's own account."""
        metadata, total = self.file.metadata, 0
        for group in range(metadata.num_row_groups):
            for i in range(metadata.num_columns):
                column = metadata.row_group(group).column(i)
                if column.path_in_schema.split(".")[0] in self.columns:
                    total += column.total_uncompressed_size
        return total

    def batches(self) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """Yields (row group, number of its first row in the group, batch of at most BATCH_ROWS)."""
        for group in range(self.file.num_row_groups):
            row, facts = 0, self.file.metadata.row_group(group)
            rows = BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)
            rows = max(1, min(BATCH_ROWS, rows))
            try:
                for batch in self.file.iter_batches(rows, [group], self.columns):
                    batch.validate(full=True)  # as strings are UTF-8
                    yield group, row, plain(batch, self.kinds)
                    row += len(batch)
            except (pa.ArrowException, OSError) as error:
                raise self.unreadable(error, f", row group {group}") from None

    def unreadable(self, error: Exception, where: str = "") -> Exception:
        """What to raise for an error of pyarrow: a UserError unless the system could not read."""
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(self.path)
            return error
        reason = " ".join(str(error).split())[:200]
        return UserError(
            f"{self.path}{where} is damaged or not Parquet ({reason}): fetch the file again"
        )

    def close(self) -> None:
        self.file.close()


def rows_of(file: ParquetFile) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields every row of a file, of the columns that are read, as (dict, where it is)."""
    for group, first, batch in file.batches():
        for i, row in enumerate(batch.to_pylist()):
            yield row, f"row group {group}, row {first + i}"
