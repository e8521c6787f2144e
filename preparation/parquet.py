"""Reads Parquet files in batches of rows, with errors that name the file and the row group."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from common.errors import UserError

BATCH_ROWS, BATCH_BYTES = 512, 2 << 20  # at most, though one row may have more bytes
STRING, NUMBER, ANY = "string", "number", "any"


def is_string(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold texts; the type of an empty column may be null."""
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    strings = (pt.is_string, pt.is_large_string, pt.is_string_view, pt.is_null)
    return any(is_kind(kind) for is_kind in strings)


def is_number(kind: pa.DataType) -> bool:
    numbers = (pt.is_integer, pt.is_floating, pt.is_decimal, pt.is_null)
    return any(is_kind(kind) for is_kind in numbers)


TYPE_CHECKS = {STRING: is_string, NUMBER: is_number, ANY: lambda kind: True}


class ParquetFile:
    """A Parquet file, of which some columns are read in batches of rows.

    `columns` maps the names of the columns to STRING, NUMBER or ANY; those of `optional` may be
    missing, and `self.columns` lists the present ones. Raises UserError, with the file and where
    possible the row group, if the file is damaged or a column is missing or of another type. Memory
    is that of a few batches, each of at most BATCH_ROWS rows and about BATCH_BYTES.
    """

    def __init__(
        self, path: str | Path, columns: dict[str, str], optional: tuple[str, ...] = ()
    ) -> None:
        self.path, self.kinds = Path(path), columns
        try:
            file = open(path, "rb")  # by Python, which can open a name that is not UTF-8
            self.file = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        except (pa.ArrowException, OSError) as error:
            raise self.read_error(error) from None
        schema = self.file.schema_arrow
        self.names = schema.names  # of all columns
        self.columns = [name for name in columns if name not in optional or name in schema.names]
        for name in self.columns:
            if schema.names.count(name) != 1:
                names = ", ".join(schema.names) or "none"
                raise UserError(f"{self.path} has no column '{name}' (its columns: {names})")
            kind = schema.field(name).type
            if not TYPE_CHECKS[columns[name]](kind):
                raise UserError(
                    f"{self.path} has '{name}' as {kind}, not as a {columns[name]}: convert the "
                    "column, or use another file"
                )

    @property
    def rows(self) -> int:
        return self.file.metadata.num_rows

    def uncompressed_bytes(self) -> int:
        """The uncompressed size of the columns that are read, according to the file's metadata."""
        metadata = self.file.metadata
        chunks = (
            metadata.row_group(group).column(i)
            for group in range(metadata.num_row_groups)
            for i in range(metadata.num_columns)
        )
        return sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.split(".")[0] in self.columns
        )

    def batches(self) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """Yields (row group, number of the batch's first row in the group, batch)."""
        for group in range(self.file.num_row_groups):
            row, metadata = 0, self.file.metadata.row_group(group)
            batch_rows = BATCH_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)
            batch_rows = max(1, min(BATCH_ROWS, batch_rows))
            try:
                # A thread of Arrow that reads `file` through Python while the interpreter exits
                # would hang, hence use_threads=False.
                batches = self.file.iter_batches(
                    batch_rows, [group], self.columns, use_threads=False
                )
                for batch in batches:
                    batch.validate(full=True)  # that strings are UTF-8
                    yield group, row, self.plain(batch)
                    row += len(batch)
            except (pa.ArrowException, OSError) as error:
                raise self.read_error(error, f", row group {group}") from None

    def plain(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The same values in types that pyarrow can compute with: no dictionaries or views."""
        for i, field in enumerate(batch.schema):
            target = None
            if self.kinds.get(field.name) == STRING and not pt.is_string(field.type):
                target = pa.large_string()
            elif self.kinds.get(field.name) == NUMBER and not pt.is_primitive(field.type):
                target = pa.float64()  # of decimals and nulls
            if target:
                batch = batch.set_column(i, field.name, batch.column(i).cast(target))
        return batch

    def dict_rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yields every row as ({column: value}, its position for an error message)."""
        for group, first_row, batch in self.batches():
            for i, row in enumerate(batch.to_pylist()):
                yield row, f"row group {group}, row {first_row + i}"

    def read_error(self, error: Exception, position: str = "") -> Exception:
        """The exception for an error of pyarrow: a UserError unless the system could not read."""
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(self.path)
            return error
        reason = " ".join(str(error).split())[:200]
        return UserError(
            f"{self.path}{position} is damaged or not Parquet ({reason}): fetch the file again"
        )

    def close(self) -> None:
        self.file.close()
