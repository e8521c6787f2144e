"""Files of a dataset on the Hugging Face Hub: which there are, and fetching them.

A fetch goes on where an earlier one was cut off, be it by the network or by `kill -9`; it is tried
again with growing waits, and what arrived is compared with the sha256 that the hub publishes.
`hf_hub_download` of huggingface_hub 2 keeps no part of a file after its process ends, so this uses
the function below it that does the transfer.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, filter_repo_objects, get_session
from tqdm import tqdm

from common.errors import UserError
from common.files import file_sha256, named_errors

TIMEOUT = 30  # seconds without an answer
WAITS = (1, 2, 4, 8, 15, 30, 60, 60, 60)  # seconds before another try without progress

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset repository at one commit; `sha256` is None for one not kept by LFS."""

    repo_id: str
    commit: str
    name: str
    bytes: int
    sha256: str | None

    @property
    def url(self) -> str:
        return hf_hub_url(self.repo_id, self.name, repo_type="dataset", revision=self.commit)


def dataset_files(repo_id: str, config_name: str, revision: str) -> list[HubFile]:
    """The Parquet files of the train split of a configuration, sorted by name.

    `config_name` is one of those that the dataset's card lists; "" stands for every Parquet file.
    Raises UserError if the hub cannot be reached or has no such dataset, revision or configuration.
    """
    api, what = HfApi(), f"{repo_id} at revision {revision}"
    info = retried(lambda: api.dataset_info(repo_id, revision=revision, timeout=TIMEOUT), what)
    patterns = train_patterns(info.card_data, repo_id, config_name) if config_name else ["*"]
    every = sorted(sibling.rfilename for sibling in info.siblings)
    chosen = filter_repo_objects(every, allow_patterns=patterns)
    names = [name for name in chosen if name.endswith(".parquet")]
    files = []
    for start in range(0, len(names), 100):
        some = names[start : start + 100]
        entries = retried(
            lambda some=some: api.get_paths_info(
                repo_id, some, revision=info.sha, repo_type="dataset"
            ),
            what,
        )
        for entry in sorted(entries, key=lambda entry: entry.path):
            sha256 = entry.lfs.sha256 if entry.lfs else None
            files.append(HubFile(repo_id, info.sha, entry.path, entry.size, sha256))
    if not files:
        raise UserError(f"{what} has no Parquet files {', '.join(patterns)}: check --config_name")
    return files


def train_patterns(card: Any, repo_id: str, config_name: str) -> list[str]:
    """The file patterns of a configuration's train split, from the dataset's card."""
    configs = {config["config_name"]: config for config in getattr(card, "configs", None) or []}
    if config_name not in configs:
        known = ", ".join(list(configs)[:8]) + (", ..." if len(configs) > 8 else "")
        raise UserError(f"{repo_id} has no config_name '{config_name}' (known: {known or 'none'})")
    files = configs[config_name].get("data_files") or []
    if isinstance(files, list) and all(isinstance(entry, dict) for entry in files):
        files = [entry["path"] for entry in files if entry.get("split") == "train"]
    elif isinstance(files, dict):
        files = files.get("train", [])
    files = [files] if isinstance(files, str) else files
    return [path for entry in files for path in ([entry] if isinstance(entry, str) else entry)]


def fetch(file: HubFile, path: Path) -> Path:
    """Downloads `file` to `path`, or finds it there; complete and with the right sha256.

    The part that has arrived lies in `path`.incomplete. Raises UserError when the hub says no, and
    when nothing arrives for some minutes; what is there stays for the next run.
    """
    if path.exists() and matches(path, file):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".incomplete")

    def size() -> int:
        return partial.stat().st_size if partial.exists() else 0

    def transfer() -> None:
        if size() > file.bytes:
            partial.unlink()
        with named_errors(path), open(partial, "ab") as target:
            http_get(
                file.url,
                target,
                resume_size=size(),
                headers=build_hf_headers(),
                expected_size=file.bytes,
                displayed_filename=file.name,
            )

    for _ in range(3):
        retried(transfer, f"{file.repo_id}/{file.name}", progress=size)
        if matches(partial, file):
            os.replace(partial, path)
            return path
        partial.unlink()
    raise UserError(
        f"{file.url} does not have the sha256 that the hub publishes, in 3 downloads: try later, "
        "or look for a proxy that changes it"
    )


def matches(path: Path, file: HubFile) -> bool:
    if path.stat().st_size != file.bytes:
        return False
    return file.sha256 is None or file_sha256(path) == file.sha256


def retried(
    action: Callable[[], Result], what: str, progress: Callable[[], int] | None = None
) -> Result:
    """The result of `action`, tried again after errors of the network or the server.

    The waits grow until `progress`, of a transfer, has grown in between; a question without a
    transfer is given up sooner. Says on stderr what it waits for. UserError when the waits are used
    up, and at once for what another try would not change.
    """
    waits, seen = iter(WAITS if progress else WAITS[:4]), 0
    while True:
        try:
            get_session().timeout = TIMEOUT  # of the calls that do not bring one
            return action()
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise UserError(
                f"the hub has no {what}, or not for you: check the name, or set HF_TOKEN "
                f"({type(error).__name__})"
            ) from None
        except OfflineModeIsEnabled:
            raise UserError(f"cannot fetch {what}: HF_HUB_OFFLINE is set, unset it") from None
        except (httpx2.HTTPError, OSError) as error:  # HfHubHTTPError is both
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is None and isinstance(error, OSError) and is_of_this_machine(error):
                raise
            # The address of a transfer is signed for some time, and may expire with a 403.
            passing = (403, 408, 416, 429) if progress else (408, 416, 429)
            if status is not None and status < 500 and status not in passing:
                hint = "check HF_TOKEN" if status in (401, 403) else "try later"
                raise UserError(f"the hub refuses {what} (HTTP {status}): {hint}") from None
            if progress and progress() > seen:
                waits, seen = iter(WAITS), progress()
            wait = next(waits, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if wait is None:
                raise UserError(
                    f"cannot fetch {what} from {constants.ENDPOINT} ({reason}): check the network "
                    "and run again, what has arrived is kept"
                ) from None
            tqdm.write(f"{what}: {reason}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def is_of_this_machine(error: OSError) -> bool:
    """Whether an error is of the disk, such as a full one, and not of the network."""
    return bool(error.errno) and not isinstance(error, (ConnectionError, TimeoutError))
