"""Examples from a dataset of the Hugging Face Hub, or from a folder in the same form.

The library `datasets` does the work. It keeps its files in a cache (HF_HOME), as memory-mapped
Arrow files, and reads them from there when there is no network. Importing it takes seconds, so it
is imported where it is used.
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
from preparation.local_files import LocalFile
from preparation.parquet import ParquetFile

BATCH_ROWS = 512


class HubDataset:
    """One split of the dataset `owner/name` of the Hub, or of a local folder in the same form.

    `config_name` and `revision` may be "", for the default configuration and the newest commit;
    `split` is any split expression of `datasets`, such as "train[:1000]". Downloads what is not in
    the cache. Raises UserError if the dataset cannot be read or has no columns with examples.
    """

    unit = " rows"

    def __init__(self, name: str, config_name: str, split: str, revision: str):
        self.name, self.split, self.is_local = name, split, os.path.isdir(name)
        if not split.strip():
            raise UserError("hf_split is empty: name a split, such as --hf_split=train")
        if not self.is_local and "/" not in name:  # `datasets` takes "csv" for a file format
            raise UserError(f"hf_dataset={name} is neither a folder nor owner/name, as on the hub")
        if self.is_local and revision:
            raise UserError(
                f"hf_revision is for datasets of the hub, {name} is a folder: leave it out"
            )
        import datasets
        from datasets.packaged_modules.cache.cache import Cache
        from datasets.packaged_modules.parquet.parquet import Parquet

        datasets.logging.set_verbosity(logging.CRITICAL)  # an error is one line, printed by us
        logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        with one_line_errors(name):
            builder = datasets.load_dataset_builder(
                name, config_name or None, revision=revision or None
            )
            self.config_name, self.commit = builder.config.name, builder.hash
            self.data_files = builder.config.data_files or {}
            paths = (path for paths in self.data_files.values() for path in paths)
            self.files = {path: self.local_file(path) for path in paths} if self.is_local else {}
            if isinstance(builder, Cache):
                self.check_cached(revision)
            elif not self.is_local and not os.path.isdir(builder.cache_dir):
                self.download()
            if isinstance(builder, Parquet):
                read_in_batches(builder)
            builder.download_and_prepare()
            dataset = builder.as_dataset(split)
        self.dataset = dataset.select_columns(example_columns(dataset.column_names, str(self)))
        self.size, self.bytes = self.dataset.num_rows, self.dataset.data.nbytes

    def __str__(self) -> str:
        return f"{self.name}, split {self.split}"

    def local_file(self, path: str) -> LocalFile:
        root, path = Path(self.name).resolve(), Path(path)
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        return LocalFile.at(path, name)

    def check_cached(self, revision: str) -> None:
        """UserError if `revision` is not the newest commit in the cache, the only one readable."""
        if revision not in ("", "main", self.commit):
            raise UserError(
                f"the hub cannot be asked for {self.name} and the newest in the cache is commit "
                f"{self.commit}, not {revision}: check the network, unset HF_HUB_OFFLINE if it is "
                "set, or leave hf_revision empty"
            )
        print(
            f"note: cannot ask the hub for {self.name}, reading commit {self.commit} of the cache"
        )

    def download(self) -> None:
        """Downloads the data files to the Hub's cache, where `datasets` looks for them.

        `datasets` neither retries after a server error nor compares the sha256. UserError if the
        retries are used up.
        """
        from huggingface_hub import hf_hub_download

        from preparation.hub_download import WAITS, retry

        prefix = f"hf://datasets/{self.name}@{self.commit}/"

        def download_file(name: str) -> None:
            path = hf_hub_download(
                self.name, name, repo_type="dataset", revision=self.commit, library_name="datasets"
            )
            blob = Path(path).resolve()  # a file kept by LFS is called by its sha256
            if len(blob.name) == 64 and file_sha256(blob) != blob.name:
                blob.unlink()
                raise OSError("it does not have the sha256 that the hub publishes")

        for url in map(str, (url for urls in self.data_files.values() for url in urls)):
            if url.startswith(prefix):
                name = url.removeprefix(prefix)
                retry(lambda name=name: download_file(name), f"{self.name}/{name}", WAITS[:4])

    def examples(self, advance: Callable[[int], Any]) -> Iterator[Example]:
        """Yields the examples in the order of the split; calls `advance` with the rows read."""
        number, batches = 0, self.dataset.iter(BATCH_ROWS)
        while True:
            with one_line_errors(f"{self}, from row {number} on"):
                columns = next(batches, None)
            if columns is None:
                return
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                yield table_example(row, f"{self}, row {number}")
                advance(1)
                number += 1

    def sources(self) -> list[dict[str, Any]]:
        """The manifest's entries: a commit of the Hub, or the files of a local folder."""
        split = {"config": self.config_name, "split": self.split}
        if not self.is_local:
            return [{"name": self.name, **split, "commit": self.commit, "rows": self.size}]
        # ["train", "test"] for "train[:10]+test"
        names = [term.partition("[")[0].strip() for term in self.split.split("+")]
        names = self.data_files if "all" in names else set(names)
        paths = sorted(path for name in names for path in self.data_files[name])
        return [{"name": "", **split, **self.files[path].source()} for path in paths]


def read_in_batches(builder: Any) -> None:
    """Makes a Parquet builder of `datasets` read small batches.

    By default `datasets` decodes a whole row group, with any `batch_size` and
    `fragment_scan_options`: 250 MB for a row group of 118 MB with pyarrow 26.
    """
    from datasets.builder import Key

    def generate_tables(files: Any, row_groups_list: Any) -> Iterator[tuple[Any, pa.Table]]:
        for i, path in enumerate(files):
            file = ParquetFile(path, {})
            file.columns = None  # all of them, as other programs may use the same cache
            for j, (_, _, batch) in enumerate(file.batches()):
                yield Key(i, j), builder._cast_table(pa.Table.from_batches([batch]))
            file.close()

    builder._generate_tables = generate_tables  # the method that each format implements


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turns any error of `datasets` over a user's files into a UserError with its message."""
    try:
        yield
    except Exception as error:
        from datasets import config
        from datasets.exceptions import DatasetGenerationError

        if isinstance(error, DatasetGenerationError):
            error = error.__cause__ or error  # the outer message is always the same
        if isinstance(error, UserError):
            raise error from None
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            error.filename = error.filename or str(config.HF_CACHE_HOME)
            raise error from None
        message = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"cannot read {what}: {message}: check hf_dataset, hf_config, hf_split and "
            "hf_revision, the files, the network and HF_TOKEN"
        ) from None
