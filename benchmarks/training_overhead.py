"""Overheads of a run of train.py beside its steps: data, Hessian, evaluation, checkpoints."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import model_config, train_config
from benchmarks.report import record_values
from benchmarks.timing import seconds_of, time_waits
from checkpoint import CheckpointWriter
from model import GPT
from tokenizer import load_tokenizer
from training.packing import PackedRows
from training.trainer import Trainer, prefetch_steps


def measure_overhead(
    config: Any,
    rows: PackedRows,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool,
    steps: int,
    folder: Path,
) -> None:
    """Time that a run of train.py spends beside its steps, as shares at its own intervals.

    `config` is a smaller batch of train.py's settings with SophiaG. The times of a step, of a
    Hessian estimate and of an evaluation are measured on it and scaled to train.py's numbers of
    rows; the wait for data is that of the real prefetching thread.
    """
    full, tokenizer, gpu = train_config(), load_tokenizer(), device.type == "cuda"
    trainer = Trainer(GPT(model_config(config)).to(device), config, device, dtype)
    batch, rows_per_step = config.batch_size, config.batch_size * config.gradient_accumulation_steps
    if compile:
        torch.compiler.reset()  # what it has seen of other batch sizes would make them dynamic
        trainer.try_compile(rows.batch(range(batch)))
    first = rows.batch(range(batch))
    trainer.update_hessian(first)
    shape = (batch, config.gradient_accumulation_steps)
    batches = prefetch_steps(rows, 0, (steps + 1) * rows_per_step, *shape, pin=gpu)
    try:
        times = time_waits(iter(batches), partial(trainer.step, lr=1e-4), device, warmup=1)
        wait, elapsed = map(sum, times)
    finally:
        batches.close()
    hessian = seconds_of(partial(trainer.update_hessian, first), 10 if gpu else 1, device)
    token_bytes = torch.from_numpy(tokenizer.token_bytes)
    trainer.sample_text(tokenizer)  # the first one may compile the decoding step
    if gpu:
        trainer.evaluate(rows, token_bytes)
    evaluation = seconds_of(partial(trainer.evaluate, rows, token_bytes), 1, device)
    sample = seconds_of(partial(trainer.sample_text, tokenizer), 1, device)
    save, write = checkpoint_seconds(trainer, folder)

    full_rows = full.batch_size * full.gradient_accumulation_steps
    step = elapsed / steps * full_rows / rows_per_step  # of train.py
    hessian *= full.batch_size / batch
    evaluation = evaluation * full.eval_rows / min(config.eval_rows, rows.rows_per_epoch) + sample
    interval = full.eval_interval * step + evaluation + save
    hessian_share = hessian / (hessian + full.hess_interval * step)
    values = {
        f"step of {full_rows * rows.block_size:,} tokens": {"seconds": step},
        "wait for data": {"seconds": wait / steps, "share": wait / elapsed},
        "Hessian estimate": {"seconds": hessian, "share": hessian_share},
        "evaluation": {"seconds": evaluation, "share": evaluation / interval},
        "checkpoint, blocking": {"seconds": save, "share": save / interval},
        "checkpoint, in the background": {"seconds": write},
    }
    title = f"a run of train.py, as measured on {steps} steps of {rows_per_step} rows"
    record_values("train", title, values)


def checkpoint_seconds(trainer: Trainer, folder: Path) -> tuple[float, float]:
    """Seconds that one checkpoint stops the loop, and that its thread then writes."""
    writer = CheckpointWriter(folder / "checkpoints", keep=1)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    started = time.perf_counter()
    writer.save(trainer.state(1, 0, 1.0, "", "", None), best=False)
    save = time.perf_counter() - started
    writer.wait()
    return save, time.perf_counter() - started - save
