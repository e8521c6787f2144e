"""Local input files: finding them by pattern, and noticing that one changes while it is read."""

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError, printable
from common.files import file_sha256


@dataclass(frozen=True)
class LocalFile:
    """A local input file as it was when it was listed."""

    path: Path
    name: str  # path relative to the common parent of the input files
    bytes: int
    modified: int  # nanoseconds

    @classmethod
    def at(cls, path: Path, name: str) -> "LocalFile":
        status = path.stat()
        return cls(path, name, status.st_size, status.st_mtime_ns)

    def refuse_if_rewritten(self) -> None:
        """UserError if the file has changed: what was read and its sha256 may not be of one file.

        Called after the file was both read and hashed.
        """
        if not self.path.is_file() or LocalFile.at(self.path, self.name) != self:
            raise UserError(
                f"{self.path} was changed while it was read: run again when nothing writes to it"
            )

    def source(self) -> dict[str, Any]:
        """The manifest's entry, after the file was read."""
        sha256 = file_sha256(self.path)
        self.refuse_if_rewritten()
        return {"name": self.name, "bytes": self.bytes, "sha256": sha256}


def local_files(pattern: str, setting: str = "source") -> list[LocalFile]:
    """The files that match a path, a folder or a pattern, sorted; UserError if there are none.

    `setting` is the name of the setting with the pattern, for the error message.
    """
    try:
        path = Path(pattern).expanduser()
    except RuntimeError as error:  # "~nobody"
        raise UserError(f"--{setting}={pattern}: {error}: give a path") from None
    if path.is_dir():
        matches = path.glob("*.parquet")
    elif path.exists():  # though its name may look like a pattern
        matches = [path]
    else:
        matches = expand(path)
    paths = once_each(path for path in matches if path.is_file())
    if not paths:
        matches = f"no files match --{setting}={pattern}"
        if path.is_dir():
            raise UserError(f"{matches}/*.parquet: give a pattern, such as {pattern}/*.jsonl")
        raise UserError(f"{matches}: give a folder or a pattern")
    parent = Path(os.path.commonpath([path.parent for path in paths]))
    return [LocalFile.at(path, path.relative_to(parent).as_posix()) for path in paths]


def expand(pattern: Path) -> list[Path]:
    """The paths that match, as with glob.glob, except that `**` does not enter a loop of links."""
    paths = [Path(pattern.anchor)]
    parts = pattern.parts[1 if pattern.anchor else 0 :]
    for part in [*parts, "*"] if parts[-1] == "**" else parts:
        if part == "**":
            paths = [folder for path in paths for folder in folders_below(path)]
        else:
            paths = [path / name for path in paths for name in glob.glob(part, root_dir=path)]
    return paths


def folders_below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """`folder` and those below it, except hidden ones and links to one of the folders `above`."""
    with suppress(OSError):  # a folder that cannot be read, as with glob.glob
        status = folder.stat()
        if not folder.is_dir() or (status.st_dev, status.st_ino) in above:
            return
        yield folder
        above = (*above, (status.st_dev, status.st_ino))
        for name in sorted(os.listdir(folder)):
            if not name.startswith("."):
                yield from folders_below(folder / name, above)


def once_each(paths: Iterable[Path]) -> list[Path]:
    """The paths, sorted, of which only the shortest is kept where several lead to one file."""
    unique: dict[Any, Path] = {}
    repeated = []
    for path in sorted(set(paths), key=lambda path: (len(path.parts), path)):
        status = path.stat()
        identity = (status.st_dev, status.st_ino) if status.st_ino else path  # 0: unknown
        first = unique.setdefault(identity, path)
        if first != path:
            repeated.append(f"{path} is {first}")
    if repeated:
        more = f" and {len(repeated) - 1} more like it" if len(repeated) > 1 else ""
        print(printable(f"note: the same file is read only once: {repeated[0]}{more}"))
    return sorted(unique.values())
