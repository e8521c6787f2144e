"""Reads Parquet files a batch of rows at a time, with errors that name the file and row group."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from config import UserError

BATCH_ROWS = 512
STRING, NUMBER, ANY = "string", "number", "any"


def is_string(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)


def plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same batch with every dictionary and view as the strings that it stands for."""
    for i, kind in enumerate(batch.schema.types):
        if is_string(kind) and not (pt.is_string(kind) or pt.is_large_string(kind)):
            name = batch.schema.names[i]
            batch = batch.set_column(i, name, batch.column(i).cast(pa.large_string()))
    return batch


FITS = {STRING: is_string, NUMBER: is_number, ANY: lambda kind: True}


class ParquetFile:
    """A Parquet file of which only some columns are read, a batch of rows at a time.

    `columns` maps the names of the columns to STRING, NUMBER or ANY; those of `optional` may be
    missing, and `self.columns` says which are there. Raises UserError, naming the file and where it
    can the row group, if it is not a whole Parquet file or if a column is missing or of another
    type. Memory is that of a few batches, however large the row groups are.
    """

    def __init__(
        self, path: str | Path, columns: dict[str, str], optional: tuple[str, ...] = ()
    ) -> None:
        self.path = Path(path)
        try:
            self.file = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
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
            row = 0
            try:
                for batch in self.file.iter_batches(BATCH_ROWS, [group], self.columns):
                    batch.validate(full=True)  # as strings are UTF-8
                    yield group, row, plain(batch)
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
