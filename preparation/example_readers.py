"""Readers of the examples that prepare_dataset.py encodes: text, JSON lines and Parquet files."""

import glob
import json
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError, printable
from preparation.local_files import LocalFile, local_files
from tokenizer import END_OF_TEXT, START_OF_TEXT, check_messages, parse_chat, to_utf8

CHUNK_BYTES = 1 << 20  # read at a time
PARQUET = ".parquet"
COLUMNS = ("text", "messages", "question", "answer")

# ("text", str), ("chat", messages) or ("empty", None), and its position for an error message.
Example = tuple[str, Any, str]


class Input(Protocol):
    """The interface of TextFile, ParquetFiles and hub_dataset.HubDataset."""

    name: str
    size: int  # in `unit`s, for the progress bar
    unit: str
    bytes: int  # of text, about

    def examples(self, advance: Callable[[int], Any]) -> Iterator[Example]:
        """Yields the examples in order; calls `advance` with the number of units read."""

    def sources(self) -> list[dict[str, Any]]:
        """The manifest's entries; called after all examples are read."""


def split_file(
    path: Path, separator: bytes, advance: Callable[[int], Any]
) -> Iterator[tuple[int, str, bool]]:
    """Splits a UTF-8 file at a separator: yields (byte offset, text, whether it is the last one).

    Holds one text and one chunk in memory. Skips a byte order mark. Calls `advance` with the bytes
    of every chunk. Raises UserError with the byte offset for bytes that are not UTF-8.
    """

    def decode(offset: int, text: bytes) -> str:
        try:
            return text.decode("utf-8").removeprefix("\ufeff" if offset == 0 else "")
        except UnicodeDecodeError as error:
            position = offset + error.start
            raise UserError(
                f"{path}: not UTF-8 at byte {position}: save the file as UTF-8"
            ) from None

    buffer, offset, search_start = bytearray(), 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            advance(len(chunk))
            buffer += chunk
            start = 0
            while (end := buffer.find(separator, max(start, search_start))) >= 0:
                yield offset + start, decode(offset + start, buffer[start:end]), False
                start = end + len(separator)
            del buffer[:start]
            offset += start
            search_start = max(0, len(buffer) - len(separator) + 1)
    yield offset, decode(offset, buffer), True


def read_txt(path: Path, advance: Callable[[int], Any]) -> Iterator[Example]:
    """Yields the texts between `<|endoftext|>`; a blank one at the end of the file is skipped."""
    for offset, text, is_last in split_file(path, END_OF_TEXT.encode(), advance):
        text = text.strip()
        if text:
            yield "text", text, f"{path}, byte {offset}"
        elif not is_last:
            yield "empty", None, f"{path}, byte {offset}"


def read_chat_txt(path: Path, advance: Callable[[int], Any]) -> Iterator[Example]:
    """Yields the conversations of a file in the chat layout; only the last may lack its end."""
    texts = split_file(path, START_OF_TEXT.encode(), advance)
    for number, (offset, text, is_last) in enumerate(texts):
        if number > 0:
            position = f"{path}, example {number} at byte {offset - len(START_OF_TEXT)}"
            try:
                yield "chat", parse_chat(text, may_lack_end=is_last), position
            except ValueError as error:
                raise UserError(f"{position}: {error}: correct it") from None
        elif text.strip():
            raise UserError(
                f"{path} does not begin with {START_OF_TEXT}, as every example must with "
                "trust_control_tokens=True: correct the file, or leave that setting off"
            )


def read_jsonl(path: Path, advance: Callable[[int], Any]) -> Iterator[Example]:
    """Yields one example per line; blank lines are skipped."""
    for number, (_, line, _) in enumerate(split_file(path, b"\n", advance), 1):
        if not line.strip():
            continue
        try:
            kind, content = parse_example(json.loads(line))
            texts = [content] if kind == "text" else [turn["content"] for turn in content]
            for text in texts if "\\u" in line else ():  # an escape can spell half a character
                to_utf8(text)
        except (ValueError, RecursionError) as error:
            reason = str(error)
            if isinstance(error, RecursionError):
                reason = "JSON nested too deep"
            elif isinstance(error, json.JSONDecodeError):
                reason = f"not JSON ({error.msg} at column {error.colno})"
            elif "int_max_str_digits" in reason:  # Python reads integers of at most 4,300 digits
                reason = "a number is too long"
            is_array = line.lstrip().startswith("[")
            hint = "write one object a line, not one array" if is_array else "correct it"
            raise UserError(f"{path}, line {number}: {reason}: {hint}") from None
        yield kind, content, f"{path}, line {number}"


class TextFile:
    """A .txt or .jsonl file; `trusted` takes the control tokens in it as such, not as text."""

    unit = "B"

    def __init__(self, path: Path, trusted: bool):
        self.path, self.name = path, path.name
        self.file = LocalFile.at(path, path.name)
        self.size = self.bytes = self.file.bytes
        self.read = read_chat_txt if trusted else read_txt
        if path.suffix.lower() == ".jsonl":
            self.read = read_jsonl

    def __str__(self) -> str:
        return str(self.path)

    def examples(self, advance: Callable[[int], Any]) -> Iterator[Example]:
        return self.read(self.path, advance)

    def sources(self) -> list[dict[str, Any]]:
        return [self.file.source()]


