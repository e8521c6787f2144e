"""Recipes of the learning study: ours, the original's batches and Hessian, Muon; the documents.

Documents are kept in memory, in the tokens of Hastings cut to its first merges.

Muon: Jordan et al., https://kellerjordan.github.io/posts/muon/; the scale of its steps, which makes
AdamW's learning rates fit it: Liu et al., 2502.16982.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from benchmarks.inputs import Documents, train_config
from benchmarks.peers import beginnings
from dataset import open_split
from hastings.build import build_json
from model import GPT
from tokenizer import CONTROL_TOKENS, Tokenizer, load_tokenizer
from training.optimizers import gradient_scale
from training.packing import Batch
from training.trainer import Trainer

OURS, ADAMW, MUON = OPTIMIZERS = ("ours", "AdamW", "Muon")
ADAMW_CAUTIOUS, MUON_CAUTIOUS = ("AdamW cautious", "Muon cautious")
HAVE_RULE = (*OPTIMIZERS, ADAMW_CAUTIOUS, MUON_CAUTIOUS)  # in training/learning_rates.py
NOT_CAUTIOUS, PADDED, ROPE = ("ours not cautious", "ours padded", "ours lille RoPE")
ONE_RATE, ADAMW_ONE_RATE = ("SophiaG one rate", "AdamW one rate")
ORIGINAL, ORIGINAL_TWO_RATES = ("original", "original two rates")
ORIGINAL_SETTINGS = {
    "batches": "padded",
    "rope_style": "lille",
    "dropout": 0.1,
    "hessian": "original",
    "cautious": False,
    "beta1": 0.9,
    "beta2": 0.95,
    "rho": 0.04,
}
LINEAR, LINEAR_TO_0, WSD = ("ours linear", "ours linear to 0", "ours wsd")
RECIPES: dict[str, dict[str, Any]] = {  # what differs from train.py's constants
    OURS: {},
    ADAMW: {"optimizer": "adamw"},
    MUON: {"optimizer": "muon"},
    ADAMW_CAUTIOUS: {"optimizer": "adamw", "cautious": True},
    MUON_CAUTIOUS: {"optimizer": "muon", "cautious": True},
    NOT_CAUTIOUS: {"cautious": False},
    ADAMW_ONE_RATE: {"optimizer": "adamw", "embedding_optimizer": "same"},
    ONE_RATE: {  # train.py's until 2026-11
        "embedding_optimizer": "same",
        "cautious": False,
        "beta1": 0.965,
        "beta2": 0.99,
    },
    ORIGINAL: {"embedding_optimizer": "same"} | ORIGINAL_SETTINGS,
    ORIGINAL_TWO_RATES: ORIGINAL_SETTINGS,
    PADDED: {"batches": "padded"},
    ROPE: {"rope_style": "lille"},
    LINEAR: {"schedule": "linear"},
    LINEAR_TO_0: {"schedule": "linear", "min_lr_ratio": 0.0},
    WSD: {"schedule": "wsd"},
}
# Where the tuning of each recipe begins at 64 wide and 4,096 positions a step, in its order.
TUNED: dict[str, dict[str, float]] = {
    OURS: {"learning_rate": 3e-3, "embedding_learning_rate": 3.2e-2},
    ADAMW: {"learning_rate": 4e-3, "embedding_learning_rate": 3.2e-2},
    MUON: {"learning_rate": 1.6e-2, "embedding_learning_rate": 3.2e-2},
    ADAMW_CAUTIOUS: {"learning_rate": 4e-3, "embedding_learning_rate": 3.2e-2},
    MUON_CAUTIOUS: {"learning_rate": 1.6e-2, "embedding_learning_rate": 3.2e-2},
    NOT_CAUTIOUS: {"learning_rate": 2e-3, "embedding_learning_rate": 3.2e-2},
    ONE_RATE: {"learning_rate": 2e-3, "rho": 0.2},
    ADAMW_ONE_RATE: {"learning_rate": 4e-3},
    ORIGINAL: {"learning_rate": 1e-3, "rho": 0.04},
    ORIGINAL_TWO_RATES: {"learning_rate": 2e-3, "embedding_learning_rate": 6.4e-2},
}
VARIANTS = dict.fromkeys(
    (PADDED, ROPE, LINEAR, LINEAR_TO_0, WSD), OURS
)  # at the settings of another recipe


# train.py's constants that are recorded with each run: a study goes on with those it began with.
RECORDED = ("min_lr_ratio", "weight_decay", "grad_clip")
RECORDED_OF_SOPHIAG = ("beta1", "beta2", "rho", "cautious", "hess_interval", "hess_batches")


def settings(name: str) -> dict[str, Any]:
    """The settings of a recipe, those of train.py that it leaves alone included."""
    recipe, defaults = RECIPES[name], vars(train_config())
    names = RECORDED
    if recipe.get("optimizer", defaults["optimizer"]) == "sophiag":
        names += RECORDED_OF_SOPHIAG
    return {name: defaults[name] for name in names} | recipe


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
        self.sophiag = getattr(self.optimizer, "hidden", self.optimizer)
        for group in self.sophiag.param_groups:
            group["bs"] *= config.gradient_accumulation_steps
            group["bias_correction"] = False

    def update_hessian(self, batch: Batch) -> None:
        everywhere = dataclasses.replace(batch, targets=torch.zeros_like(batch.targets))
        loss = self.loss_sum(everywhere, sample_targets=True) / batch.ids.numel()
        loss.backward()
        _, scale = gradient_scale(list(self.model.parameters()), loss, grad_clip=1.0)
        self.optimizer.update_hessian(grad_scale=scale)
        self.optimizer.zero_grad(set_to_none=True)


class CautiousTrainer(Trainer):
    """Trainer with cautious steps of an optimizer that has none itself, on the hidden matrices."""

    def __init__(self, model: GPT, config: Any, device: torch.device, dtype: torch.dtype):
        super().__init__(model, config, device, dtype)
        hidden = self.optimizer.hidden
        hidden.step = functools.partial(cautious_step, hidden, hidden.step)


def cautious_step(optimizer: torch.optim.Optimizer, step: Callable, **arguments: Any) -> None:
    """Steps, then takes back each update that does not go against its gradient.

    Weight decay stays. Liang et al., arXiv 2411.16085, without their rescaling, as in SophiaG.
    """
    groups = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for _, p in groups]
    step(**arguments)
    with torch.no_grad():
        for (group, p), old in zip(groups, before, strict=True):
            old.mul_(1 - group["lr"] * group["weight_decay"])
            p.copy_(torch.where((p - old) * p.grad < 0, p, old))


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
