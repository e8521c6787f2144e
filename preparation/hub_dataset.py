"""Reads examples from a dataset of the Hugging Face Hub, or a folder like one, through `datasets`.

`datasets` keeps what it fetched in its cache (HF_HOME), as Arrow files that are memory-mapped; a
dataset is read from there when there is no network. It takes seconds to import, so that is done
only where it is used.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.errors import UserError
from common.files import file_sha256
from common.settings import NO_ROOM
from preparation.example_readers import Example, example_columns, table_example
from preparation.parquet import ParquetFile

BATCH_ROWS = 512


class HubDataset:
    """A split of a dataset `owner/name` of the hub, or of a local folder in the form of one.

    `config_name` and `revision` may be "", for the default one and the newest; `split` may be all
    that `datasets` takes, such as "train[:1000]". Fetches what is not in the cache yet. Raises
    UserError if that cannot be, and if the columns are not those of examples.
    """

    unit = " rows"

    def __init__(self, name: str, config_name: str, split: str, revision: str):
        self.name, self.split, self.is_local = name, split, os.path.isdir(name)
        check_names(name, split, revision)
        import datasets
        from datasets.packaged_modules.cache.cache import Cache
        from datasets.packaged_modules.parquet.parquet import Parquet

        # An error is one line, from here; a README without settings is none.
        datasets.logging.set_verbosity(logging.CRITICAL)
        logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        # The steps of datasets.load_dataset: the builder knows the commit and the files.
        with clear_errors(name):
            builder = datasets.load_dataset_builder(
                name, config_name or None, revision=revision or None
            )
            self.config_name, self.commit = builder.config.name, builder.hash
            self.data_files = builder.config.data_files or {}
            if isinstance(builder, Cache):
                self.check_cached(revision)
            self.check_split(builder.info.splits or self.data_files)
            if self.data_files and not self.is_local and not os.path.isdir(builder.cache_dir):
                self.fetch()
            if isinstance(builder, Parquet):
                read_in_batches(builder)
            builder.download_and_prepare()
        try:
            dataset = builder.as_dataset(split)
        except ValueError as error:
            raise UserError(f"hf_split={split}: {error}: correct it") from None
        columns = example_columns(dataset.column_names, str(self))
        self.dataset = dataset.select_columns(columns)
        self.size, self.bytes = self.dataset.num_rows, self.dataset.data.nbytes

    def __str__(self) -> str:
        return f"{self.name}, split {self.split}"

    def split_names(self) -> list[str]:
        """The splits that `split` speaks of: ["train", "test"] for "train[:10]+test"."""
        return [part.partition("[")[0].strip() for part in self.split.split("+")]

    def check_split(self, known: Any) -> None:
        """UserError, before the download, if the dataset has no such split."""
        for name in self.split_names():
            if name not in known and name != "all":
                raise UserError(
                    f"{self.name} has no split '{name}': set --hf_split to one of "
                    f"{', '.join(map(str, known))}"
                )

    def check_cached(self, revision: str) -> None:
        """Says that the newest commit in the cache is read; UserError if another one is wanted."""
        if revision not in ("", "main", self.commit):
            raise UserError(
                f"the hub cannot be asked for {self.name} and the newest in the cache is commit "
                f"{self.commit}, not {revision}: check the network, unset HF_HUB_OFFLINE if it is "
                "set, or leave hf_revision empty"
            )
        print(
            f"note: cannot ask the hub for {self.name}, reading commit {self.commit} of the cache"
        )

    def fetch(self) -> None:
        """Downloads the files to the cache, where `datasets` looks for them.

        Tried again after errors of the network, and checked against the sha256 that the hub
        publishes. UserError if that is of no use.
        """
        from huggingface_hub import HfApi, hf_hub_download

        from preparation.hub_download import retried

        base = f"hf://datasets/{self.name}@{self.commit}/"
        urls = [str(url) for files in self.data_files.values() for url in files]
        names = [url.removeprefix(base) for url in urls if url.startswith(base)]
        at = {"repo_type": "dataset", "revision": self.commit}
        published = retried(lambda: HfApi().get_paths_info(self.name, names, **at), self.name)
        for file in published:
            for again in (False, True, True):
                path = retried(
                    lambda name=file.path, again=again: hf_hub_download(
                        self.name, name, force_download=again, **at
                    ),
                    f"{self.name}/{file.path}",
                )
                if not file.lfs or file_sha256(path) == file.lfs.sha256:
                    break
            else:
                raise UserError(
                    f"{self.name}/{file.path} does not have the sha256 that the hub publishes, in "
                    "3 downloads: try later, or look for a proxy that changes it"
                )

    def examples(self, advance: Callable[[int], Any]) -> Iterator[Example]:
        """Yields the examples in the order of the split, and tells `advance` the rows read."""
        number, batches = 0, self.dataset.iter(BATCH_ROWS)
        while True:
            with clear_errors(f"{self}, from row {number} on"):
                columns = next(batches, None)
            if columns is None:
                return
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                yield table_example(row, f"{self}, row {number}")
                advance(1)
                number += 1

    def sources(self) -> list[dict[str, Any]]:
        """What was read: a commit of the hub, or the files of a local folder."""
        where = {"config": self.config_name, "split": self.split}
        if not self.is_local:
            return [{"name": self.name, **where, "commit": self.commit, "rows": self.size}]
        splits = set(self.data_files if "all" in self.split_names() else self.split_names())
        base, sources = Path(self.name).resolve(), []
        for path in sorted(Path(path) for split in splits for path in self.data_files[split]):
            name = path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
            facts = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            sources.append({"name": name, **where, **facts})
        return sources


def check_names(name: str, split: str, revision: str) -> None:
    """UserError unless `name` is a dataset of the hub or a folder, and the others fit it."""
    if not split.strip():
        raise UserError("hf_split is empty: name a split, such as --hf_split=train")
    if not os.path.isdir(name):
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(name)
            named = "/" in name  # datasets takes "csv" for all .csv files of the current folder
        except HFValidationError:
            named = False
        if not named:
            raise UserError(f"hf_dataset={name} is neither a folder nor owner/name, as on the hub")
    elif revision:
        raise UserError(f"hf_revision is for datasets of the hub, {name} is a folder: leave it out")
    elif os.path.exists(os.path.join(name, "state.json")):
        raise UserError(
            f"{name} was written by save_to_disk: read it with datasets.load_from_disk and write "
            "it with to_parquet"
        )


def read_in_batches(builder: Any) -> None:
    """Has `datasets` read Parquet files a batch at a time; by itself it holds a whole file."""
    from datasets.builder import Key

    def generate_tables(files: Any, row_groups_list: Any) -> Iterator[tuple[Any, pa.Table]]:
        for i, path in enumerate(files):
            file = ParquetFile(path, {})
            file.columns = None  # all of them, as others may use the same cache
            for j, (_, _, batch) in enumerate(file.batches()):
                yield Key(i, j), builder._cast_table(pa.Table.from_batches([batch]))
            file.close()

    builder._generate_tables = generate_tables  # the hook that each format has


@contextmanager
def clear_errors(what: str) -> Iterator[None]:
    """Turns whatever `datasets` raises over somebody's files into one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for cause in chain_of(error):
            if isinstance(cause, UserError):
                raise cause from None
            if isinstance(cause, OSError) and cause.errno in NO_ROOM:
                cause.filename = cause.filename or os.environ.get("HF_HOME", "the cache, HF_HOME")
                raise cause from None
        raise UserError(f"cannot read {what}: {explanation(error)}") from None


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    seen = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def explanation(error: Exception) -> str:
    """What went wrong and what to do, in one line."""
    from datasets import config
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    reason = " ".join(str(error).split())[:300].rstrip(".") or "no reason given"
    if isinstance(error, DatasetNotFoundError):
        return f"{reason}: check hf_dataset and hf_revision, or set HF_TOKEN"
    for cause in chain_of(error):
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status == 429 or status >= 500:
                return f"the hub answers with HTTP {status}: try later"
        elif isinstance(cause, (TransportError, ConnectionError, TimeoutError)):
            if config.HF_HUB_OFFLINE:
                return "it is not in the cache, and HF_HUB_OFFLINE is set: unset it"
            return f"no connection to {config.HF_ENDPOINT}: check the network and run again"
    if "onfig" in reason and "vailable" in reason:
        return f"{reason.partition(' Example')[0].rstrip('.')}: set --hf_config"
    return (
        f"{reason} ({type(error).__name__}): look at its files; if a download is damaged, delete "
        f"it from {config.HF_CACHE_HOME} and run again"
    )
