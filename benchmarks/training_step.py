"""Training speed: whole steps of ours and of its peers, and the use of tokens.

    python benchmark.py --section=train

A step is forward, backward, clipping and optimizer over all its micro-batches, with the same
clipping and fused AdamW for everyone, so that the model and its loss decide. Rows are packed from
documents with log-normal lengths fitted to FineWeb-Edu; the original pads documents of the same
distribution and has its own dropout of 0.1. Rates count labelled tokens only. The limit is PaLM's
count of FLOPs (2204.02311, appendix B), of padding too, at this machine's matmul rate: the column
is the MFU.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import torch

from benchmarks import peers
from benchmarks.inputs import (
    SHAPE,
    Documents,
    demo_config,
    make_documents,
    model_config,
    train_config,
)
from benchmarks.timing import compare, free_memory, limits
from model import GPT
from tokenizer import load_tokenizer
from training.packing import Batch, PackedRows
from training.trainer import Trainer

N_DOCUMENTS = 20_000
N_STEPS = 2  # different ones, in turn
ONE_ADAMW = {"optimizer": "adamw", "embedding_optimizer": "same", "learning_rate": 1e-3}
Steps = list[list[Batch]]  # the micro-batches of each step


def make_steps(
    rows: PackedRows, documents: Documents, batch_size: int, accumulation: int
) -> dict[str, Steps]:
    """N_STEPS steps in the forms that implementations read.

    "packed" with document masks, "plain" for transformers, "padded" documents, which the original
    draws with replacement.
    """
    rng = np.random.default_rng(0)
    packed = list(rows.steps(0, N_STEPS * batch_size * accumulation, batch_size, accumulation))

    def padded() -> Batch:
        numbers = rng.integers(len(documents), size=batch_size)
        return peers.beginnings([documents[i] for i in numbers], rows.block_size, rows.pad_id)

    return {
        "packed": packed,
        "plain": [[peers.plain_rows(b, rows.pad_id) for b in step] for step in packed],
        "padded": [[padded() for _ in step] for step in packed],
    }


def step_function(trainer: Trainer, steps: Steps) -> Callable[[], None]:
    """A function that trains on the next step's batches, in a circle."""
    endless = cycle(steps)

    def run() -> None:
        try:
            trainer.step(next(endless), lr=1e-4)
        except BaseException:  # others may train this model too: leave them none of its gradients
            trainer.model.zero_grad(set_to_none=True)
            raise

    return run


def with_compiled(trainer: Trainer) -> Trainer:
    """The trainer with a compiled forward pass, sharing weights and optimizer."""
    other = copy.copy(trainer)
    other.forward = other.parallel = torch.compile(trainer.forward, dynamic=False)
    return other


def compare_steps(
    title: str,
    config: Any,
    rows: PackedRows,
    documents: Documents,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    compile: bool,
) -> dict[str, Any]:
    """Table of the steps of ours and of peers, compiled ones first, so that one is the baseline."""
    shape = model_config(config)
    steps = make_steps(rows, documents, config.batch_size, config.gradient_accumulation_steps)
    if device.type == "cuda":
        steps = {k: [[b.pin_memory() for b in step] for step in s] for k, s in steps.items()}
    original = peers.original_of(dataclasses.replace(shape, dropout=0.1))
    models = {
        "transformers Llama": (peers.llama_of(shape), peers.llama_loss, "plain"),
        "litgpt GPT": (peers.litgpt_of(shape), peers.litgpt_loss, "packed"),
        "original Lille, padded": (original, peers.original_loss(rows.pad_id), "padded"),
    }
    if device.type == "cuda":
        llama = peers.liger_llama_of(shape)
        models["transformers Llama, liger loss"] = llama, peers.llama_loss, "plain"
    trainers: dict[str, tuple[Trainer, str]] = {  # with the form of its batches
        name: (peers.PeerTrainer(loss_of, model.to(device), config, device, dtype), form)
        for name, (model, loss_of, form) in models.items()
        if model is not None
    }
    ours = Trainer(GPT(shape).to(device), config, device, dtype)
    trainers["ours"] = ours, "packed"
    if compile:
        compiled = {
            f"{name}, torch.compile": (with_compiled(trainer), form)
            for name, (trainer, form) in trainers.items()
        }
        trainers = compiled | trainers

    labels = {k: sum(b.n_labels for step in s for b in step) / len(s) for k, s in steps.items()}
    micro_batches = f"{config.gradient_accumulation_steps} x {config.batch_size}"
    positions = config.gradient_accumulation_steps * config.batch_size * config.block_size
    bound = ours.model.flops_per_token() * positions / limits(device)["matmul_rate"]
    return compare(
        f"{title}, {ours.model.n_parameters():,} parameters, "
        f"{micro_batches} x {config.block_size} tokens, {str(dtype)[6:]}, AdamW",
        {name: step_function(trainer, steps[form]) for name, (trainer, form) in trainers.items()},
        rounds,
        device,
        unit="tokens/s",
        amounts={name: labels[form] for name, (_, form) in trainers.items()},
        bounds=dict.fromkeys(trainers, bound),
    )


def token_use(rows: PackedRows, documents: Documents) -> dict[str, dict[str, float]]:
    """Share of filled positions and of tokens ever trained on, the original's and ours.

    The original draws documents with replacement and trains on the first `block_size` tokens.
    """
    lengths = np.diff(documents.offsets)
    used = np.minimum(lengths, rows.block_size)
    filled = used.mean() / rows.block_size
    return {
        "original Lille": {"filled": filled, "trained on": used.sum() / lengths.sum()},
        "ours": {"filled": rows.fill, "trained on": rows.lengths.sum() / lengths.sum()},
    }


def run(config: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Tables of the steps of the demo's and of the full model, and of the use of tokens.

    `config` has the shape (n_layers, n_embd, ...), batch_size (0: 2 rows on a CPU, 16 on a GPU),
    gradient_accumulation_steps (0: 1 and 16), dtype, rounds, compile.
    """
    gpu, dtype = device.type == "cuda", getattr(torch, config.dtype)
    tokenizer, small = load_tokenizer(), demo_config()
    full = train_config(
        **{name: getattr(config, name) for name in SHAPE},
        batch_size=config.batch_size or (16 if gpu else 2),
        gradient_accumulation_steps=config.gradient_accumulation_steps or (16 if gpu else 1),
    )
    documents = make_documents(N_DOCUMENTS, tokenizer.pad_id)
    for title, settings, rounds, compile in (
        ("the demo's model", small, 2 * config.rounds, False),
        ("full model", full, config.rounds, gpu or config.compile),
    ):
        settings = dataclasses.replace(settings, **ONE_ADAMW)
        rows = PackedRows([documents], settings.block_size, tokenizer.pad_id)
        yield compare_steps(title, settings, rows, documents, device, dtype, rounds, compile)
        torch.compiler.reset()
        free_memory(device)
    title = f"rows of {full.block_size} tokens, {N_DOCUMENTS:,} synthetic documents"
    yield {"title": title, "rows": token_use(rows, documents)}
