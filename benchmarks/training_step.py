"""Training speed: whole steps of ours and of its peers, the output head, and what else a run does.

    python benchmark.py --section=train

A step is forward, backward, clipping and optimizer over all its micro-batches, with the same fused
AdamW for everyone, so that the optimizer does not decide. Rows are packed from documents with
log-normal lengths fitted to FineWeb-Edu; the original pads documents of the same distribution.
It has its own dropout of 0.1. Compiled peers get the larger micro-batches that ours gets, too.
Rates count labelled tokens only. The limit is PaLM's count of FLOPs (2204.02311, appendix B), of
padding too, at this machine's matmul rate: the column is the MFU.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.inputs import SHAPE, demo_config, make_documents, train_config
from benchmarks.optimizer import LaunchPerParameter
from benchmarks.peers import (
    PlainTrainer,
    liger_loss,
    litgpt_loss,
    litgpt_of,
    llama_loss,
    llama_of,
    original_loss,
    original_of,
    padded_rows,
    plain_rows,
)
from benchmarks.timing import compare, free, limits, peer
from benchmarks.training_overhead import shares
from dataset import NpzDataset
from model import GPT, GPTConfig
from ops.cross_entropy import linear_cross_entropy
from tokenizer import load_tokenizer
from training.packing import Batch, PackedRows
from training.trainer import Trainer


class Batches:
    """Batches of `steps` steps in every contestant's form, each a list of steps' micro-batches."""

    def __init__(self, rows: PackedRows, documents: NpzDataset, config: Any, steps: int, pin: bool):
        shape = (config.batch_size, config.gradient_accumulation_steps)
        end = steps * shape[0] * shape[1]
        rng = np.random.default_rng(0)
        self.packed = list(rows.steps(0, end, *shape))
        self.plain = [[plain_rows(batch, rows.pad_id) for batch in s] for s in self.packed]
        padded = partial(padded_rows, documents, rows.block_size, shape[0], rows.pad_id, rng)
        self.padded = [[padded() for _ in range(shape[1])] for _ in range(steps)]
        if pin:
            for kind in (self.packed, self.plain, self.padded):
                kind[:] = [[batch.pin_memory() for batch in step] for step in kind]
        self.slots = end // steps * rows.block_size  # tokens and padding of a step


def labels_per_step(steps: list[list[Batch]]) -> float:
    return sum(batch.n_labels for step in steps for batch in step) / len(steps)


def steps_of(trainer: Trainer | PlainTrainer, steps: list[list[Batch]]) -> Callable[[], object]:
    """A contestant: each call trains on the next step's batches, in a circle."""
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


class CausalRun(Trainer):
    """Ours without document masks: rows are plain text, attention is causal alone."""

    def loss_sum(
        self, batch: Batch, sample_targets: bool = False, forward: Any = None
    ) -> torch.Tensor:
        ids, targets = (t.to(self.device, non_blocking=True) for t in batch.tensors()[:2])
        with self.autocast():
            return (forward or self.forward)(ids, targets, sample_targets=sample_targets)


def compiled(model: torch.nn.Module, mode: str = "default") -> Callable:
    """torch.compile for static shapes: several shapes of one model must not make it dynamic."""
    return torch.compile(model, dynamic=False, mode=mode)


def variant(run: Trainer, forward: Callable, kind: type[Trainer] = Trainer) -> Trainer:
    """`run` with another forward pass, sharing its weights and optimizer."""
    other = copy.copy(run)
    other.__class__ = kind
    other.forward = other.parallel = forward
    return other


