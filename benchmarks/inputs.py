"""Inputs of the benchmarks: synthetic documents, model shapes, settings of train.py."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import demo
import train
from common.settings import config_from_constants
from dataset import NpzDataset, ShardWriter
from model import GPTConfig
from tokenizer import load_tokenizer

MEAN_LENGTH, SIGMA = 1030, 1.08  # of FineWeb-Edu's documents, tokens, log-normal
SHAPE = ("n_layers", "n_embd", "n_heads", "n_kv_heads", "block_size")


def make_documents(path: Path, n: int, vocab_size: int, seed: int = 0) -> NpzDataset:
    """A shard of `n` documents of random text ids, their lengths log-normal, at least 2."""
    rng = np.random.default_rng(seed)
    mu = np.log(MEAN_LENGTH) - SIGMA**2 / 2
    lengths = np.maximum(2, rng.lognormal(mu, SIGMA, size=n).astype(np.int64))
    with ShardWriter(path.parent) as writer:
        writer.add_batch(rng.integers(vocab_size, size=k).astype(np.uint16) for k in lengths)
        writer.write(path)
    return NpzDataset(path)


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
