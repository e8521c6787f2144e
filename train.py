"""Pretrains Lille, or fine-tunes it on conversations: edit the constants and run.

    python train.py                                  # pretrain on the shards in data_dir
    python train.py --finetune=True                  # fine-tune finetune_checkpoint
    python train.py --n_layers=6 --batch_size=4      # any constant can be given as --name=value
    torchrun --nproc_per_node=8 train.py             # the same run on 8 GPUs

Run the same command again to continue an interrupted run (resume_checkpoint = "auto"). Ctrl-C and
SIGTERM finish the step, save and exit with 130 and 143. `out_dir` gets best_model.pt, the last
ckpt_*.pt, metrics.jsonl and loss_curve.png. From Python: `train(config)` with a config of
`config_from_constants`.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from checkpoint import BEST, CheckpointWriter, load_checkpoint, model_of
from common.errors import UserError
from common.files import file_sha256, locked
from common.prefetch import Prefetcher
from common.settings import config_from_constants, run_script
from common.signals import SIGNALS, GracefulStop, Interrupted
from dataset import open_split
from model import GPT, GPTConfig
from tokenizer import Tokenizer, load_tokenizer
from training.checks import (
    FINETUNE_NAMES,
    check_disk,
    check_ranks,
    check_resume,
    check_sample_prompt,
    check_schedule,
    check_settings,
    check_tokenizer,
    choose_device,
    find_checkpoint,
    make_folder,
    setting,
)
from training.distributed import ALONE, Ranks, end, joined, ranks_of_environment, said_once
from training.metrics import Metrics, Progress, describe, last_metrics, print_summary
from training.packing import ChatFormat, PackedRows
from training.trainer import Run, prompt_ids

# Where things are
data_dir = "data/fineweb_edu_sample_10BT"  # shards to pretrain on
out_dir = "checkpoints"  # checkpoints, metrics and the loss curve
resume_checkpoint = "auto"  # "auto": the newest in out_dir, if any; a path; "": a new run only
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
gradient_accumulation_steps = 16  # micro-batches per step, dealt to the GPUs if there are several
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
hess_interval = 10  # steps between Hessian estimates
hess_batches = 1  # micro-batches of an estimate, averaged; of 8 GPUs each can make one of 8
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

# Several GPUs or machines, by torchrun
gradient_dtype = "float32"  # in which gradients are sent; "bfloat16" halves the bytes and rounds
distributed_timeout_minutes = 10.0  # a process that does not answer for so long is lost


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
    values = {name: getattr(config, f"finetune_{name}") for name in FINETUNE_NAMES}
    return dataclasses.replace(config, **values)


def open_rows(
    directory: str, split: str, tokenizer: Tokenizer, block_size: int, seed: int, chat: bool
) -> PackedRows:
    """The packed rows of a split; UserError when it has no label to train on."""
    shards = open_split(directory, split, tokenizer.sha256, tokenizer.vocab_size)
    format = ChatFormat(tokenizer.bos_id, tokenizer.user_id, tokenizer.assistant_mask)
    rows = PackedRows(shards, block_size, tokenizer.pad_id, seed, format if chat else None)
    if rows.batch(range(min(64, rows.rows_per_epoch))).n_labels == 0:
        kind = "conversation that fits the context" if chat else "text"
        raise UserError(f"{directory}: its {split} split has no {kind}; prepare it again")
    return rows


def build_model(
    config: Any,
    tokenizer: Tokenizer,
    path: Path | None,
    found: dict[str, Any] | None,
    ranks: Ranks,
) -> GPT:
    """The model to train: that of the checkpoint to continue, or of a fine-tune's base, or new."""
    if config.finetune:
        name = path or config.finetune_checkpoint
        state = found or ranks.broadcast(lambda: load_checkpoint(name))
        check_tokenizer(state, name, tokenizer.sha256)
        return model_of(state, name, dropout=config.dropout)
    try:
        shape = {f.name: getattr(config, f.name, f.default) for f in dataclasses.fields(GPTConfig)}
        return GPT(GPTConfig(**shape | {"vocab_size": tokenizer.vocab_size}))
    except ValueError as error:
        raise UserError(str(error)) from None


