"""benchmark.py --section=packing: documents into training rows, ours and the original's way.

The original draws documents at random with replacement, keeps the first `block_size` tokens of each
and pads the rest. Documents are made up with lengths like FineWeb-Edu's: log-normal with its mean
of 1,030 tokens, and so wide that 22 % of the tokens lie beyond a document's 2,048th, as they do
there. --data_dir=... measures real shards too.
"""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import timing
from benchmarks.inputs import MEAN_LENGTH, SHAPE, SIGMA, demo_config, make_documents, train_config
from benchmarks.peers import padded_rows
from dataset import NpzDataset, open_split
from model import GPT, GPTConfig
from tokenizer import load_tokenizer
from training.packing import Batch, PackedRows, cut_documents, pack
from training.trainer import Trainer, prefetch_steps

ROWS = 16  # of a batch
STEPS = 8  # training steps whose wait for data is timed
PADDED = "first tokens, padded, drawn"  # the original's way


def use_of_slots(
    shards: Sequence[NpzDataset], rows: PackedRows, block_size: int
) -> dict[str, dict]:
    """What a pass over equally many rows trains on: ours, and the original's way.

    "filled" is the share of places with a token, "labels" with something to predict, "lost" the
    share of the data's tokens that no epoch can show, "unseen" that as many rows do not show.
    """
    lengths = np.concatenate([np.diff(shard.offsets.astype(np.int64)) for shard in shards])
    kept = np.minimum(lengths, block_size)
    total, places = int(lengths.sum()), rows.rows_per_epoch * block_size
    drawn = np.random.default_rng(1).integers(len(lengths), size=rows.rows_per_epoch)
    labels = np.maximum(0, kept[drawn] - 1).sum()
    unseen = 1 - kept[np.unique(drawn)].sum() / total
    ours = np.maximum(0, rows.lengths - 1).sum()
    return {
        PADDED: {
            "filled": kept[drawn].sum() / places,
            "labels": labels / places,
            "lost": 1 - kept.sum() / total,
            "unseen": unseen,
        },
        "ours": {
            "filled": rows.fill,
            "labels": ours / places,
            "lost": 1 - rows.lengths.sum() / total,
            "unseen": 1 - rows.lengths.sum() / total,
        },
    }


def loaders(shards: Sequence[NpzDataset], rows: PackedRows, config: Any, title: str) -> None:
    """How fast batches are made, in one thread."""
    documents = [shard[i] for shard in shards for i in range(len(shard))]
    rng = np.random.default_rng(0)
    n = min(ROWS, rows.rows_per_epoch)
    starts = cycle(range(0, rows.rows_per_epoch - n + 1, n))

    def padded() -> Batch:
        return padded_rows(documents, rows.block_size, n, rows.pad_id, rng)

    def packed() -> Batch:
        start = next(starts)
        return rows.batch(range(start, start + n))

    contestants = {PADDED: padded, "ours": packed}
    labels = {
        name: sum(make().n_labels for _ in range(100)) / 100 for name, make in contestants.items()
    }
    timing.compare(
        "packing",
        f"batches of {n} x {rows.block_size}, one thread, {title}",
        contestants,
        2 * config.rounds,
        work=("labels/s", labels),
    )


def data_wait(rows: PackedRows, config: Any, device: torch.device, title: str) -> None:
    """How long training steps wait for their batches: train.py's own prefetcher and steps.

    On a CPU with the demo's model, whose steps are short, which is where a wait would show.
    """
    gpu = device.type == "cuda"
    chosen, n = (config, ROWS) if gpu else (demo_config(), 4)
    shape = {name: getattr(chosen, name) for name in SHAPE} | {"block_size": rows.block_size}
    settings = train_config(
        [f"--batch_size={n}", "--gradient_accumulation_steps=1", "--optimizer=adamw"]
    )
    gpt = GPT(GPTConfig(**shape)).to(device)
    run = Trainer(gpt, settings, device, getattr(torch, config.dtype))
    if gpu:
        run.try_compile(rows.batch(range(n)))
    batches = prefetch_steps(
        rows, 0, (STEPS + 2) * n, settings.batch_size, settings.gradient_accumulation_steps, pin=gpu
    )
    try:
        waits, steps = timing.waits(
            iter(batches), lambda batch: run.step(batch, 1e-4), device, skipped=2
        )
    finally:
        batches.close()
    row = {"step ms": 1e3 * sum(steps) / len(steps), "wait ms": 1e3 * sum(waits) / len(waits)}
    row |= {"longest wait ms": 1e3 * max(waits), "share": sum(waits) / sum(steps)}
    layout = f"{gpt.n_parameters():,} parameters, {n} x {rows.block_size} tokens a step"
    timing.facts("packing", f"wait for data, {layout}, {title}", {"ours": row})


def sources(config: Any, folder: Path) -> Iterator[tuple[str, list[NpzDataset]]]:
    """The data to measure: a title and shards of each."""
    tokenizer = load_tokenizer()
    made_up = make_documents(folder / "train.npz", config.n_documents, tokenizer.n_text)
    yield f"{config.n_documents:,} made-up documents", [made_up]
    if config.data_dir:
        shards = open_split(config.data_dir, "train", tokenizer.sha256, tokenizer.vocab_size)
        yield f"{sum(map(len, shards)):,} documents of {Path(config.data_dir).name}", shards


def run(config: Any, device: torch.device) -> None:
    """Use of the slots, speed of the loader, wait for data, time of the plan."""
    with tempfile.TemporaryDirectory() as name:
        for title, shards in sources(config, Path(name)):
            rows = PackedRows(shards, config.block_size, load_tokenizer().pad_id)
            facts = use_of_slots(shards, rows, config.block_size)
            timing.facts("packing", f"rows of {config.block_size} tokens, {title}", facts)
            loaders(shards, rows, config, title)
            data_wait(rows, config, device, title)
            del shards, rows  # the mapped file, before its folder
    drawn = np.random.default_rng(2).lognormal(
        np.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA, size=config.n_planned
    )
    offsets = np.concatenate(([0], np.cumsum(np.maximum(2, drawn.astype(np.int64)))))

    def plan() -> None:
        _, pieces = cut_documents(offsets, config.block_size)
        pack(pieces, config.block_size, np.random.default_rng(3))

    timing.compare(
        "packing",
        f"plan of an epoch, {config.n_planned:,} made-up documents",
        {"ours": plan},
        min(3, config.rounds),
        work=("documents/s", config.n_planned),
    )
