"""Tokenizer speed: the source files of the Python library as documents in memory.

python benchmark.py --section=data
"""

import os
import sysconfig
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import compare, peer
from tokenizer import Tokenizer, load_tokenizer

CHUNK_BYTES = 4_000_000  # of text in one call of a tokenizer; gigatoken uses one core below 2 MB
LIBRARY = Path(sysconfig.get_path("stdlib"))
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # GPT-2's
)
Tokenize = Callable[[list[str]], Any]  # texts -> ids of each


def text_chunks() -> list[list[str]]:
    """Lists of documents, each of CHUNK_BYTES of text if there are as many."""
    chunks: list[list[str]] = [[]]
    for path in sorted(LIBRARY.rglob("*.py")):
        if "site-packages" not in path.parts:
            chunks[-1].append(path.read_bytes().decode("utf-8", "ignore"))
            if sum(map(len, chunks[-1])) >= CHUNK_BYTES:
                chunks.append([])
    return chunks[:-1] or chunks  # the last is shorter


def tokenizers(tokenizer: Tokenizer) -> dict[str, Tokenize]:
    """Ours, and those of other projects with the same vocabulary, by name."""
    functions: dict[str, Tokenize] = {}
    if tiktoken := peer("tiktoken"):
        ranks = {piece: i for i, piece in enumerate(tokenizer.pieces[: tokenizer.pad_id])}
        encoding = tiktoken.Encoding(
            "hastings", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        cores = os.cpu_count() or 1
        functions["tiktoken, one thread"] = lambda texts: [*map(encoding.encode_ordinary, texts)]
        functions["tiktoken, batch, all cores"] = lambda texts: encoding.encode_ordinary_batch(
            texts, num_threads=cores
        )
    hf = tokenizer._ordinary
    functions["tokenizers, batch, all cores"] = lambda texts: [
        encoding.ids for encoding in hf.encode_batch_fast(texts, add_special_tokens=False)
    ]
    functions["ours"] = tokenizer.encode_batch
    return functions


def run(config: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Times tokenizers; consecutive calls have different text. All must give equal ids."""
    tokenizer, chunks = load_tokenizer(), text_chunks()
    functions = tokenizers(tokenizer)
    expected = tokenizer.encode_batch(chunks[0])
    for name, function in functions.items():
        if not all(map(np.array_equal, function(chunks[0]), expected)):
            raise RuntimeError(f"{name} gives other ids than ours")

    def next_chunk(function: Tokenize) -> Callable[[], object]:
        endless = cycle(chunks)
        return lambda: function(next(endless))

    megabytes = sum(len(text.encode()) for chunk in chunks for text in chunk) / 1e6 / len(chunks)
    yield compare(
        f"tokenize {len(chunks)} x {megabytes:.1f} MB in memory, equal ids",
        {name: next_chunk(function) for name, function in functions.items()},
        config.rounds,
        unit="MB/s",
        amounts=dict.fromkeys(functions, megabytes),
    )
