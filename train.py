"""Pretrains Lille, or fine-tunes it on conversations: edit the constants and run.

    python train.py                                  # pretrain on the shards in data_dir
    python train.py --finetune                       # fine-tune `model` on conversations
    python train.py --n_layers=6 --batch_size=4      # any constant can be given as --name=value
    torchrun --nproc_per_node=8 train.py             # the same run on 8 GPUs

Run the same command again to continue an interrupted run (resume_checkpoint = "auto"). Ctrl-C,
SIGTERM and a closed terminal finish the step, save and exit with 130, 143 and 129. `out_dir` gets
best_model.pt, the last ckpt_*.pt, metrics.jsonl and loss_curve.png. From Python: `train(config)`
with a config of `config_from_constants`.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import dataclasses
import sys
from contextlib import closing
from typing import Any

import torch

from checkpoint import CheckpointWriter
from common.settings import config_from_constants, run_script
from common.signals import SIGNALS, STOPPING, GracefulStop, Interrupted
from training.checks import check_arguments
from training.distributed import exit_rank, ranks_of_environment, report_failure_once
from training.learning_rates import schedule_of
from training.metrics import (
    Metrics,
    Progress,
    best_loss,
    evaluation_line,
    last_metrics,
    tracker_of,
)
from training.setup import TrainingRun, open_run

# Data and checkpoints
data_dir = "data/fineweb_edu_sample_10BT"  # shards to pretrain on; "a, b:2, c:0.5" mixes folders
tokenizer = "hastings/hastings.json"  # that of the shards; another: a folder with tokenizer.json
out_dir = "checkpoints"  # checkpoints, metrics and the loss curve
resume_checkpoint = "auto"  # "auto": the newest in out_dir; a path; "": only a new run
init_from = ""  # a new run from these weights: a .pt, an exported folder or a hub id; "": random
watch_data_dir = ""  # also report the loss on these shards, to see what is forgotten; "": none
keep_checkpoints = 2  # number of ckpt_*.pt files kept, beside best_model.pt

# Model (its shape is that of the weights with init_from, and in a fine-tune)
n_layers = 24  # transformer blocks
n_embd = 640  # width; a multiple of n_heads
n_heads = 10  # query heads
n_kv_heads = 2  # key and value heads; divides n_heads
block_size = 512  # context length, tokens; with init_from at most that of the weights
dropout = 0.0  # on the embeddings and the residual branches
layer_norm_eps = 1e-5  # added to the mean square in RMSNorm

# Batches (batch_size * gradient_accumulation_steps * block_size = 131,072 tokens a step)
batch_size = 16  # rows of block_size tokens per micro-batch
gradient_accumulation_steps = 16  # micro-batches per step, distributed over the GPUs
num_epochs = 1  # passes over the data
max_steps = 0  # limit of steps; 0: none, num_epochs alone decides

# Optimizer
optimizer = "sophiag"  # for the hidden matrices: "sophiag", or PyTorch's "adamw" or "muon"
embedding_optimizer = "adamw"  # for embedding and norms; "same": one optimizer and rate for all
learning_rate = 0.0  # peak of the hidden matrices' schedule; 0: by training/learning_rates.py
embedding_learning_rate = 0.0  # peak of the embedding's and the norms'; 0: in proportion to it
schedule = "cosine"  # after the warm-up: "cosine", "linear", or "wsd", stable until its decay
decay_share = 0.2  # wsd: the share of the run, at its end, in which the rate decays
average_last = 0.0  # share of the run whose weights are averaged; the better are best_model.pt
min_lr_ratio = 0.1  # the schedule ends at this share of the peak
warmup_iters = 0  # steps of linear warm-up; 0: a tenth of the run, at most 2,000
weight_decay = 0.1  # on matrices; norms have none
beta1 = 0.9  # SophiaG: gradient average
beta2 = 0.95  # SophiaG: Hessian average
rho = 0.8  # SophiaG: clipping threshold; good runs end with a win rate of 0.8 or more, see LOG.md
cautious = True  # SophiaG: leave out coordinates whose update and gradient differ in sign
hess_interval = 10  # SophiaG: steps between Hessian estimates
hess_batches = 1  # SophiaG: micro-batches of an estimate; with 8, each of 8 GPUs makes one
optimizer_state_dtype = "float32"  # SophiaG: moments' dtype; "bfloat16" halves their 0.85 GB
adamw_beta1 = 0.9  # AdamW: gradient average
adamw_beta2 = 0.95  # AdamW: squared gradient average
grad_clip = 1.0  # largest norm of the gradient; 0: no clipping

# Fine-tuning
finetune = False  # use the finetune_* values in place of their namesakes above
model = "checkpoints/best_model.pt"  # what a fine-tune starts from, in place of init_from
finetune_data_dir = "data/finetune"  # shards of conversations, or a mixture as above
finetune_out_dir = "checkpoints_ft"  # another folder than out_dir
finetune_learning_rate = 0.0  # peak of the hidden matrices' schedule; 0: half of the rule's
finetune_embedding_learning_rate = 0.0  # peak of the embedding's and the norms'; 0: in proportion
finetune_num_epochs = 3  # passes over the conversations
finetune_warmup_iters = 0  # steps of linear warm-up; 0: a tenth of the run
finetune_gradient_accumulation_steps = 1  # micro-batches per step

# Evaluation and logging
eval_interval = 500  # steps between evaluations, each with a checkpoint and a text sample
eval_rows = 1024  # validation rows, the first ones of the split
log_interval = 10  # steps between metrics
sample_prompt = "The most important thing about science is"  # text to continue
finetune_sample_prompt = "What is the capital of France?"  # question to answer
sample_tokens = 48  # longest sample, tokens; 0: none
tracker = "none"  # also log to "trackio" (on this machine) or "wandb" (pip install either)
wandb_log = False  # the same as tracker = "wandb"
wandb_project = "lille"  # the project there, of trackio too

# System
device = "auto"  # "auto", "cuda", "mps" or "cpu"
dtype = "auto"  # "auto", "bfloat16" or "float16" (both CUDA), "float32"
compile = True  # torch.compile, where it works
seed = 1337  # seed of weights, order, dropout and sampled labels

# Several GPUs or machines (torchrun)
gradient_dtype = "float32"  # dtype of the gradients sent; "bfloat16" halves the bytes
distributed_timeout_minutes = 10.0  # a process that does not answer for this long is lost

RENAMED = {"finetune_checkpoint": "model"}


def train(config: Any) -> dict[str, Any]:
    """Trains as configured and returns the last metrics: step, loss, val_loss, best_val_loss, ...

    Raises UserError before the first step for settings, data or checkpoints that do not fit, and
    Interrupted when a signal ended the run, after saving it.
    """
    with open_run(config) as run:  # data, model, optimizer
        run.resume()
        if run.step < run.total_steps:
            run.start()
            loop(run)
            print(run.result())
        else:
            position = f"step {run.step} of {run.total_steps}"
            print(f"{run.source} is already trained to {position}; nothing to do")
        return last_metrics(run.out_dir) | {"step": run.step, "best_val_loss": run.best}


def loop(run: TrainingRun) -> None:
    """Trains until `total_steps`, evaluating, logging and saving; on a signal saves and raises."""
    config, trainer, ranks = run.config, run.trainer, run.ranks
    alone = ranks.world_size == 1
    learning_rate = schedule_of(config, run.total_steps)
    metrics = Metrics(run.out_dir, run.step, ranks.is_main)
    metrics.start_tracker(tracker_of(config), config.wandb_project, dataclasses.asdict(config))
    size = (run.step, run.total_steps, trainer.model.flops_per_token())
    progress = Progress(*size, trainer.device, ranks.world_size, ranks.is_main)
    writer = CheckpointWriter(run.out_dir, config.keep_checkpoints, ranks.is_main)
    losses: list[torch.Tensor] = []
    saved_step = None
    with (
        GracefulStop(exit_on_second=alone) as stop,
        closing(run.batches()) as batches,
        closing(progress),
        closing(metrics),
        closing(writer),
    ):
        if run.step == 0 and config.init_from:  # what the model knew before
            with progress.paused():
                results = trainer.evaluate_all(run.validation, run.tokenizer)
                metrics.log(0, **results)
                progress.write(evaluation_line(0, results, is_best=False))
        for micro_batches in batches:
            # The step's only host-side all-reduce.
            n_labels = sum(batch.n_labels for batch in micro_batches)
            n_labels, *signals = map(int, ranks.all_reduce_scalars(n_labels, *stop.counts))
            if any(signals):
                if not alone:  # otherwise said at once
                    progress.write(STOPPING)
                break

            if trainer.uses_hessian and run.step % config.hess_interval == 0:
                trainer.update_hessian(*micro_batches[: ranks.local_count(config.hess_batches)])
            lr = learning_rate(run.step)
            loss, norm = trainer.step(micro_batches, lr, n_labels)
            run.advance()
            if run.step > run.first_averaged:
                trainer.add_to_average()
            progress.advance(n_labels)
            losses.append(loss)

            evaluate = run.step % config.eval_interval == 0 or run.step == run.total_steps
            if evaluate or run.step % config.log_interval == 0:
                values = {"loss": torch.stack(losses).mean().item(), "lr": lr} | progress.rate()
                if trainer.uses_hessian:
                    values["win_rate"] = trainer.optimizer.win_rate.item()
                progress.show(**values)
                metrics.log(run.step, **values, grad_norm=norm.item())
                losses.clear()
                trainer.check_finite()
            if evaluate:
                with progress.paused():
                    results = trainer.evaluate_all(run.validation, run.tokenizer)
                    best, is_averaged = best_loss(results)
                    is_best, run.best = best < run.best, min(run.best, best)
                    averaged = run.averaged_state() if is_best and is_averaged else None
                    path, saved_step = writer.save(run.state(), is_best, averaged), run.step
                    metrics.log(run.step, **results)
                    metrics.plot()
                    progress.write(evaluation_line(run.step, results, is_best))
            if run.step == run.total_steps:
                break
        if saved_step != run.step:
            path = writer.save(run.state(), best=False)
        writer.wait()
        signals = ranks.all_reduce_scalars(*stop.counts)  # a barrier too: the first exit ends all
        if any(signals):
            raise Interrupted(SIGNALS[signals.index(max(signals))], run.resume_hint(path))


def main(argv: list[str] | None = None) -> int:
    code = 0
    with report_failure_once():
        try:
            config = config_from_constants(globals(), argv, renamed=RENAMED)
            check_arguments(sys.argv[1:] if argv is None else argv, config.finetune)
            train(config)
        except Interrupted as interruption:
            if ranks_of_environment().is_main:
                print(interruption, file=sys.stderr)
            code = 128 + interruption.signum
    return exit_rank(code)


if __name__ == "__main__":
    run_script(main)