def parse_example(row: Any) -> tuple[str, Any]:
    """The (kind, content) of one JSON row; ValueError if it has none of the three forms."""
    forms = '{"text"}, {"messages"} or {"question", "answer"}'
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, expected an object: {forms}")
    names = [name for name in ("text", "messages", "question") if name in row]
    if len(names) != 1:
        columns = " and ".join(names) or f"only {reprlib.repr(list(row))}"
        raise ValueError(f"expected exactly one of {forms}, found {columns}")
    if names == ["messages"]:
        check_messages(row["messages"])
        if row["messages"][-1]["role"] != "assistant":
            raise ValueError("the conversation ends with a user turn, without an answer")
        return "chat", row["messages"]
    for name in ("text",) if names == ["text"] else ("question", "answer"):
        if not isinstance(row.get(name), str):
            kind = type(row[name]).__name__ if name in row else "missing"
            raise ValueError(f'"{name}" is not a string but {kind}')
    if names == ["text"]:
        return "text", row["text"]
    return "chat", [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def example_columns(names: list[str], what: str | Path) -> list[str]:
    """The columns of a table that hold its examples; UserError unless they have one form."""
    forms = [name for name in ("text", "messages", "question") if name in names]
    if len(forms) != 1 or (forms == ["question"] and "answer" not in names):
        raise UserError(
            f"{what} has the columns {reprlib.repr(names)[1:-1]}, not exactly one of 'text', "
            "'messages' or 'question' with 'answer': rename or remove columns"
        )
    return [*forms, "answer"] if forms == ["question"] else forms


def table_example(row: dict[str, Any], position: str) -> Example:
    """The example of a table's row, which has the `example_columns`; a null counts as blank.

    Raises UserError, with `position`, for a row of another form.
    """
    if any(value is None or value == [] for value in row.values()):
        return "empty", None, position
    if isinstance(row.get("messages"), list):
        for message in row["messages"]:
            if isinstance(message, dict) and message.get("content", "") is None:
                message["content"] = ""
    try:
        return *parse_example(row), position
    except ValueError as error:
        raise UserError(f"{position}: {error}: correct the row, or leave it out") from None


class ParquetFiles:
    """Parquet files, of which only the example columns are read.

    Raises UserError, before any row is read, if a file is damaged or lacks those columns.
    """

    unit = " rows"

    def __init__(self, files: list[LocalFile]):
        self.files = files
        self.name = files[0].name if len(files) == 1 else f"{len(files)} files"
        self.size = self.bytes = 0
        for local in files:
            file = self.open(local.path)
            self.size += file.rows
            self.bytes += file.uncompressed_bytes()
            file.close()

    def __str__(self) -> str:
        first, n_more = self.files[0].path, len(self.files) - 1
        return f"{first} and {n_more} more" if n_more else str(first)

    def open(self, path: Path) -> Any:
        from preparation.parquet import ANY, ParquetFile  # pyarrow, which text does not need

        file = ParquetFile(path, dict.fromkeys(COLUMNS, ANY), optional=COLUMNS)
        file.columns = example_columns(file.names, path)
        return file

    def examples(self, advance: Callable[[int], Any]) -> Iterator[Example]:
        for local in self.files:
            file = self.open(local.path)
            for row, position in file.dict_rows():
                yield table_example(row, f"{local.path}, {position}")
                advance(1)
            file.close()

    def sources(self) -> list[dict[str, Any]]:
        return [file.source() for file in self.files]


def open_input(text: str, name: str, trusted: bool) -> TextFile | ParquetFiles:
    """Opens the file, folder or pattern `text`, the value of the setting `name`.

    Raises UserError if there is no such file, and for one that is empty or of another format.
    """
    path = Path(text)
    is_folder, suffix = path.is_dir(), path.suffix.lower()
    is_pattern = glob.has_magic(text) and not path.exists()
    if trusted and (is_pattern or is_folder or suffix in (".jsonl", PARQUET)):
        raise UserError(f"trust_control_tokens is for .txt files only: turn it off for {text}")
    if is_folder and not any(path.glob(f"*{PARQUET}")):
        raise UserError(
            f"{path} is a directory without {PARQUET} files: give {name} one .txt or .jsonl file, "
            f"or a pattern such as {path}/**/*{PARQUET}"
        )
    if is_pattern and suffix != PARQUET:
        raise UserError(f"{text}: a pattern must end with {PARQUET}: give {name} one such")
    if not is_pattern and not is_folder:
        if not path.exists():
            raise UserError(f"{path} does not exist: put your text there, or set --{name}=...")
        if not path.is_file():  # a pipe or a device, which cannot be opened twice or has no end
            raise UserError(f"{path} is not a regular file: write its content to one")
        if suffix not in (".txt", ".jsonl", PARQUET):
            raise UserError(
                f"{path}: only .txt, .jsonl and .parquet are read: convert it or rename it"
            )
        with open(path, "rb") as file:
            start = file.read(64).removeprefix(b"\xef\xbb\xbf")
        if not start:
            raise UserError(f"{path} is empty: put your text there")
        if not trusted and start.lstrip().startswith(START_OF_TEXT.encode()):
            print(
                f"note: {printable(path)} looks like the chat layout but is encoded as ordinary "
                "text; add --trust_control_tokens=True if you trust the file"
            )
        if suffix != PARQUET:
            return TextFile(path, trusted)
    return ParquetFiles(local_files(text, name))