def steps_table(
    title: str,
    config: Any,
    rows: PackedRows,
    documents: NpzDataset,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    compile: bool,
    peers: tuple[str, ...],
    autotune: bool = False,
) -> None:
    """Times steps of ours and of `peers`; prints useful tokens/s, ratios and MFU.

    `autotune`, on a GPU, adds the modes of torch.compile that try kernels out, which takes minutes.
    """
    shape = {name: getattr(config, name) for name in SHAPE}
    shape = GPTConfig(**shape, vocab_size=load_tokenizer().vocab_size)
    gpu = device.type == "cuda"
    batches = Batches(rows, documents, config, steps=2, pin=gpu)
    contestants: dict[str, Callable[[], object]] = {}
    useful: dict[str, float] = {}

    def add(name: str, trainer: Trainer | PlainTrainer, steps: list[list[Batch]]) -> None:
        contestants[name], useful[name] = steps_of(trainer, steps), labels_per_step(steps)

    larger = {}  # as many rows a step in larger micro-batches, for all that are compiled
    slots = config.batch_size * config.gradient_accumulation_steps
    for batch_size in (16, 32, 64) if gpu else ():
        if batch_size != config.batch_size and slots % batch_size == 0:
            changes = dict(batch_size=batch_size, gradient_accumulation_steps=slots // batch_size)
            other = dataclasses.replace(config, **changes)
            larger[f"micro-batches of {batch_size}"] = Batches(rows, documents, other, 2, gpu)

    def add_peer(name: str, model: Any, loss_of: Any, kind: str, more: bool = True) -> None:
        """A peer, eager and compiled; `kind` of batches; compiled with `more` settings of ours."""
        if model is None or loss_of is None:
            return
        plain = PlainTrainer(model, loss_of, config, device, dtype)
        add(name, plain, getattr(batches, kind))
        if not compile:
            return
        faster = copy.copy(plain)
        faster.forward = compiled(model)
        name = f"{name}, torch.compile"
        add(name, faster, getattr(batches, kind))
        for size, other in larger.items() if more else ():
            add(f"{name}, {size}", faster, getattr(other, kind))
        if autotune and more:
            tuned = copy.copy(plain)
            tuned.forward = compiled(model, "max-autotune-no-cudagraphs")
            add(f"{name}, max-autotune", tuned, getattr(batches, kind))

    if "transformers" in peers:
        add_peer("transformers Llama", llama_of(shape), llama_loss, "plain")
    if "litgpt" in peers:
        add_peer("litgpt GPT", litgpt_of(shape), litgpt_loss, "packed", more=False)
    if "original" in peers:
        old = dataclasses.replace(shape, dropout=0.1)
        loss_of = original_loss(rows.pad_id)
        if (model := original_of(old)) is not None:
            add_peer("original Lille, padded", model, loss_of, "padded")
            if gpu:
                own = LaunchPerParameter(model.parameters())
                for mode in ("default", "max-autotune") if autotune else ("default",):
                    forward = compiled(model, mode) if compile else None
                    trainer = PlainTrainer(model, loss_of, config, device, dtype, forward, own)
                    name = "original Lille, its optimizer"
                    name += "" if mode == "default" else f", {mode}"  # as it trains: CUDA graphs
                    add(name, trainer, batches.padded)
    if "liger" in peers and gpu:
        llama = llama_of(shape)
        if (loss_of := liger_loss(llama)) is not None:
            trainer = PlainTrainer(llama, loss_of, config, device, dtype, llama.model)
            add("transformers Llama, liger loss", trainer, batches.plain)
            if compile:
                trainer = copy.copy(trainer)
                trainer.forward = compiled(llama.model)
                add("transformers Llama, liger loss, torch.compile", trainer, batches.plain)
    elif "liger" in peers:
        print("skipped: liger-kernel's loss needs a GPU")

    ours = Trainer(GPT(shape).to(device), config, device, dtype)
    add("ours", ours, batches.packed)
    if compile:
        add("ours, torch.compile", variant(ours, compiled(ours.model)), batches.packed)
    if gpu:
        wrap = compiled if compile else lambda model: model
        causal = variant(ours, wrap(ours.model), CausalRun)
        add("ours, no document masks", causal, batches.packed)
        for size, other in larger.items():
            add(f"ours, {size}", variant(ours, wrap(ours.model)), other.packed)
        if autotune:
            forward = compiled(ours.model, "max-autotune-no-cudagraphs")
            add("ours, max-autotune", variant(ours, forward), batches.packed)

    (rate,) = limits(device).matmul_rate.values()
    fastest = ours.model.flops_per_token() * batches.slots / rate
    n_rows = f"{config.gradient_accumulation_steps} x {config.batch_size}"
    title = f"{title}, {ours.model.n_parameters():,} parameters, {n_rows} x {config.block_size} "
    title += f"tokens, {str(dtype)[6:]}, AdamW"
    with torch._dynamo.config.patch(recompile_limit=64):
        compare(
            "train",
            title,
            contestants,
            rounds,
            device,
            baseline="transformers Llama, torch.compile" if gpu and compile else None,
            work=("tokens/s", useful),
            bound=dict.fromkeys(contestants, fastest),
        )


def head_table(
    n_embd: int,
    vocab_size: int,
    n: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    compile: bool,
) -> None:
    """Output head and cross-entropy of `n` tokens, forward and backward."""
    gpu = device.type == "cuda"
    weight = (torch.randn(vocab_size, n_embd, device=device) * 0.02).requires_grad_()
    x = torch.randn(n, n_embd, device=device, requires_grad=True)
    targets = torch.randint(vocab_size, (n,), device=device)

    def plain() -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight), targets)

    def ours() -> torch.Tensor:
        return linear_cross_entropy(x, weight, targets) / n

    losses = {"F.cross_entropy": plain}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # PyTorch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        losses["F.linear_cross_entropy, chunked"] = lambda: F.linear_cross_entropy(
            x, weight, targets, options=options
        )
    if gpu and (liger := peer("liger_kernel.transformers")) is not None:
        criterion = liger.LigerFusedLinearCrossEntropyLoss()
        losses["liger-kernel"] = lambda: criterion(weight, x, targets)
    if gpu and compile:
        losses["F.cross_entropy, torch.compile"] = compiled(plain)
        losses["ours, torch.compile"] = compiled(ours)
    losses["ours"] = ours

    def contestant(loss_of: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = weight.grad = None
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = loss_of()
            loss.backward()

        return run

    (rate,) = limits(device).matmul_rate.values()
    contestants = {name: contestant(loss_of) for name, loss_of in losses.items()}
    title = f"output head and cross-entropy, {n:,} tokens, n_embd {n_embd}, {vocab_size:,} logits"
    bound = dict.fromkeys(contestants, 6 * n * n_embd * vocab_size / rate)
    compare("train", title, contestants, rounds, device, work=("tokens/s", float(n)), bound=bound)


def run(config: Any, device: torch.device) -> None:
    """The section: the head, steps of the full and of the demo's model, the rest of a run.

    `config` has the shape (n_layers, n_embd, ...), batch_size (0: 2 rows on a CPU, 16 on a GPU),
    gradient_accumulation_steps (0: 1 and 16), dtype, rounds, compile.
    """
    gpu, dtype = device.type == "cuda", getattr(torch, config.dtype)
    tokenizer = load_tokenizer()
    batch = dict(
        batch_size=config.batch_size or (16 if gpu else 2),
        gradient_accumulation_steps=config.gradient_accumulation_steps or (16 if gpu else 1),
    )
    shape = {name: getattr(config, name) for name in SHAPE}
    full = train_config(["--optimizer=adamw"], **shape, **batch)
    small = demo_config()
    compile = config.compile or gpu
    for n_embd in (small.n_embd, full.n_embd):
        n = 16384 if gpu else 1024
        head_table(n_embd, tokenizer.vocab_size, n, device, dtype, config.rounds, compile)
        free(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = make_documents(folder / "train.npz", 4000, tokenizer.n_text)
        for title, chosen, peers in (
            ("the demo's model", small, ("litgpt", "transformers")),
            ("full model", full, ("transformers", "litgpt", "original", "liger")),
        ):
            rows = PackedRows([documents], chosen.block_size, tokenizer.pad_id)
            rounds = config.rounds if chosen is full else 2 * config.rounds
            wanted = compile if chosen is full else False  # as the demo trains
            autotune = config.compile and chosen is full
            steps_table(
                title, chosen, rows, documents, device, dtype, rounds, wanted, peers, autotune
            )
            if wanted:
                torch.compiler.reset()  # and the memory of its CUDA graphs
            free(device)
        rows = PackedRows([documents], full.block_size, tokenizer.pad_id)
        changes = dict(optimizer="sophiag", eval_rows=2 * batch["batch_size"])
        sophia = dataclasses.replace(full, **changes)
        shares(sophia, rows, device, dtype, compile, 20 if gpu else 2, folder)
        del rows, documents  # the mapped file, before its folder
