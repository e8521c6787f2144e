"""Training speed: whole steps of ours and of its peers, and the use of tokens.

    python benchmark.py --section=train

A step is forward, backward, clipping and optimizer over all its micro-batches, with the same fused
AdamW for everyone, so that the optimizer does not decide. Rows are packed from documents with
log-normal lengths fitted to FineWeb-Edu; the original pads documents of the same distribution and
has its own dropout of 0.1. Compiled implementations also get larger micro-batches. Rates count
labelled tokens only. The limit is PaLM's count of FLOPs (2204.02311, appendix B), of padding too,
at this machine's matmul rate: the column is the MFU.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.inputs import SHAPE, demo_config, make_documents, model_config, train_config
from benchmarks.peers import (
    PlainTrainer,
    liger_loss,
    litgpt_loss,
    litgpt_of,
    llama_loss,
    llama_of,
    one_segment_rows,
    original_loss,
    original_of,
    padded_rows,
    plain_rows,
)
from benchmarks.report import record_values
from benchmarks.timing import compare, free_memory, limits
from dataset import NpzDataset
from model import GPT
from tokenizer import load_tokenizer
from training.packing import Batch, PackedRows
from training.trainer import Trainer

N_DOCUMENTS = 20_000
Steps = list[list[Batch]]  # the micro-batches of each step


def make_steps(
    rows: PackedRows, documents: NpzDataset, size: int, count: int, n_steps: int, pin: bool
) -> dict[str, Steps]:
    """Micro-batches of steps, `count` of `size` rows each, in the forms that implementations read.

    "packed" with document masks, "causal" without, "plain" for transformers, "padded" documents.
    """
    rng = np.random.default_rng(0)
    packed = list(rows.steps(0, n_steps * size * count, size, count))
    steps = {
        "packed": packed,
        "causal": [[one_segment_rows(b.ids, b.targets) for b in step] for step in packed],
        "plain": [[plain_rows(b, rows.pad_id) for b in step] for step in packed],
        "padded": [
            [padded_rows(documents, rows.block_size, size, rows.pad_id, rng) for _ in step]
            for step in packed
        ],
    }
    if pin:
        steps = {k: [[b.pin_memory() for b in step] for step in s] for k, s in steps.items()}
    return steps


def labels_per_step(steps: Steps) -> float:
    return sum(batch.n_labels for step in steps for batch in step) / len(steps)


def step_function(trainer: Trainer | PlainTrainer, steps: Steps) -> Callable[[], None]:
    """A function that trains on the next step's batches, in a circle."""
    turn = 0

    def run() -> None:
        nonlocal turn
        try:
            trainer.step(steps[turn % len(steps)], lr=1e-4)
        except BaseException:  # others may train this model too: leave them none of its gradients
            trainer.model.zero_grad(set_to_none=True)
            raise
        turn += 1

    return run


def with_compiled(trainer: Trainer | PlainTrainer, mode: str) -> Trainer | PlainTrainer:
    """The trainer with a compiled forward pass, sharing weights and optimizer.

    For static shapes: several batch sizes of one model must not make them dynamic.
    """
    other = copy.copy(trainer)
    other.forward = other.parallel = torch.compile(trainer.forward, dynamic=False, mode=mode)
    return other


