"""benchmark.py --section=data: Parquet files of text into token shards, and the tokenizers alone.

Preparing is measured on the same files by processes of their own, in turn; what counts is the time
inside each from the end of its imports to the last file on disk, and its memory. The first
contestant is what people write first: one thread, `encode_ordinary` on each document, Python lists,
one np.savez at the end. Both read the same columns and drop the same documents.
"""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import timing
from benchmarks.tokenizing_worker import CONTESTANTS, OURS, tiktoken_encoding
from common.errors import UserError
from dataset import NpzDataset
from preparation.input_files import local_files
from tokenizer import load_tokenizer

CHUNK_BYTES = 4_000_000  # of text in one call of a tokenizer; gigatoken uses one core below 2 MB
CHUNKS = 8
ROOT = Path(__file__).parents[1]
LIBRARY = Path(sysconfig.get_path("stdlib"))


def make_source(folder: Path, library: Path = LIBRARY) -> list[Path]:
    """The Python library's source files as four Parquet files in FineWeb's columns."""
    texts = []
    for path in sorted(library.rglob("*.py")):
        text = path.read_bytes().decode("utf-8", "ignore")
        if text.strip() and "site-packages" not in path.parts:
            texts.append(text)
    paths = []
    for i in range(4):
        some = texts[i::4]
        columns = {
            "text": some,
            "id": [hashlib.sha256(text.encode()).hexdigest() for text in some],
            "language": ["en"] * len(some),
            "language_score": [1.0] * len(some),
            "int_score": [3] * len(some),
        }
        paths.append(folder / f"{i}.parquet")
        pq.write_table(pa.table(columns), paths[-1], row_group_size=1000)
    return paths


def documents_of(output: Path) -> Counter[bytes]:
    """A hash of every document, with how often it is there."""
    shards = [NpzDataset(path) for path in sorted(output.glob("*.npz"))]
    return Counter(
        hashlib.blake2b(shard[i].tobytes(), digest_size=16).digest()
        for shard in shards
        for i in range(len(shard))
    )


def prepare(name: str, folder: Path, output: Path, with_filters: bool) -> dict[str, float]:
    """{"seconds", "peak_mb"} of one contestant in a new process."""
    settings = {"contestant": name, "source": folder, "output_dir": output, "filters": with_filters}
    command = [sys.executable, "-m", "benchmarks.tokenizing_worker"]
    command += [f"--{key}={value}" for key, value in settings.items()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise UserError(f"{name} failed: {lines[-1] if lines else result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def compare_preparing(originals: list[Path], times: int, config: Any, directory: Path) -> None:
    """The contestants on `times` copies of the files; UserError if their documents differ."""
    folder = directory / f"source{times}"
    folder.mkdir()
    for number in range(times):
        for path in originals:
            os.symlink(path.resolve(), folder / f"{number:03d}_{path.name}")
    names = [name for name in CONTESTANTS if name == OURS or timing.peer("tiktoken")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    documents = []
    for turn in range(min(3, config.rounds)):
        for number, name in enumerate(names):
            output = directory / f"output_{times}_{turn}_{number}"
            found[name].append(prepare(name, folder, output, config.filters))
            if turn == 0:
                documents.append(documents_of(output))
    if any(others != documents[0] for others in documents):
        raise UserError("the two do not have the same documents: something is wrong")
    megabytes = json.loads((output / "manifest.json").read_bytes())["text_bytes"] / 1e6
    kept = "after the filters" if config.filters else "all kept"
    what = f"{len(originals) * times} files, {megabytes:,.1f} MB of text {kept}"
    seconds = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
    timing.report("data", f"prepare {what}, equal ids", seconds, work=("MB/s", megabytes))
    peaks = {name: {"peak MB": max(run["peak_mb"] for run in runs)} for name, runs in found.items()}
    timing.facts("data", f"memory to prepare {what}", peaks)


def texts_of(path: Path) -> Iterator[str]:
    for batch in pq.ParquetFile(path).iter_batches(1000, columns=["text"]):
        yield from filter(None, batch["text"].to_pylist())


def chunks_of(files: list[Path]) -> list[list[str]]:
    """Lists of documents, each of at least CHUNK_BYTES of text if there is so much."""
    chunks: list[list[str]] = [[]]
    size = 0
    for path in files:
        for text in texts_of(path):
            if size >= CHUNK_BYTES:
                if len(chunks) == CHUNKS:
                    return chunks
                chunks.append([])
                size = 0
            chunks[-1].append(text)
            size += len(text.encode("utf-8", "ignore"))
    return chunks[:-1] if len(chunks) > 1 else chunks  # the last is shorter


def compare_tokenizers(files: list[Path], config: Any) -> None:
    """Documents in memory into ids; each call has text that the last one had not."""
    tokenizer, chunks = load_tokenizer(), chunks_of(files)
    hf = tokenizer._ordinary
    functions: dict[str, Callable[[list[str]], Any]] = {}
    if timing.peer("tiktoken"):
        encoding, cores = tiktoken_encoding(tokenizer), os.cpu_count() or 1
        functions["tiktoken, one thread"] = lambda texts: [*map(encoding.encode_ordinary, texts)]
        functions["tiktoken, batch, all cores"] = lambda texts: encoding.encode_ordinary_batch(
            texts, num_threads=cores
        )
    functions["tokenizers, batch, all cores"] = lambda texts: [
        found.ids for found in hf.encode_batch_fast(texts, add_special_tokens=False)
    ]
    functions[OURS] = tokenizer.encode_batch
    expected = tokenizer.encode_batch(chunks[0])
    for name, function in functions.items():
        if not all(map(np.array_equal, function(chunks[0]), expected)):
            raise UserError(f"{name} gives other ids than ours: something is wrong")

    def contestant(function: Callable[[list[str]], Any]) -> Callable[[], object]:
        endless = cycle(chunks)
        return lambda: function(next(endless))

    megabytes = sum(len(text.encode()) for chunk in chunks for text in chunk) / 1e6 / len(chunks)
    timing.compare(
        "data",
        f"tokenize {len(chunks)} x {megabytes:.1f} MB in memory, equal ids",
        {name: contestant(function) for name, function in functions.items()},
        config.rounds,
        work=("MB/s", megabytes),
    )


def run(config: Any, device: torch.device) -> None:
    """Tokenizers in this process, then whole preparations in processes of their own."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if config.source:
            originals = [file.path for file in local_files(config.source)]
        else:
            originals = make_source(directory)
        compare_tokenizers(originals, config)
        for times in map(int, config.repeats.split()):
            compare_preparing(originals, times, config, directory)