def described(rows: PackedRows) -> str:
    """What tells this data from other: it must be the same on every rank and after a resume."""
    return f"{rows.description} ({rows.fingerprint()})"


def open_validation(
    config: Any, pretrain_data_dir: str, tokenizer: Tokenizer, block_size: int
) -> dict[str, PackedRows]:
    """Validation rows by name: a fine-tune also watches what pretraining learned."""
    rows = open_rows(config.data_dir, "val", tokenizer, block_size, 0, config.finetune)
    validation = {"val": rows}
    if config.finetune:
        try:
            rows = open_rows(pretrain_data_dir, "val", tokenizer, block_size, 0, chat=False)
            validation["pretrain_val"] = rows
        except UserError as error:
            print(f"no pretraining validation loss: {error}")
    return validation


def base_of(config: Any) -> str | None:
    """The sha256 of the checkpoint that a fine-tune starts from; None if it is gone, or no base."""
    base = Path(config.finetune_checkpoint)
    return file_sha256(base) if config.finetune and base.is_file() else None


def batches_of(
    rows: PackedRows, first: int, end: int, config: Any, pin: bool, ranks: Ranks = ALONE
) -> Prefetcher:
    """This rank's micro-batches of each step, prepared in a thread ahead of the loop."""
    shape = (config.batch_size, config.gradient_accumulation_steps)
    steps = rows.steps(first, end, *shape, ranks.rank, ranks.world_size)
    if pin:  # copies to a GPU from page-locked memory do not block
        steps = ([batch.pin_memory() for batch in batches] for batches in steps)
    return Prefetcher(steps)


def train(config: Any) -> dict[str, Any]:
    """Trains as configured and returns the last metrics: step, loss, val_loss, best_val_loss, ...

    Raises UserError before the first step for settings, data or checkpoints that do not fit, and
    Interrupted when a signal ended the run, after saving it.
    """
    with joined(config.distributed_timeout_minutes) as ranks, ExitStack() as held:
        ranks.check_same(dataclasses.asdict(config))  # other settings would be other messages
        pretrain_data_dir, config = config.data_dir, run_settings(config)
        check_settings(config)
        check_ranks(config, ranks.world_size)
        if ranks.first:
            make_folder(Path(config.out_dir))
            held.enter_context(locked(Path(config.out_dir), "train.py"))
        with explained_out_of_memory(config):
            return run_training(config, pretrain_data_dir, ranks)


