"""Data preparation beside a plain tiktoken loop: text per second, peak memory, equal ids.

    python benchmark_data.py --source="../fineweb/*.parquet"

Each contestant prepares the same Parquet files in a process of its own, in turn; what it takes is
measured inside that process from the end of its imports to the last file on disk. The first
contestant is what people write first: one thread, `encode_ordinary` on each document, Python lists,
one np.savez at the end. Both read the same columns and drop the same documents.
"""

import hashlib
import importlib.util
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import prepare_dataset_fineweb
from config import UserError, config_from_constants, run_script
from dataset import NpzDataset
from sources import local_files
from tokenizer import load_tokenizer

source = ""  # Parquet files in FineWeb's columns; "": made of the Python library's source code
repeats = "1 4"  # how many times each file, one measurement for each number
filters = False  # True: as prepare_dataset_fineweb.py sets them; False: all text is kept
rounds = 2  # measurements of each
contestant = ""  # for the processes that this script starts
output_dir = ""

PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # GPT-2's
)
NO_FILTERS = {"language_filter": "", "language_score_threshold": 0.0, "min_int_score": 0}


def tiktoken_loop(files: list[Path], output: Path, with_filters: bool) -> None:
    import tiktoken

    tokenizer = load_tokenizer()
    ranks = {piece: i for i, piece in enumerate(tokenizer.pieces[: tokenizer.n_text])}
    encoding = tiktoken.Encoding(
        "hastings", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    documents = []
    for path in files:
        columns = ["text", "language", "language_score", "int_score"]
        for row in pq.read_table(path, columns=columns).to_pylist():
            if with_filters and (row["language"] != "en" or row["language_score"] < 0.95):
                continue
            documents.append(encoding.encode_ordinary(row["text"]) + [tokenizer.eos_id])
    output.mkdir()
    np.savez(
        output / "train.npz",
        tokens=np.array([token for ids in documents for token in ids], dtype=np.uint16),
        offsets=np.cumsum([0, *map(len, documents)], dtype=np.uint64),
    )


def ours(files: list[Path], output: Path, with_filters: bool) -> None:
    settings = {"source": files[0].parent, "output_dir": output, "val_split": 0.01}
    settings |= {} if with_filters else NO_FILTERS
    prepare_dataset_fineweb.main([f"--{name}={value}" for name, value in settings.items()])


CONTESTANTS = {"tiktoken, one thread, lists": tiktoken_loop, "ours": ours}


def make_source(folder: Path) -> list[Path]:
    """The Python library's source files as four Parquet files in FineWeb's columns."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
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


def measure(name: str, folder: Path, output: Path, with_filters: bool) -> dict[str, float]:
    """{"seconds", "peak_mb"} of one contestant in a new process."""
    command = [sys.executable, __file__, f"--contestant={name}", f"--source={folder}"]
    command += [f"--output_dir={output}", f"--filters={with_filters}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{name} failed: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """The most memory that this process has had, as Linux counts it without its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def run_contestant(config) -> None:
    files = sorted(Path(config.source).glob("*.parquet"))
    started = time.perf_counter()
    CONTESTANTS[config.contestant](files, Path(config.output_dir), config.filters)
    seconds = time.perf_counter() - started
    peak = peak_bytes() / 1e6
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


def compare(originals: list[Path], times: int, config, directory: Path) -> None:
    """Measures the contestants on `times` copies of the files and prints a table."""
    folder = directory / f"source{times}"
    folder.mkdir()
    for number in range(times):
        for path in originals:
            os.symlink(path.resolve(), folder / f"{number:03d}_{path.name}")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    documents = {}
    for turn in range(config.rounds):
        for number, name in enumerate(CONTESTANTS):
            output = directory / f"output_{times}_{turn}_{number}"
            found[name].append(measure(name, folder, output, config.filters))
            if turn == 0:
                documents[name] = documents_of(output)
    expected, result = documents.values()
    if expected != result:
        raise UserError("the two do not have the same documents: something is wrong")
    n_bytes = json.loads((output / "manifest.json").read_bytes())["text_bytes"]
    kept = "after the filters" if config.filters else "all kept"
    print(f"\n{len(originals) * times} files, {n_bytes / 1e6:,.1f} MB of text {kept}, equal ids")
    print(f"{'':30} seconds   range              MB/s    ratio   peak MB")
    first = None
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        median = statistics.median(seconds)
        first = first or median
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        peak = max(run["peak_mb"] for run in runs)
        print(
            f"{name:30} {median:7.2f}   {spread:16} {n_bytes / 1e6 / median:6.1f} "
            f"{first / median:8.2f} {peak:9.0f}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    if config.contestant:
        run_contestant(config)
        return 0
    if importlib.util.find_spec("tiktoken") is None:
        print("data: skipped, tiktoken is not here: pip install -r requirements-bench.txt")
        return 0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if config.source:
            local = local_files(config.source)
            originals = [file.path for file in local]
        else:
            originals = make_source(directory)
        for times in map(int, config.repeats.split()):
            compare(originals, times, config, directory)
    return 0


if __name__ == "__main__":
    run_script(main)