def compare_steps(
    title: str,
    config: Any,
    rows: PackedRows,
    documents: NpzDataset,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    modes: Sequence[str] = (),
    peers: Sequence[str] = (),
) -> None:
    """Times steps of ours and of `peers`, eager and compiled in each of `modes`.

    The main ones also with as many rows in larger micro-batches, compiled on CUDA.
    """
    shape, gpu = model_config(config), device.type == "cuda"
    n_rows = config.batch_size * config.gradient_accumulation_steps
    sizes = [config.batch_size]
    sizes += [n for n in (16, 32, 64) if gpu and modes and n not in sizes and n_rows % n == 0]
    steps = {}
    for size in sizes:
        steps[size] = make_steps(rows, documents, size, n_rows // size, n_steps=2, pin=gpu)
    functions: dict[str, Callable[[], None]] = {}
    labels: dict[str, float] = {}

    def add(name: str, trainer: Trainer | PlainTrainer, form: str, larger: bool = False) -> None:
        for mode in (None, *modes):
            variant = with_compiled(trainer, mode) if mode else trainer
            mode_name = {None: "", "default": ", torch.compile"}.get(mode, f", {mode}")
            for size in sizes if larger and mode == "default" else sizes[:1]:
                size_name = f", micro-batches of {size}" if size != sizes[0] else ""
                functions[name + mode_name + size_name] = step_function(variant, steps[size][form])
                labels[name + mode_name + size_name] = labels_per_step(steps[size][form])

    def add_peer(
        name: str, model: Any, loss_of: Any, form: str, larger: bool = False, **options: Any
    ) -> None:
        if model is not None and loss_of is not None:
            add(name, PlainTrainer(model, loss_of, config, device, dtype, **options), form, larger)

    if "transformers" in peers:
        add_peer("transformers Llama", llama_of(shape), llama_loss, "plain", larger=True)
    if "litgpt" in peers:
        add_peer("litgpt GPT", litgpt_of(shape), litgpt_loss, "packed")
    if "original" in peers:
        model = original_of(dataclasses.replace(shape, dropout=0.1))
        loss_of = original_loss(rows.pad_id)
        add_peer("original Lille, padded", model, loss_of, "padded", larger=True)
    if "liger" in peers and gpu:
        if (llama := llama_of(shape)) is not None:
            name = "transformers Llama, liger loss"
            add_peer(name, llama, liger_loss(llama), "plain", forward=llama.model)
    elif "liger" in peers:
        print("skipped: liger-kernel's loss needs a GPU")
    ours = Trainer(GPT(shape).to(device), config, device, dtype)
    add("ours", ours, "packed", larger=True)
    if gpu:
        add("ours, no document masks", ours, "causal")

    (rate,) = limits(device).matmul_rate.values()
    fastest = ours.model.flops_per_token() * n_rows * rows.block_size / rate
    batch = f"{config.gradient_accumulation_steps} x {config.batch_size} x {config.block_size}"
    title = f"{title}, {ours.model.n_parameters():,} parameters, {batch} tokens, {str(dtype)[6:]}"
    with torch._dynamo.config.patch(recompile_limit=64):
        compare(
            "train",
            f"{title}, AdamW",
            functions,
            rounds,
            device,
            baseline="transformers Llama, torch.compile",
            work=("tokens/s", labels),
            bound=dict.fromkeys(functions, fastest),
        )


def token_use(rows: PackedRows, documents: NpzDataset) -> dict[str, dict[str, float]]:
    """Share of filled positions and of tokens ever trained on, the original's and ours.

    The original draws documents with replacement and trains on the first `block_size` tokens.
    """
    lengths = np.diff(documents.offsets.astype(np.int64))
    beginnings = np.minimum(lengths, rows.block_size)
    filled = beginnings.mean() / rows.block_size
    return {
        "original Lille": {"filled": filled, "trained on": beginnings.sum() / lengths.sum()},
        "ours": {"filled": rows.fill, "trained on": rows.lengths.sum() / lengths.sum()},
    }


def run(config: Any, device: torch.device) -> None:
    """The section: steps of the full and of the demo's model, and the use of tokens.

    `config` has the shape (n_layers, n_embd, ...), batch_size (0: 2 rows on a CPU, 16 on a GPU),
    gradient_accumulation_steps (0: 1 and 16), dtype, rounds, compile.
    """
    gpu, dtype = device.type == "cuda", getattr(torch, config.dtype)
    tokenizer = load_tokenizer()
    full = train_config(
        **{name: getattr(config, name) for name in SHAPE},
        optimizer="adamw",
        batch_size=config.batch_size or (16 if gpu else 2),
        gradient_accumulation_steps=config.gradient_accumulation_steps or (16 if gpu else 1),
    )
    small = demo_config()
    compile = config.compile or gpu
    # CUDA graphs are the mode in which the original trains; trying kernels out takes minutes.
    modes = ("default", "max-autotune") if gpu and config.compile else ("default",) * compile
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = make_documents(folder / "train.npz", N_DOCUMENTS, tokenizer.n_text)
        rows = PackedRows([documents], small.block_size, tokenizer.pad_id)
        where, rounds = (device, dtype), 2 * config.rounds
        peers = ("transformers", "litgpt")
        compare_steps("the demo's model", small, rows, documents, *where, rounds, (), peers)
        free_memory(device)
        rows = PackedRows([documents], full.block_size, tokenizer.pad_id)
        title = f"rows of {full.block_size} tokens, {N_DOCUMENTS:,} made-up documents"
        record_values("train", title, token_use(rows, documents))
        peers = ("transformers", "litgpt", "original", "liger")
        compare_steps("full model", full, rows, documents, *where, config.rounds, modes, peers)
        torch.compiler.reset()  # and the memory of its CUDA graphs
        free_memory(device)
        del rows, documents  # the mapped file, before its folder