def run_training(config: Any, pretrain_data_dir: str, ranks: Ranks) -> dict[str, Any]:
    """`train` with the settings in force: build, resume, loop, save.

    Only the first rank reads and writes checkpoints and metrics.
    """
    device, dtype = choose_device(config, ranks)
    out_dir = Path(config.out_dir)
    tokenizer = load_tokenizer()
    path, found = ranks.broadcast(lambda: find_checkpoint(config) or (None, None))

    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer, path, found, ranks)
    block_size = model.config.block_size
    rows = open_rows(config.data_dir, "train", tokenizer, block_size, config.seed, config.finetune)
    validation = open_validation(config, pretrain_data_dir, tokenizer, block_size)
    every = [rows, *validation.values()]
    most = max(packed.max_pieces for packed in every)
    for packed in every:  # one shape of cu_seqlens, so that it is compiled once
        packed.max_pieces = most
    n_prompt = len(prompt_ids(config.sample_prompt, config.finetune, tokenizer))
    check_sample_prompt(config, n_prompt, block_size)

    origin = {"data": described(rows)}
    watched = "; ".join(f"{name} {described(packed)}" for name, packed in validation.items())
    ranks.check_same({"device": device.type, "dtype": dtype, **origin, "validation": watched})
    origin["base"] = ranks.broadcast(lambda: base_of(config))
    run = Run(model.to(device), config, device, dtype, ranks)
    step, row, best = 0, 0, math.inf
    if found is not None:
        changes = check_resume(config, path, found, model, origin, tokenizer.sha256)
        origin = {key: found.get(key, value) for key, value in origin.items()}
        step, row, best = run.restore(found)
        print(f"continuing {path} at step {step}" + "".join(f"; {c}" for c in changes))
        del found
    end_row = rows.rows_per_epoch * config.num_epochs
    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    total_steps = step + math.ceil(max(0, end_row - row) / rows_per_step)
    total_steps = min(total_steps, config.max_steps or total_steps)
    if step >= total_steps:
        print(f"{path} is already trained to step {step} of {total_steps}; nothing to do")
        return last_metrics(out_dir) | {"step": step, "best_val_loss": best}
    if not (out_dir / BEST).exists():
        best = math.inf  # it was left behind in another folder
    check_schedule(config, total_steps)
    if ranks.first:
        check_disk(out_dir, model, config.keep_checkpoints)
    print_summary(run, rows, total_steps, validation)

    if config.compile:
        run.try_compile(rows.batch(range(config.batch_size)))
    schedule = (config.learning_rate, config.warmup_iters, total_steps, config.min_lr_ratio)
    wandb = {"project": config.wandb_project, "config": dataclasses.asdict(config)}
    metrics = Metrics(out_dir, step, wandb if config.wandb_log else None, ranks.first)
    writer = CheckpointWriter(out_dir, config.keep_checkpoints, ranks.first)
    flops, n_ranks = model.flops_per_token(), ranks.world_size
    progress = Progress(step, total_steps, flops, device, n_ranks, ranks.first)
    batches = batches_of(rows, row, end_row, config, device.type == "cuda", ranks)
    window: list[torch.Tensor] = []
    evaluating = False
    try:
        with GracefulStop(exit_on_second=n_ranks == 1, verbose=ranks.first) as stop:
            for micro_batches in batches:
                # The one message of a step between the hosts.
                n_labels = sum(batch.n_labels for batch in micro_batches)
                n_labels, *stopped = map(int, ranks.total(n_labels, *stop.counts))
                if any(stopped):
                    if not evaluating:
                        saved = writer.save(run.state(step, row, best, tokenizer) | origin, False)
                    writer.wait()
                    ranks.total()  # until it is saved; the first to exit ends the others
                    signum = SIGNALS[stopped.index(max(stopped))]
                    raise Interrupted(signum, resume_hint(config, saved, step))
                lr = learning_rate_at(step, *schedule)
                if config.optimizer == "sophiag" and step % config.hess_interval == 0:
                    run.update_hessian(*micro_batches[: ranks.share(config.hess_batches)])
                loss, norm = run.step(micro_batches, lr, n_labels)
                step, row = step + 1, min(row + rows_per_step, end_row)
                window.append(loss)
                progress.advance(n_labels)
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
                        saved = writer.save(run.state(step, row, best, tokenizer) | origin, is_best)
                if step == total_steps:
                    break
        writer.wait()
    finally:
        batches.close()
        progress.close()
        metrics.close()
        writer.join()
    print(f"done: best validation loss {best:.4f}, in {out_dir}/best_model.pt")
    return last_metrics(out_dir) | {"step": step, "best_val_loss": best}


@contextmanager
def explained_out_of_memory(config: Any) -> Iterator[None]:
    """Turns running out of GPU memory into a line that says which constants to lower."""
    try:
        yield
    except torch.OutOfMemoryError:
        shape = "" if config.finetune else "; or lower block_size or n_layers"
        raise UserError(
            f"out of GPU memory: lower batch_size (now {config.batch_size}) and raise "
            f"{setting(config, 'gradient_accumulation_steps')} by the same factor{shape}"
        ) from None


def resume_hint(config: Any, saved: Path, step: int) -> str:
    """How to continue an interrupted run."""
    how = "run the same command again to continue"
    if config.resume_checkpoint != "auto":
        how = f"to continue, add --resume_checkpoint={saved}"
    return f"interrupted at step {step} and saved as {saved}; {how}"


def main(argv: list[str] | None = None) -> int:
    code = 0
    with said_once():
        try:
            train(config_from_constants(globals(), argv))
        except Interrupted as interruption:
            if ranks_of_environment().first:
                print(interruption, file=sys.stderr)
            code = 128 + interruption.signum
    return end(code)


if __name__ == "__main__":
    run_script(main)
