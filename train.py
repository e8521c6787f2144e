"""Pretrains Lille, or fine-tunes it on conversations: edit the constants and run.

    python train.py                                  # pretrain on the shards in data_dir
    python train.py --finetune=True                  # fine-tune finetune_checkpoint
    python train.py --n_layers=6 --batch_size=4      # any constant can be given as --name=value

Run the same command again to continue an interrupted run. Ctrl-C and SIGTERM finish the step, save
and exit with 130 and 143. `out_dir` gets best_model.pt, the last ckpt_*.pt, metrics.jsonl and
loss_curve.png. From Python: `train(config)` with a config of `config_from_constants`.
"""

import dataclasses
import math
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from checkpoint import CheckpointWriter, load_checkpoint, model_of
from config import UserError, config_from_constants, run_script
from dataset import open_split
from metrics import Metrics, Progress
from model import GPT, GPTConfig
from packing import ChatFormat, PackedRows, Prefetcher
from preflight import (
    check_disk,
    check_resume,
    check_schedule,
    check_settings,
    check_tokenizer,
    choose_device,
    find_checkpoint,
)
from tokenizer import Tokenizer, load_tokenizer
from training import Run

# Where things are
data_dir = "data/fineweb_edu_sample_10BT"  # shards to pretrain on
out_dir = "checkpoints"  # checkpoints, metrics and the loss curve
resume_checkpoint = "auto"  # "auto": the newest in out_dir, if any; a path; "": refuse to continue
keep_checkpoints = 2  # how many ckpt_*.pt stay, beside best_model.pt

# Model (a fine-tune takes its shape from finetune_checkpoint)
n_layers = 24
n_embd = 640  # a multiple of n_heads
n_heads = 10
n_kv_heads = 2
block_size = 512  # context, tokens
dropout = 0.0
layer_norm_eps = 1e-5

# Batches: batch_size * gradient_accumulation_steps * block_size = 131,072 tokens a step
batch_size = 16  # rows of block_size tokens per micro-batch
gradient_accumulation_steps = 16  # micro-batches per step
num_epochs = 1  # passes over the data
max_steps = 0  # stop here if this comes first; 0: num_epochs alone decides

# Optimizer: "sophiag", or "adamw" (PyTorch's fused one, with its own betas)
optimizer = "sophiag"
learning_rate = 1e-3  # peak
min_lr_ratio = 0.1  # the cosine ends at this share of the peak
warmup_iters = 2000  # steps of linear warm-up
weight_decay = 0.1  # on matrices; norms have none
beta1 = 0.965  # SophiaG
beta2 = 0.99  # SophiaG, for the Hessian
rho = 0.05  # SophiaG; watch the win rate, healthy at 0.1 to 0.5
hess_interval = 10  # steps between Hessian estimates, each on one micro-batch
adamw_beta1 = 0.9
adamw_beta2 = 0.95
grad_clip = 1.0  # largest gradient norm; 0: no clipping

# Fine-tuning
finetune = False  # True: use the finetune_* values in place of their namesakes above
finetune_checkpoint = "checkpoints/best_model.pt"  # weights to start from
finetune_data_dir = "data/finetune"
finetune_out_dir = "checkpoints_ft"
finetune_learning_rate = 1e-4
finetune_num_epochs = 3
finetune_warmup_iters = 20
finetune_gradient_accumulation_steps = 1

# Evaluation and logging
eval_interval = 500  # steps between evaluations, each with a checkpoint and a text sample
eval_rows = 1024  # validation rows, the same ones every time
log_interval = 10  # steps between metrics
sample_prompt = "The most important thing about science is"
finetune_sample_prompt = "What is the capital of France?"
sample_tokens = 48  # longest sample; 0: none
wandb_log = False
wandb_project = "lille"

# System
device = "auto"  # "cuda", "mps" or "cpu"
dtype = "auto"  # "bfloat16" or "float16" (cuda), "float32"
compile = True  # torch.compile, where it works
seed = 1337  # of weights, order, dropout and sampled labels


