"""Lists and downloads the files of a dataset on the Hugging Face Hub.

A download is resumed where it was interrupted, by the network or by the end of the process, and its
sha256 is compared with the published one. `hf_hub_download` of huggingface_hub 2 keeps no partial
file after its process ends, so this calls `http_get`, the transfer function below it.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, filter_repo_objects
from tqdm import tqdm

from common.errors import MALFORMED_ANSWER, UserError, one_line, printable
from common.files import file_sha256, locked, named_errors

TIMEOUT = 30  # seconds without an answer
CHUNK_BYTES = 1 << 20  # received bytes that do not fill a chunk are lost with the connection
WAITS = (1, 2, 4, 8, 15, 30, 60, 60, 60)  # seconds before each retry

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset repository at one commit; `sha256` is None for one not kept by LFS."""

    repo_id: str
    commit: str
    name: str
    bytes: int
    sha256: str | None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)  # below `download_dir`
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in self.name
            or not self.name.isprintable()
        ):
            raise ValueError(f"the file name {self.name!r}")
        if not isinstance(self.bytes, int) or self.bytes < 0:
            raise ValueError(f"the size {self.bytes!r} of {self.name}")

    @property
    def url(self) -> str:
        return hf_hub_url(self.repo_id, self.name, repo_type="dataset", revision=self.commit)


def dataset_files(repo_id: str, config_name: str, revision: str) -> list[HubFile]:
    """The Parquet files of the train split of a configuration, sorted by name.

    `config_name` is one of those in the dataset's card; "" selects every Parquet file. Raises
    UserError if the Hub cannot be reached or has no such dataset, revision or configuration.
    """
    what = f"{repo_id} at revision {revision}"

    def list_files() -> list[HubFile]:
        info = HfApi().dataset_info(
            repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT
        )
        patterns = train_patterns(info.card_data, repo_id, config_name) if config_name else ["*"]
        siblings = {sibling.rfilename: sibling for sibling in info.siblings}
        files = [
            HubFile(repo_id, info.sha, name, siblings[name].size, lfs.sha256 if lfs else None)
            for name in filter_repo_objects(sorted(siblings), allow_patterns=patterns)
            if name.endswith(".parquet")
            for lfs in [siblings[name].lfs]
        ]
        if not files:
            patterns = ", ".join(patterns)
            raise UserError(f"{what} has no Parquet files {patterns}: check --config_name")
        return files

    return retry(list_files, what, WAITS[:4])


def train_patterns(card: Any, repo_id: str, config_name: str) -> list[str]:
    """The file patterns of a configuration's train split, from the dataset's card.

    `data_files` there is a pattern, a list of patterns, {split: pattern or patterns}, or a list of
    {"split", "path"}.
    """
    configs = {config["config_name"]: config for config in getattr(card, "configs", None) or []}
    if config_name not in configs:
        names = ", ".join(list(configs)[:8]) + (", ..." if len(configs) > 8 else "")
        raise UserError(f"{repo_id} has no config_name '{config_name}' (known: {names or 'none'})")
    files = configs[config_name].get("data_files") or []
    if isinstance(files, list) and all(isinstance(entry, dict) for entry in files):
        files = [entry["path"] for entry in files if entry.get("split") == "train"]
    elif isinstance(files, dict):
        files = files.get("train", [])
    files = [files] if isinstance(files, str) else files
    return [path for entry in files for path in ([entry] if isinstance(entry, str) else entry)]


def download(file: HubFile, path: Path) -> Path:
    """Downloads `file` to `path`, unless it is there already, and verifies its sha256.

    What has arrived is kept in `path`.incomplete. Raises UserError if the Hub refuses, and when the
    retries are used up.
    """
    if is_whole(path, file):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".incomplete")

    def transfer() -> None:
        if partial.exists() and partial.stat().st_size > file.bytes:
            partial.unlink()
        constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES  # of http_get, by default 10 MiB
        with open(partial, "ab") as target:
            try:
                http_get(
                    file.url,
                    target,
                    resume_size=target.tell(),
                    headers=build_hf_headers(),
                    expected_size=file.bytes,
                    displayed_filename=file.name,
                )
            except HfHubHTTPError as error:
                if error.response.status_code != 416:
                    raise
                target.truncate(0)
                raise OSError("the file there is shorter than what has arrived") from None
        if not is_whole(partial, file):
            partial.unlink()
            raise OSError("it does not have the sha256 that the hub publishes")

    # Two processes may share `download_dir`.
    lock_file = path.with_name(path.name + ".lock")
    with named_errors(path), locked(path, "download", wait=True, lock_file=lock_file):
        if not is_whole(path, file):
            retry(transfer, f"{file.repo_id}/{file.name}", WAITS)
            os.replace(partial, path)
    return path


def is_whole(path: Path, file: HubFile) -> bool:
    if not path.exists() or path.stat().st_size != file.bytes:
        return False
    return file.sha256 is None or file_sha256(path) == file.sha256


def retry(action: Callable[[], Result], what: str, waits: Sequence[float]) -> Result:
    """The result of `action`, retried after each of `waits` on errors of the network or the Hub.

    The Hub's own functions retry a broken connection and HTTP 429 for some seconds, but no other
    server error. Prints each retry to stderr. Raises UserError when the retries are used up, and
    at once for an error that a retry would not change.
    """
    for wait in (*waits, None):
        try:
            return action()
        except OfflineModeIsEnabled:
            raise UserError(f"cannot fetch {what}: HF_HUB_OFFLINE is set, unset it") from None
        except (HTTPError, OSError) as error:
            is_network_error = isinstance(error, (HTTPError, ConnectionError, TimeoutError))
            if not is_network_error and error.errno:  # such as a full disk
                raise
            response = getattr(error, "response", None)
            status = response.status_code if response is not None else 500
            if status < 500 and status not in (408, 429):
                raise UserError(
                    f"the hub has no {what}, or not for you: check the name, or set HF_TOKEN "
                    f"(HTTP {status})"
                ) from None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if wait is None:
                raise UserError(
                    f"cannot fetch {what} from {constants.ENDPOINT} ({reason}): check the network "
                    "and run again, what has arrived is kept"
                ) from None
        except UserError:
            raise
        except MALFORMED_ANSWER as error:
            raise UserError(
                f"cannot read what {constants.ENDPOINT} says about {what} ({one_line(error)}): "
                "check HF_ENDPOINT, the dataset's card, and whether the network wants a log-in"
            ) from None
        tqdm.write(printable(f"{what}: {reason}; trying again in {wait} s"), file=sys.stderr)
        time.sleep(wait)
