"""Data preparation speed: Parquet files of text into token shards, and the tokenizers alone.

    python benchmark.py --section=data

Preparations run in processes of their own, in turn, on the same files; the time is that inside each
from the end of its imports to the last file on disk. The baseline is a first version as people
write it: one thread, `encode_ordinary` on each document, Python lists, one np.savez at the end.
"""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.report import record_times
from benchmarks.timing import compare, peer
from benchmarks.tokenizing_worker import OURS, VARIANTS, tiktoken_encoding
from common.errors import UserError
from dataset import NpzDataset
from preparation.input_files import local_files
from tokenizer import load_tokenizer

CHUNK_BYTES = 4_000_000  # of text in one call of a tokenizer; gigatoken uses one core below 2 MB
MAX_CHUNKS = 8
ROOT = Path(__file__).parents[1]
LIBRARY = Path(sysconfig.get_path("stdlib"))


def make_source(folder: Path, library: Path = LIBRARY) -> list[Path]:
    """Source files of the Python library as four Parquet files in FineWeb's columns."""
    texts = []
    for path in sorted(library.rglob("*.py")):
        text = path.read_bytes().decode("utf-8", "ignore")
        if text.strip() and "site-packages" not in path.parts:
            texts.append(text)
    paths = [folder / f"{i}.parquet" for i in range(4)]
    for i, path in enumerate(paths):
        ids = [hashlib.sha256(text.encode()).hexdigest() for text in texts[i::4]]
        pq.write_table(pa.table({"text": texts[i::4], "id": ids}), path, row_group_size=1000)
    return paths


def document_hashes(output: Path) -> Counter[bytes]:
    """Hashes of the documents in all shards, with their counts."""
    shards = [NpzDataset(path) for path in sorted(output.glob("*.npz"))]
    return Counter(
        hashlib.blake2b(shard[i].tobytes(), digest_size=16).digest()
        for shard in shards
        for i in range(len(shard))
    )


def prepare(name: str, folder: Path, output: Path) -> dict[str, float]:
    """{"seconds", "peak_mb"} of one preparation in a new process."""
    command = [sys.executable, "-m", "benchmarks.tokenizing_worker", f"--variant={name}"]
    command += [f"--source={folder}", f"--output_dir={output}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise UserError(f"{name} failed: {lines[-1] if lines else result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def compare_preparing(originals: list[Path], config: Any, directory: Path) -> None:
    """Times preparations of `config.repeats` copies of the files; UserError if documents differ."""
    folder = directory / "source"
    folder.mkdir()
    for number in range(config.repeats):
        for path in originals:
            os.symlink(path.resolve(), folder / f"{number:03d}_{path.name}")
    names = [name for name in VARIANTS if name == OURS or peer("tiktoken")]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    hashes = []
    for turn in range(min(3, config.rounds)):
        for number, name in enumerate(names):
            output = directory / f"output_{turn}_{number}"
            runs[name].append(prepare(name, folder, output))
            if turn == 0:
                hashes.append(document_hashes(output))
    if any(other != hashes[0] for other in hashes):
        raise UserError("the two do not have the same documents: something is wrong")
    megabytes = json.loads((output / "manifest.json").read_bytes())["text_bytes"] / 1e6
    title = f"prepare {len(originals) * config.repeats} files, {megabytes:,.1f} MB of text"
    seconds = {name: [run["seconds"] for run in of_name] for name, of_name in runs.items()}
    peaks = {k: {"peak MB": max(run["peak_mb"] for run in v)} for k, v in runs.items()}
    work = "MB/s", megabytes
    record_times("data", f"{title}, all kept, equal ids", seconds, work=work, extra=peaks)


def text_chunks(files: list[Path]) -> list[list[str]]:
    """At most MAX_CHUNKS lists of documents, each of at least CHUNK_BYTES of text if possible."""
    chunks: list[list[str]] = [[]]
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=["text"]):
            chunks[-1] += filter(None, batch["text"].to_pylist())
            if sum(map(len, chunks[-1])) >= CHUNK_BYTES:
                chunks.append([])
            if len(chunks) > MAX_CHUNKS:
                return chunks[:-1]
    return chunks[:-1] or chunks  # the last is shorter


def compare_tokenizers(files: list[Path], config: Any) -> None:
    """Times tokenizers on documents in memory; consecutive calls have different text."""
    tokenizer, chunks = load_tokenizer(), text_chunks(files)
    hf = tokenizer._ordinary
    functions: dict[str, Callable[[list[str]], Any]] = {}
    if peer("tiktoken"):
        encoding, cores = tiktoken_encoding(tokenizer), os.cpu_count() or 1
        functions["tiktoken, one thread"] = lambda texts: [*map(encoding.encode_ordinary, texts)]
        functions["tiktoken, batch, all cores"] = lambda texts: encoding.encode_ordinary_batch(
            texts, num_threads=cores
        )
    functions["tokenizers, batch, all cores"] = lambda texts: [
        encoding.ids for encoding in hf.encode_batch_fast(texts, add_special_tokens=False)
    ]
    functions[OURS] = tokenizer.encode_batch
    expected = tokenizer.encode_batch(chunks[0])
    for name, function in functions.items():
        if not all(map(np.array_equal, function(chunks[0]), expected)):
            raise UserError(f"{name} gives other ids than ours: something is wrong")

    def next_chunk(function: Callable[[list[str]], Any]) -> Callable[[], object]:
        endless = cycle(chunks)
        return lambda: function(next(endless))

    megabytes = sum(len(text.encode()) for chunk in chunks for text in chunk) / 1e6 / len(chunks)
    title = f"tokenize {len(chunks)} x {megabytes:.1f} MB in memory, equal ids"
    steps = {name: next_chunk(function) for name, function in functions.items()}
    compare("data", title, steps, config.rounds, work=("MB/s", megabytes))


def run(config: Any, device: torch.device) -> None:
    """Tokenizers in this process, then whole preparations in processes of their own."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if config.source:
            originals = [file.path for file in local_files(config.source)]
        else:
            originals = make_source(directory)
        compare_tokenizers(originals, config)
        compare_preparing(originals, config, directory)
