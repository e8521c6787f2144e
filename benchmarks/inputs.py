"""Inputs of the benchmarks: synthetic documents, model shapes, settings of train.py."""

import dataclasses
from typing import Any

import numpy as np

import demo
import train
from common.settings import config_from_constants
from model import GPTConfig
from tokenizer import load_tokenizer

MEAN_LENGTH, SIGMA = 1030, 1.08  # of FineWeb-Edu's documents, tokens, log-normal
SHAPE = ("n_layers", "n_embd", "n_heads", "n_kv_heads", "block_size")


@dataclasses.dataclass
class Documents:
    """Documents in memory, with the part of NpzDataset's interface that PackedRows uses."""

    tokens: np.ndarray  # (N,) uint16
    offsets: np.ndarray  # (documents + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


def make_documents(n: int, vocab_size: int) -> Documents:
    """`n` documents of random text ids, their lengths log-normal, at least 2."""
    rng = np.random.default_rng(0)
    mu = np.log(MEAN_LENGTH) - SIGMA**2 / 2
    lengths = np.maximum(2, rng.lognormal(mu, SIGMA, size=n).astype(np.int64))
    tokens = rng.integers(vocab_size, size=lengths.sum(), dtype=np.uint16)
    return Documents(tokens, np.cumsum([0, *lengths]))


def train_config(**changes: Any) -> Any:
    """The settings of train.py with these changes."""
    return dataclasses.replace(config_from_constants(vars(train), []), **changes)


def demo_config() -> Any:
    """The settings of the demo's pretraining."""
    return train_config(**demo.MODEL_SHAPE, **demo.PRETRAIN)


def model_config(config: Any) -> GPTConfig:
    """The model of a config with SHAPE, with Hastings' vocabulary."""
    shape = {name: getattr(config, name) for name in SHAPE}
    return GPTConfig(**shape, vocab_size=load_tokenizer().vocab_size)
