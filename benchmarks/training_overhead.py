"""What a run of train.py does beside its steps: data, Hessian, evaluation, checkpoints."""

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import SHAPE, train_config
from benchmarks.timing import facts, seconds_of, waits
from checkpoint import CheckpointWriter
from model import GPT, GPTConfig
from tokenizer import Tokenizer, load_tokenizer
from training.packing import Batch, PackedRows
from training.trainer import Trainer, prefetch_steps


def shares(
    config: Any,
    rows: PackedRows,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool,
    steps: int,
    folder: Path,
) -> None:
    """What a run of train.py spends beside its steps, as shares of its time at its own intervals.

    `config` is a smaller batch of train.py's settings with SophiaG. The times of a step, of a
    Hessian estimate and of an evaluation are measured on it and scaled to train.py's numbers of
    rows; the wait for data is that of the real prefetching thread.
    """
    full, tokenizer = train_config([]), load_tokenizer()
    shape = {name: getattr(config, name) for name in SHAPE}
    model = GPT(GPTConfig(**shape, vocab_size=tokenizer.vocab_size)).to(device)
    gpu = device.type == "cuda"
    run = Trainer(model, config, device, dtype)
    per_step = config.batch_size * config.gradient_accumulation_steps
    if compile:
        torch.compiler.reset()  # what it has seen of other batch sizes would make them dynamic
        run.try_compile(rows.batch(range(config.batch_size)))
    batches = prefetch_steps(
        rows,
        0,
        (steps + 1) * per_step,
        config.batch_size,
        config.gradient_accumulation_steps,
        pin=gpu,
    )

    def use(micro_batches: list[Batch]) -> None:
        run.step(micro_batches, lr=1e-4)

    first = rows.batch(range(config.batch_size))
    try:
        run.update_hessian(first)
        waited, elapsed = map(sum, waits(iter(batches), use, device, skipped=1))
    finally:
        batches.close()
    hessian = seconds_of(partial(run.update_hessian, first), 10 if gpu else 1, device)
    token_bytes = torch.from_numpy(tokenizer.token_bytes)
    run.sample_text(tokenizer)  # the first one may compile the decoding step
    if gpu:
        run.evaluate(rows, token_bytes)
    evaluation = seconds_of(partial(run.evaluate, rows, token_bytes), 1, device)
    sample = seconds_of(partial(run.sample_text, tokenizer), 1, device)
    save, write = checkpoint_seconds(run, tokenizer, folder)

    full_rows = full.batch_size * full.gradient_accumulation_steps
    step = elapsed / steps * full_rows / per_step  # of train.py
    hessian *= full.batch_size / config.batch_size
    evaluation *= full.eval_rows / min(config.eval_rows, rows.rows_per_epoch)
    between = full.eval_interval * step
    beside = evaluation + sample + save
    facts(
        "train",
        f"a run of train.py, as measured on {steps} steps of {per_step} rows",
        {
            f"step of {full_rows * rows.block_size:,} tokens": {"seconds": step},
            "wait for data": {"seconds": waited / steps, "share": waited / elapsed},
            "Hessian estimate": {
                "seconds": hessian,
                "share": hessian / (hessian + full.hess_interval * step),
            },
            "evaluation": {
                "seconds": evaluation + sample,
                "share": (evaluation + sample) / (between + beside),
            },
            "checkpoint, blocking": {"seconds": save, "share": save / (between + beside)},
            "checkpoint, in the background": {"seconds": write},
        },
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def checkpoint_seconds(run: Trainer, tokenizer: Tokenizer, folder: Path) -> tuple[float, float]:
    """How long one checkpoint stops the loop, and how long its thread then writes."""
    needed = 16 * run.model.n_parameters()
    if shutil.disk_usage(folder).free < needed:
        print(f"skipped: a checkpoint needs {needed / 1e9:.1f} GB in {folder}")
        return float("nan"), float("nan")
    writer = CheckpointWriter(folder / "checkpoints", keep=1)
    synchronize(run.device)
    started = time.perf_counter()
    writer.save(run.state(1, 0, 1.0, tokenizer.sha256, "", None), best=False)
    save = time.perf_counter() - started
    writer.wait()
    return save, time.perf_counter() - started - save
