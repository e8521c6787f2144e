"""The input files of a preparation: local Parquet files, or those of a dataset on the Hub."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import check_free_space, file_sha256
from preparation import hub_download
from preparation.local_files import LocalFile, local_files

InputFile = LocalFile | hub_download.HubFile


def is_local(source: str) -> bool:
    """Whether `source` is a path: a Hub dataset is called owner/name and is no folder here."""
    is_repo_id = source.count("/") == 1 and not any(mark in source for mark in "*?[\\~:")
    is_path = source.endswith(".parquet") or os.path.exists(source) or source[0] in "./"
    return not is_repo_id or is_path


def input_files(config: Any) -> list[InputFile]:
    """The files that `source`, `config_name` and `revision` select; UserError if there are none."""
    if is_local(config.source):
        return local_files(config.source)
    return hub_download.dataset_files(config.source, config.config_name, config.revision)


def files_identity(files: list[InputFile]) -> str:
    """A summary of the files' names and, where the Hub publishes them, sha256s."""
    contents = json.dumps([[file.name, getattr(file, "sha256", None)] for file in files])
    first, last = files[0].name, files[-1].name
    return f"{len(files)}, {first} to {last}, {hashlib.sha256(contents.encode()).hexdigest()[:12]}"


def refuse_if_changed(sources: list[dict[str, Any] | None], files: list[InputFile]) -> None:
    """UserError if an input file differs from the one that was prepared (None: not prepared)."""
    for source, file in zip(sources, files, strict=True):
        if source and (source["bytes"] != file.bytes or is_rewritten(source, file)):
            raise UserError(
                f"{file.name} is not the file that was prepared, of {source['bytes']:,} bytes: put "
                "that one back, or choose another --output_dir"
            )


def is_rewritten(source: dict[str, Any], file: InputFile) -> bool:
    if "modified" not in source or source["modified"] == getattr(file, "modified", None):
        return False
    return file_sha256(file.path) != source["sha256"]


def check_disk(output: Path, config: Any, files: list[InputFile]) -> None:
    """Prints a note if the disk may fill up; UserError if not even one download fits.

    An estimate: a token takes 2 bytes and stands for about 3 bytes of text, which Parquet
    compresses to 0.6 (sample-10BT), and the parts of two files are stored twice for a while.
    """
    sizes = [file.bytes for file in files] or [0]
    needed = 0.7 / 0.6 * (sum(sizes) + 2 * max(sizes))
    if not is_local(config.source) and not config.download_dir:
        advice = "free some space or set --output_dir"
        check_free_space(output, max(sizes), "the largest download alone takes", advice)
        needed += min(4 * max(sizes), sum(sizes))
    advice = "if the disk fills up, make room and run the same command again"
    check_free_space(output, needed, "the dataset may need up to", advice, is_error=False)
