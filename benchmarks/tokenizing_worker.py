"""One preparation of benchmarks/tokenizing.py, in a process that imports nothing else: no torch.

Prepares all Parquet files of a folder and prints time, from the end of the imports to the last file
on disk, and peak memory as JSON.
"""

import json
import re
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import prepare_dataset_fineweb
from common.errors import UserError
from common.settings import config_from_constants, run_script
from tokenizer import Tokenizer, load_tokenizer

variant = ""
source = ""  # folder
output_dir = ""

PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # GPT-2's
)


def tiktoken_encoding(tokenizer: Tokenizer):
    """Our vocabulary in tiktoken."""
    import tiktoken

    ranks = {piece: i for i, piece in enumerate(tokenizer.pieces[: tokenizer.n_text])}
    return tiktoken.Encoding("hastings", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def tiktoken_loop(files: list[Path], output: Path) -> None:
    tokenizer = load_tokenizer()
    encoding = tiktoken_encoding(tokenizer)
    documents = []
    for path in files:
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist():
            documents.append(encoding.encode_ordinary(text) + [tokenizer.eos_id])
    output.mkdir()
    np.savez(
        output / "train.npz",
        tokens=np.array([token for ids in documents for token in ids], dtype=np.uint16),
        offsets=np.cumsum([0, *map(len, documents)], dtype=np.uint64),
    )


def ours(files: list[Path], output: Path) -> None:
    settings = {"source": files[0].parent, "output_dir": output, "val_split": 0.01}
    settings |= {"language_filter": "", "language_score_threshold": 0.0, "min_int_score": 0}
    prepare_dataset_fineweb.main([f"--{name}={value}" for name, value in settings.items()])


OURS = "ours"
VARIANTS = {"tiktoken, one thread, lists": tiktoken_loop, OURS: ours}


def peak_bytes() -> int:
    """Peak memory of this process, as Linux counts it without its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    if config.variant not in VARIANTS:
        raise UserError("this is a part of benchmark.py: run python benchmark.py --section=data")
    files = sorted(Path(config.source).glob("*.parquet"))
    started = time.perf_counter()
    VARIANTS[config.variant](files, Path(config.output_dir))
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mb": peak_bytes() / 1e6}))
    return 0


if __name__ == "__main__":
    run_script(main)
