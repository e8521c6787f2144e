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

from benchmarks.peers import beginnings
from common.errors import UserError
from dataset import open_split
from hastings.build import build_json
from model import GPT
from tokenizer import CONTROL_TOKENS, Tokenizer, load_tokenizer
from training.optimizers import gradient_scale, scale_gradients
from training.packing import Batch
from training.trainer import Trainer

SOPHIAG, ADAMW, MUON, ORIGINAL = "ours, SophiaG", "ours, AdamW", "ours, Muon", "original"
TWO_RATES = "ours, AdamW, two rates"  # as free as Muon, which is not on the embedding
RECIPES: dict[str, dict[str, Any]] = {  # what differs from train.py's constants
    SOPHIAG: {},
    ADAMW: {"optimizer": "adamw"},
    MUON: {"optimizer": "muon"},
    TWO_RATES: {"optimizer": "adamw", "hidden_rate": 0.125},
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
CHANGES = {  # single settings of the original's in our recipe
    "padded batches": {"batches": "padded"},
    "lille RoPE": {"rope_style": "lille"},
    "dropout 0.1": {"dropout": 0.1},
    "original's Hessian": {"hessian": "original"},
    "betas 0.9, 0.95": {"beta1": 0.9, "beta2": 0.95},
}
OF_SOPHIAG = ("original's Hessian", "betas 0.9, 0.95")


@dataclasses.dataclass
class Documents:
    """Documents in memory, with the part of NpzDataset's interface that PackedRows uses."""

    tokens: np.ndarray  # (N,) uint16
    offsets: np.ndarray  # (documents + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


class PaddedStarts:
    """The original's batches: a document's first `block_size` tokens to a row, padded.

    With a seed every row is a document drawn with replacement; without, row i is document i. It has
    the part of PackedRows' interface that Trainer.evaluate and `train_once` use.
    """

    def __init__(
        self, datasets: list[Documents], block_size: int, pad_id: int, seed: int | None = None
    ):
        (self.documents,) = datasets
        self.block_size, self.pad_id, self.seed = block_size, pad_id, seed
        self.n_documents = self.rows_per_epoch = len(self.documents)

    def batch(self, rows: Iterable[int | None]) -> Batch:
        documents = [None if row is None else self.document(row) for row in rows]
        return beginnings(documents, self.block_size, self.pad_id)

    def document(self, row: int) -> np.ndarray:
        if self.seed is not None:
            row = np.random.default_rng((self.seed, row)).integers(len(self.documents))
        return self.documents[row]


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


class TwoOptimizers:
    """Muon or AdamW for the hidden matrices, AdamW for the embedding (also the head) and norms.

    All follow one learning rate, that of the hidden matrices times `hidden_rate`.
    """

    def __init__(self, model: GPT, config: Any, hidden_rate: float = 1.0):
        self.hidden_rate = hidden_rate
        embedding = model.tok_embeddings.weight
        hidden = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
        norms = [p for p in model.parameters() if p.dim() < 2]
        settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        groups = [{"params": [embedding]}, {"params": norms, "weight_decay": 0.0}]
        betas = (config.adamw_beta1, config.adamw_beta2)
        if config.optimizer == "muon":
            first = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **settings)
        else:
            first = torch.optim.AdamW(hidden, betas=betas, **settings)
        self.optimizers = [first, torch.optim.AdamW(groups, betas=betas, **settings)]
        self.param_groups = [g for optimizer in self.optimizers for g in optimizer.param_groups]

    def step(self, *, grad_scale: torch.Tensor | None = None) -> None:
        if not scale_gradients(self, grad_scale):
            return
        for group in self.optimizers[0].param_groups:
            group["lr"] *= self.hidden_rate  # Trainer.step sets it before every step
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


@functools.cache
def small_tokenizer(vocab_size: int) -> Tokenizer:
    """Hastings with as many of its merges, the most frequent ones, as `vocab_size` allows."""
    largest = load_tokenizer().vocab_size
    if not 256 + len(CONTROL_TOKENS) <= vocab_size <= largest:
        limits = f"must be 261 to {largest:,}"
        raise UserError(f"vocab_size={vocab_size} {limits}: the bytes, then merges")
    merges = json.loads(load_tokenizer().json_text)["model"]["merges"]
    return Tokenizer(build_json(merges[: vocab_size - 256 - len(CONTROL_TOKENS)]).encode())


@functools.cache
def load_documents(data_dir: str, split: str, vocab_size: int, n_tokens: int) -> Documents:
    """Documents of a split in a fixed random order, until they have `n_tokens` (0: all of them)."""
    tokenizer, small = load_tokenizer(), small_tokenizer(vocab_size)
    shards = open_split(data_dir, split, tokenizer.sha256, tokenizer.vocab_size)
    documents = [(shard, i) for shard in shards for i in range(len(shard))]
    ids, ends = [np.empty(0, np.uint16)], [0]
    for numbers in np.array_split(np.random.default_rng(0).permutation(len(documents)), 64):
        batch = (documents[number] for number in numbers)
        texts = [tokenizer.decode(shard[i][:-1].tolist()) for shard, i in batch]
        new_ids, new_ends = small.encode_documents(texts)
        ends += (new_ends + ends[-1]).tolist()
        ids.append(new_ids)
        if n_tokens and ends[-1] >= n_tokens:
            ends = ends[: int(np.searchsorted(ends, n_tokens)) + 1]
            break
    return Documents(np.concatenate(ids)[: ends[-1]], np.array(ends))