class Interrupted(Exception):
    """A signal stopped the run, after it was saved; the message says how to continue."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class StopSignals:
    """Notes the first SIGINT or SIGTERM for the loop to see; a second one acts at once."""

    def __enter__(self) -> "StopSignals":
        self.signum: int | None = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        self.previous = {
            signum: signal.signal(signum, self.note)
            for signum in ((signal.SIGINT, signal.SIGTERM) if in_main_thread else ())
        }
        return self

    def note(self, signum: int, frame: Any) -> None:
        self.signum = signum
        print("\nstopping after this step; once more stops at once", file=sys.stderr, flush=True)
        self.restore()

    def restore(self) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def __exit__(self, *error: Any) -> None:
        self.restore()


def learning_rate_at(step: int, peak: float, warmup: int, total: int, min_ratio: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from `peak` to `min_ratio * peak`.

    Steps count from 0; step 0 already has peak / (warmup + 1), the last one min_ratio * peak.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (min_ratio + (1 - min_ratio) * cosine)


def run_settings(config: Any) -> Any:
    """The settings in force: with `finetune`, the finetune_* values under their plain names."""
    if not config.finetune:
        return config
    if Path(config.finetune_out_dir).resolve() == Path(config.out_dir).resolve():
        raise UserError(
            "finetune_out_dir and out_dir are the same folder, so a fine-tune would overwrite the "
            "pretrained model: change finetune_out_dir"
        )
    names = ("data_dir", "out_dir", "learning_rate", "num_epochs", "warmup_iters")
    names += ("gradient_accumulation_steps", "sample_prompt")
    return dataclasses.replace(config, **{n: getattr(config, f"finetune_{n}") for n in names})


def open_rows(
    directory: str, split: str, tokenizer: Tokenizer, block_size: int, seed: int, chat: bool
) -> PackedRows:
    """The packed rows of a split; UserError when it has no label to train on."""
    shards = open_split(directory, split, tokenizer.sha256, tokenizer.vocab_size)
    format = ChatFormat(tokenizer.bos_id, tokenizer.user_id, tokenizer.assistant_mask)
    rows = PackedRows(shards, block_size, tokenizer.pad_id, seed, format if chat else None)
    if rows.rows_per_epoch == 0 or rows.batch([0]).n_labels == 0:
        kind = "conversation that fits the context" if chat else "text"
        raise UserError(f"{directory}: its {split} split has no {kind}; prepare it again")
    return rows


def build_model(config: Any, tokenizer: Tokenizer) -> GPT:
    """A new model of the configured shape, or in a fine-tune the one to start from."""
    if config.finetune:
        state = load_checkpoint(config.finetune_checkpoint)
        check_tokenizer(state, config.finetune_checkpoint, tokenizer.sha256)
        return model_of(state, config.finetune_checkpoint, dropout=config.dropout)
    try:
        shape = {f.name: getattr(config, f.name, f.default) for f in dataclasses.fields(GPTConfig)}
        return GPT(GPTConfig(**shape | {"vocab_size": tokenizer.vocab_size}))
    except ValueError as error:
        raise UserError(str(error)) from None


def batches_of(rows: PackedRows, first: int, end: int, config: Any, pin: bool) -> Prefetcher:
    """The micro-batches of each step, prepared in a thread ahead of the loop."""
    steps = rows.steps(first, end, config.batch_size, config.gradient_accumulation_steps)
    if pin:  # copies to a GPU from page-locked memory do not block
        steps = ([batch.pin_memory() for batch in batches] for batches in steps)
    return Prefetcher(steps)


def train(config: Any) -> dict[str, Any]:
    """Trains as configured and returns the last metrics: step, loss, val_loss, best_val_loss, ...

    Raises UserError before the first step for settings, data or checkpoints that do not fit, and
    Interrupted when a signal ended the run, after saving it.
    """
    pretrain_data_dir, config = config.data_dir, run_settings(config)
    check_settings(config)
    device, dtype = choose_device(config)
    out_dir = Path(config.out_dir)
    tokenizer = load_tokenizer()
    found = find_checkpoint(config)

    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer)
    check_disk(out_dir, model, config.keep_checkpoints)
    block_size, chat = model.config.block_size, config.finetune
    rows = open_rows(config.data_dir, "train", tokenizer, block_size, config.seed, chat)
    validation = {"val": open_rows(config.data_dir, "val", tokenizer, block_size, 0, chat)}
    if config.finetune and Path(pretrain_data_dir).is_dir():
        name = "pretrain_val"
        validation[name] = open_rows(pretrain_data_dir, "val", tokenizer, block_size, 0, False)

    step, row, best, data = 0, 0, math.inf, rows.description
    run = Run(model.to(device), config, device, dtype)
    if found is not None:
        path, state = found
        changes = check_resume(config, path, state, model, data, tokenizer.sha256)
        step, row, best = run.restore(state)
        print(f"continuing {path} at step {step}" + "".join(f"; {c}" for c in changes))
    end_row = rows.rows_per_epoch * config.num_epochs
    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    total_steps = step + math.ceil(max(0, end_row - row) / rows_per_step)
    if config.max_steps:
        total_steps = min(total_steps, config.max_steps)
    check_schedule(config, total_steps)
    print_summary(run, rows, total_steps, validation)

    writer = CheckpointWriter(out_dir, config.keep_checkpoints)
    wandb = {"project": config.wandb_project, "config": dataclasses.asdict(config)}
    metrics = Metrics(out_dir, step, wandb if config.wandb_log else None)
    if step >= total_steps:
        print(f"{out_dir} is already trained to step {step} of {total_steps}; nothing to do")
        return metrics.last() | {"step": step, "best_val_loss": best}
    if config.compile:
        run.try_compile(rows.batch(range(config.batch_size)))
    schedule = (config.learning_rate, config.warmup_iters, total_steps, config.min_lr_ratio)
    progress = Progress(step, total_steps, model.flops_per_token(), device)
    batches = batches_of(rows, row, end_row, config, pin=device.type == "cuda")
    window: list[torch.Tensor] = []
    try:
        with StopSignals() as stop:
            for micro_batches in batches:
                lr = learning_rate_at(step, *schedule)
                if config.optimizer == "sophiag" and step % config.hess_interval == 0:
                    run.update_hessian(micro_batches[0])
                loss, norm = run.step(micro_batches, lr)
                step, row = step + 1, row + rows_per_step
                window.append(loss)
                progress.advance(sum(batch.n_labels for batch in micro_batches))
                evaluating = step % config.eval_interval == 0 or step == total_steps

                if step % config.log_interval == 0 or evaluating:
                    values = {"loss": torch.stack(window).mean().item(), "lr": lr}
                    window.clear()
                    values |= progress.rate()
                    if config.optimizer == "sophiag":
                        values["win_rate"] = run.optimizer.win_rate.item()
                    progress.show(**values)
                    metrics.log(step, **values, grad_norm=norm.item())
                    run.check_finite()
                if evaluating:
                    with progress.paused():
                        results = run.evaluate_all(validation, tokenizer)
                        is_best = results["val_loss"] < best
                        best = min(best, results["val_loss"])
                        metrics.log(step, **results)
                        metrics.plot()
                        progress.write(describe(step, results, is_best))
                        saved = writer.save(run.state(step, row, best, data, tokenizer), is_best)
                if stop.signum is not None and step < total_steps:
                    if not evaluating:
                        saved = writer.save(run.state(step, row, best, data, tokenizer), False)
                    writer.wait()
                    raise Interrupted(stop.signum, resume_hint(config, saved, step))
                if step == total_steps:
                    break
        writer.wait()
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of GPU memory: lower batch_size (now {config.batch_size}) and raise "
            "gradient_accumulation_steps by the same factor; or lower block_size or n_layers"
        ) from None
    finally:
        batches.close()
        progress.close()
        metrics.close()
        writer.join()
    print(f"done: best validation loss {best:.4f}, in {out_dir}/best_model.pt")
    return metrics.last() | {"step": step, "best_val_loss": best}


def print_summary(run: Run, rows: PackedRows, total: int, validation: dict[str, Any]) -> None:
    """What is about to be trained, on what and for how long."""
    config, model = run.config, run.model
    per_step = config.batch_size * config.gradient_accumulation_steps * rows.block_size
    print(
        f"{model.n_parameters():,} parameters on {run.device} ({str(run.dtype)[6:]}), "
        f"{config.optimizer}, {total:,} steps of {per_step:,} tokens"
    )
    print(
        f"{config.data_dir}: {rows.description}; {rows.rows_per_epoch:,} rows of "
        f"{rows.block_size}, {rows.fill:.2%} full, {config.num_epochs} epochs; validation on "
        f"{min(config.eval_rows, validation['val'].rows_per_epoch):,} rows"
    )
    if rows.n_shortened or rows.n_dropped:
        print(
            f"{rows.n_shortened} conversations longer than {rows.block_size} tokens keep their "
            f"most recent turns; {rows.n_dropped} whose last turn alone is too long are left out"
        )


def describe(step: int, results: dict[str, Any], is_best: bool) -> str:
    """The lines that an evaluation prints."""
    numbers = ", ".join(f"{k} {v:.4f}" for k, v in results.items() if isinstance(v, float))
    line = f"step {step}: {numbers}" + (" (best so far)" if is_best else "")
    return line + (f"\n    {results['sample']!r}" if "sample" in results else "")


def resume_hint(config: Any, saved: Path, step: int) -> str:
    """How to continue an interrupted run."""
    how = "run the same command again to continue"
    if config.resume_checkpoint != "auto":
        how = f"to continue, add --resume_checkpoint={saved}"
    return f"interrupted at step {step} and saved as {saved}; {how}"


def main(argv: list[str] | None = None) -> int:
    try:
        train(config_from_constants(globals(), argv))
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return 128 + interruption.signum
    return 0


if __name__ == "__main__":
    run_script(main)
