"""Recipes of the learning study: ours, the original's batches and Hessian, Muon; the documents.

Documents are kept in memory, in the tokens of Hastings cut to its first merges.

Muon: Jordan et al., https://kellerjordan.github.io/posts/muon/; the scale of its steps, which makes
AdamW's learning rates fit it: Liu et al., 2502.16982.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from benchmarks.inputs import Documents
from benchmarks.peers import beginnings
from dataset import open_split
from hastings.build import build_json
from model import GPT
from tokenizer import CONTROL_TOKENS, Tokenizer, load_tokenizer
from training.optimizers import gradient_scale
from training.packing import Batch
from training.trainer import Trainer

SOPHIAG, ADAMW, MUON, ORIGINAL = "ours, SophiaG", "ours, AdamW", "ours, Muon", "original"
TWO_RATES = "ours, AdamW, two rates"  # as free as Muon, which is not on the embedding
SOPHIAG_TWO_RATES = "ours, SophiaG, two rates"
RECIPES: dict[str, dict[str, Any]] = {  # what differs from train.py's constants
    SOPHIAG: {},
    ADAMW: {"optimizer": "adamw"},
    MUON: {"optimizer": "muon"},
    TWO_RATES: {"optimizer": "adamw", "hidden_rate": 0.125},
    SOPHIAG_TWO_RATES: {  # not tuned here: what single runs on seed 0 had found
        "learning_rate": 2e-3,
        "embedding_learning_rate": 3.2e-2,
        "rho": 0.8,
        "beta1": 0.9,
        "beta2": 0.95,
    },
    ORIGINAL: {
        "batches": "padded",
        "rope_style": "lille",
        "dropout": 0.1,
        "hessian": "original",
        "beta1": 0.9,
        "beta2": 0.95,
        "rho": 0.04,
    },
}
CHANGES_OF_ANY = {
    "padded batches": {"batches": "padded"},
    "lille RoPE": {"rope_style": "lille"},
    "dropout 0.1": {"dropout": 0.1},
}
CHANGES_OF_SOPHIAG = {
    "original's Hessian": {"hessian": "original"},
    "betas 0.9, 0.95": {"beta1": 0.9, "beta2": 0.95},
}
# Single settings of the original's in our recipe
CHANGES = {SOPHIAG: CHANGES_OF_ANY | CHANGES_OF_SOPHIAG, ADAMW: CHANGES_OF_ANY}


class PaddedStarts:
    """The original's batches: a document's first `block_size` tokens to a row, padded.

    With a seed every row is a document drawn with replacement; without, row i is document i. It has
    the part of PackedRows' interface that training and evaluation use.
    """

    def __init__(
        self, datasets: list[Documents], block_size: int, pad_id: int, seed: int | None = None
    ):
        (self.documents,) = datasets
        self.block_size, self.pad_id, self.seed = block_size, pad_id, seed
        self.rows_per_epoch = len(self.documents)

    def batch(self, rows: Iterable[int | None]) -> Batch:
        if self.seed is not None:
            seeds = [(self.seed, row) for row in rows]
            rows = [np.random.default_rng(s).integers(len(self.documents)) for s in seeds]
        documents = [None if row is None else self.documents[row] for row in rows]
        return beginnings(documents, self.block_size, self.pad_id)


class OriginalTrainer(Trainer):
    """Trainer with the original's Hessian estimate: labels at padding too, gradient clipped to 1.

    `bs` is the tokens of the whole step, of which the estimate sees one micro-batch.
    """

    def __init__(self, model: GPT, config: Any, device: torch.device, dtype: torch.dtype):
        super().__init__(model, config, device, dtype)
        for group in self.optimizer.param_groups:
            group["bs"] *= config.gradient_accumulation_steps

    def update_hessian(self, batch: Batch) -> None:
        everywhere = dataclasses.replace(batch, targets=torch.zeros_like(batch.targets))
        loss = self.loss_sum(everywhere, sample_targets=True) / batch.ids.numel()
        loss.backward()
        _, scale = gradient_scale(list(self.model.parameters()), loss, grad_clip=1.0)
        self.optimizer.update_hessian(grad_scale=scale)
        self.optimizer.zero_grad(set_to_none=True)


@functools.cache
def small_tokenizer(vocab_size: int) -> Tokenizer:
    """Hastings with as many of its merges, the most frequent ones, as `vocab_size` allows."""
    merges = json.loads(load_tokenizer().json_text)["model"]["merges"]
    return Tokenizer(build_json(merges[: vocab_size - 256 - len(CONTROL_TOKENS)]).encode())


@functools.cache
def load_documents(data_dir: str, split: str, vocab_size: int, n_tokens: int | None) -> Documents:
    """Documents of a split in a fixed random order, until they have `n_tokens` (None: all)."""
    tokenizer, small = load_tokenizer(), small_tokenizer(vocab_size)
    shards = open_split(data_dir, split, tokenizer.sha256, tokenizer.vocab_size)
    documents = [(shard, i) for shard in shards for i in range(len(shard))]
    ids, ends = [], [0]
    for number in np.random.default_rng(0).permutation(len(documents)):
        shard, i = documents[number]
        text = tokenizer.decode(shard[i][:-1].tolist())
        ids.append(np.array([*small.encode(text), small.eos_id], dtype=np.uint16))
        ends.append(ends[-1] + len(ids[-1]))
        if n_tokens and ends[-1] >= n_tokens:
            break
    return Documents(np.concatenate(ids), np.array(ends))
