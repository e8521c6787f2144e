"""Reads the examples that prepare_dataset.py encodes, from text, JSON lines and Parquet files.

An input (TextFile, ParquetFiles, and hub_dataset.HubDataset) has a `name` and a `size` in `unit`s
for the progress bar, about how many `bytes` of text it holds, `examples`, which yields them one at
a time, and, once those are read, `sources` for the manifest.
"""

import glob
import hashlib
import json
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import file_sha256
from preparation.parquet import ANY, ParquetFile, rows_of
from tokenizer import END_OF_TEXT, START_OF_TEXT, check_messages, parse_chat, to_utf8

CHUNK_BYTES = 1 << 20  # read at a time
TEXT_ENDINGS = (".txt", ".jsonl")
PARQUET = ".parquet"
COLUMNS = ("text", "messages", "question", "answer")

# An example: ("text", str), ("chat", messages) or ("empty", None), and where it is.
Example = tuple[str, Any, str]


# Text files -------------------------------------------------------------------------------------


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
            yield "text", text, f"{path}, byte {offset}"
        elif not last:
            yield "empty", None, f"{path}, byte {offset}"


def read_chat_txt(path: Path, on_bytes: Callable[[bytes], None]) -> Iterator[Example]:
    """Conversations in the chat layout, each checked; only the file's last may lack its end."""
    for number, (offset, text, last) in enumerate(
        split_file(path, START_OF_TEXT.encode(), on_bytes)
    ):
        if number > 0:
            where = f"{path}, example {number} at byte {offset - len(START_OF_TEXT)}"
            try:
                yield "chat", parse_chat(text, may_lack_end=last), where
            except ValueError as error:
                raise UserError(f"{where}: {error}: correct it") from None
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
        yield kind, content, f"{path}, line {number}"


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


class TextFile:
    """A .txt or .jsonl file; `trusted` says that its control tokens are not just characters."""

    unit = "B"

    def __init__(self, path: Path, trusted: bool):
        self.path, self.name = path, path.name
        self.size = self.bytes = path.stat().st_size
        self.read = read_chat_txt if trusted else read_txt
        if path.suffix.lower() == ".jsonl":
            self.read = read_jsonl
        self.digest = hashlib.sha256()

    def __str__(self) -> str:
        return str(self.path)

    def examples(self, advance: Callable[[int], Any]) -> Iterator[Example]:
        """Yields the examples in file order, and tells `advance` the bytes read."""

        def on_bytes(chunk: bytes) -> None:
            self.digest.update(chunk)
            advance(len(chunk))

        return self.read(self.path, on_bytes)

    def sources(self) -> list[dict[str, Any]]:
        return [{"name": self.name, "bytes": self.size, "sha256": self.digest.hexdigest()}]


# Rows -------------------------------------------------------------------------------------------


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


def example_columns(names: list[str], what: str | Path) -> list[str]:
    """Those of a table's columns that hold its examples; UserError unless they are of one form."""
    forms = [name for name in ("text", "messages", "question") if name in names]
    if len(forms) != 1 or (forms == ["question"] and "answer" not in names):
        raise UserError(
            f"{what} has the columns {reprlib.repr(names)[1:-1]}, not exactly one of 'text', "
            "'messages' or 'question' with 'answer': rename or remove columns"
        )
    return [*forms, "answer"] if forms == ["question"] else forms


def table_example(row: dict[str, Any], where: str) -> Example:
    """The example of a row of `example_columns`; nulls make it an empty one, as blanks do.

    Raises UserError for anything else that is not as it should be.
    """
    if any(value is None or value == [] for value in row.values()):
        return "empty", None, where
    if isinstance(row.get("messages"), list):
        row = {"messages": [without_null(message) for message in row["messages"]]}
    try:
        return *example_of(row), where
    except ValueError as error:
        raise UserError(f"{where}: {error}: correct the row, or leave it out") from None


def without_null(message: Any) -> Any:
    if isinstance(message, dict) and message.get("content", "") is None:
        return message | {"content": ""}
    return message


# Parquet files ----------------------------------------------------------------------------------


class ParquetFiles:
    """Parquet files (`sources.LocalFile`s), of which only the columns with the examples are read.

    Raises UserError for a file that is damaged or has not those columns, before any row is read.
    """

    unit = " rows"

    def __init__(self, files: list[Any]):
        self.files, self.name = files, f"{len(files)} files"
        if len(files) == 1:
            self.name = files[0].name
        self.size = self.bytes = 0
        for local in files:
            file = self.open(local.path)
            self.size += file.rows
            self.bytes += file.uncompressed_bytes()
            file.close()

    def __str__(self) -> str:
        first, more = self.files[0].path, len(self.files) - 1
        return f"{first} and {more} more" if more else str(first)

    def open(self, path: Path) -> ParquetFile:
        file = ParquetFile(path, dict.fromkeys(COLUMNS, ANY), optional=COLUMNS)
        file.columns = example_columns(file.names, path)
        return file

    def examples(self, advance: Callable[[int], Any]) -> Iterator[Example]:
        """Yields the examples, file after file, and tells `advance` the rows read."""
        for local in self.files:
            file = self.open(local.path)
            for row, where in rows_of(file):
                yield table_example(row, f"{local.path}, {where}")
                advance(1)
            file.close()

    def sources(self) -> list[dict[str, Any]]:
        return [
            {"name": local.name, "bytes": local.bytes, "sha256": file_sha256(local.path)}
            for local in self.files
        ]


# Which input a path stands for ------------------------------------------------------------------


def open_input(text: str, name: str, trusted: bool) -> TextFile | ParquetFiles:
    """The input that the setting `name` with the value `text` stands for; UserError if none."""
    path = Path(text)
    pattern = glob.has_magic(text) and not path.exists()
    if trusted and (pattern or path.is_dir()):
        raise UserError(f"trust_control_tokens is for .txt files only: turn it off for {text}")
    if path.is_dir() and not any(path.glob(f"*{PARQUET}")):
        raise UserError(
            f"{path} is a directory without {PARQUET} files: give {name} one .txt or .jsonl file, "
            f"or a pattern such as {path}/**/*{PARQUET}"
        )
    if pattern and not text.endswith(PARQUET):
        raise UserError(f"{text}: a pattern must end with {PARQUET}: give {name} one such")
    if not pattern and not path.is_dir():
        if not path.exists():
            raise UserError(f"{path} does not exist: put your text there, or set --{name}=...")
        check_readable(path, trusted)
        if path.suffix.lower() != PARQUET:
            return TextFile(path, trusted)
    from preparation.input_files import local_files  # takes a second

    return ParquetFiles(local_files(text, name))


def check_readable(path: Path, trusted: bool) -> None:
    """UserError unless `path` is a file of a kind that is read, and not empty."""
    if path.suffix.lower() not in (*TEXT_ENDINGS, PARQUET):
        raise UserError(f"{path}: only .txt, .jsonl and .parquet are read: convert it or rename it")
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
