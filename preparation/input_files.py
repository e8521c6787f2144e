"""The input files of a preparation: local Parquet files, or those of a dataset on the hub."""

import glob
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import file_sha256
from preparation import hub_download
from preparation.parquet import STRING, ParquetFile


@dataclass(frozen=True)
class LocalFile:
    """A local input file; `name` is its path below the folder that all of them share."""

    path: Path
    name: str
    bytes: int


InputFile = LocalFile | hub_download.HubFile


def is_local(source: str) -> bool:
    """Whether `source` is a path: a hub dataset is called owner/name and is no folder here."""
    named = source.count("/") == 1 and not any(mark in source for mark in "*?[\\~:")
    return not named or source.endswith(".parquet") or os.path.exists(source) or source[0] in "./"


def local_files(pattern: str, setting: str = "source") -> list[LocalFile]:
    """The files that a path, a folder or a pattern stands for, sorted; UserError if none.

    `setting` is the name of the setting that has the pattern.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = path.glob("*.parquet")
    elif path.exists():  # though its name may look like a pattern
        found = [path]
    else:
        found = map(Path, glob.glob(str(path), recursive=True))
    paths = sorted({path for path in found if path.is_file()})
    if not paths:
        raise UserError(f"no files match --{setting}={pattern}: give a folder or a pattern")
    base = Path(os.path.commonpath([path.parent for path in paths]))
    return [LocalFile(p, p.relative_to(base).as_posix(), p.stat().st_size) for p in paths]


def input_files(config: Any) -> list[InputFile]:
    """What `source`, `config_name` and `revision` of a config stand for; UserError if nothing."""
    if is_local(config.source):
        return local_files(config.source)
    return hub_download.dataset_files(config.source, config.config_name, config.revision)


def files_identity(files: list[InputFile]) -> str:
    """The names and, where the hub says it, sha256s of the input files in a few words."""
    facts = json.dumps([[file.name, getattr(file, "sha256", None)] for file in files])
    first, last = files[0].name, files[-1].name
    return f"{len(files)}, {first} to {last}, {hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def refuse_if_changed(sources: list[dict[str, Any] | None], files: list[InputFile]) -> None:
    """UserError if an input file is not what it was when it was prepared (None: not yet)."""
    for source, file in zip(sources, files, strict=True):
        if source and (source["bytes"] != file.bytes or is_rewritten(source, file)):
            raise UserError(
                f"{file.name} is not the file that was prepared, of {source['bytes']:,} bytes: put "
                "that one back, or choose another --output_dir"
            )


def is_rewritten(source: dict[str, Any], file: InputFile) -> bool:
    if "modified" not in source or source["modified"] == modified(file):
        return False
    return file_sha256(file.path) != source["sha256"]


def modified(file: InputFile) -> int | None:
    """When a local file was last written, in nanoseconds."""
    return file.path.stat().st_mtime_ns if isinstance(file, LocalFile) else None


def note_little_room(output: Path, config: Any, files: list[InputFile]) -> None:
    """Says so if the disk may fill up with what `files` give, stops if no download fits.

    A token takes 2 bytes and stands for 3 to 4 bytes of text. In sample-10BT the text is compressed
    to 0.6 of its size; a local file says itself how much there is.
    """
    if not files:
        return
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    downloads = 0
    if is_local(config.source):
        texts = [text_bytes(file.path) for file in files]
    else:
        texts = [file.bytes / 0.6 for file in files]
        sizes = [file.bytes for file in files]
        if not config.download_dir:
            downloads = min(4 * max(sizes), sum(sizes))
        if downloads and free < sizes[0]:
            raise UserError(
                f"{there} has {free / 1e9:,.2f} GB free, {files[0].name} alone takes "
                f"{sizes[0] / 1e9:,.2f} GB: free some space or set --output_dir"
            )
    needed = 0.7 * (sum(texts) + 2 * max(texts)) + downloads
    if free < needed:
        print(
            f"note: {there} has {free / 1e9:,.2f} GB free, up to {needed / 1e9:,.2f} GB may be "
            "needed; if it fills up, make room and run the same command again"
        )


def text_bytes(path: Path) -> int:
    try:
        return ParquetFile(path, {"text": STRING}).uncompressed_bytes()
    except UserError:  # it will be said when it is this file's turn
        return 0
