"""Pre-training checks: settings, ranks, schedule, sample prompt, disk space."""

import importlib.util
from pathlib import Path
from typing import Any

from checkpoint import checkpoints_in
from common.errors import UserError
from common.files import check_free_space
from model import GPT

# A fine-tune uses finetune_NAME in place of NAME.
FINETUNE_NAMES = (
    "data_dir",
    "out_dir",
    "learning_rate",
    "num_epochs",
    "warmup_iters",
    "gradient_accumulation_steps",
    "sample_prompt",
)
MINIMA = {
    **dict.fromkeys(("max_steps", "warmup_iters", "sample_tokens", "seed"), 0),
    **dict.fromkeys(("weight_decay", "grad_clip"), 0),
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "num_epochs", "hess_batches"), 1),
    **dict.fromkeys(("eval_interval", "eval_rows", "log_interval", "hess_interval"), 1),
    "keep_checkpoints": 1,
    "block_size": 2,
}
CHOICES = {
    "optimizer": ("sophiag", "adamw"),
    "optimizer_state_dtype": ("float32", "bfloat16"),
    "device": ("auto", "cuda", "mps", "cpu"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "gradient_dtype": ("float32", "bfloat16"),
}


def flag_name(config: Any, name: str) -> str:
    """The constant that sets `name` in this run; some are finetune_`name` in a fine-tune."""
    return f"finetune_{name}" if config.finetune and name in FINETUNE_NAMES else name


def check_settings(config: Any, world_size: int = 1) -> None:
    """Refuses impossible values and combinations; UserError says what to change."""
    for name, minimum in MINIMA.items():
        if (value := getattr(config, name)) < minimum:
            raise UserError(f"{flag_name(config, name)}={value} must be at least {minimum}")
    for name in ("learning_rate", "rho", "distributed_timeout_minutes"):
        if (value := getattr(config, name)) <= 0:
            raise UserError(f"{flag_name(config, name)}={value} must be above 0")
    for name in ("beta1", "beta2", "adamw_beta1", "adamw_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 0 and below 1")
    if not 0 <= config.min_lr_ratio <= 1:
        raise UserError(f"min_lr_ratio={config.min_lr_ratio} must be between 0 and 1")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise UserError(f"{name}={getattr(config, name)!r} must be one of {', '.join(choices)}")
    if config.optimizer_state_dtype != "float32" and config.optimizer != "sophiag":
        raise UserError(
            f"optimizer_state_dtype={config.optimizer_state_dtype!r} needs optimizer='sophiag': "
            "set it to 'float32'"
        )
    wandb = importlib.util.find_spec("wandb") if config.wandb_log else None
    if config.wandb_log and (wandb is None or wandb.origin is None):  # a folder of old runs
        raise UserError("wandb_log=True needs wandb: pip install wandb, or set wandb_log=False")
    accumulation_name = flag_name(config, "gradient_accumulation_steps")
    accumulation = config.gradient_accumulation_steps
    if config.hess_batches > accumulation:
        raise UserError(
            f"hess_batches={config.hess_batches} is more than the {accumulation_name}="
            f"{accumulation} micro-batches of a step"
        )
    lower = accumulation // world_size * world_size
    if lower != accumulation:
        multiples = [str(count) for count in (lower, lower + world_size) if count]
        raise UserError(
            f"{accumulation_name}={accumulation} micro-batches cannot be dealt to {world_size} "
            f"ranks evenly: set it to {' or '.join(multiples)}, and batch_size to keep the tokens "
            "of a step"
        )


def check_sample_prompt(config: Any, n_tokens: int, block_size: int) -> None:
    """Refuses a prompt that could not be continued at the first evaluation."""
    if config.sample_tokens and not 0 < n_tokens <= block_size:
        raise UserError(
            f"{flag_name(config, 'sample_prompt')} has {n_tokens} tokens, the context {block_size}:"
            " change it, or set sample_tokens=0"
        )


def check_schedule(config: Any, total_steps: int) -> None:
    """UserError if the warm-up takes the whole run, so that the learning rate would only rise."""
    if 0 < total_steps <= config.warmup_iters:
        name, epochs = flag_name(config, "warmup_iters"), flag_name(config, "num_epochs")
        raise UserError(
            f"{name}={config.warmup_iters} takes up all of the run's {total_steps} steps: lower it "
            f"with --{name}={total_steps // 10}, or train for longer (more {epochs}, or smaller "
            f"batch_size and {flag_name(config, 'gradient_accumulation_steps')})"
        )


def check_disk(directory: Path, model: GPT, keep: int, state_bytes: int) -> None:
    """Refuses to start when the checkpoints cannot fit.

    A checkpoint holds float32 weights and two moments of `state_bytes` bytes an element.
    """
    replaced = sum(path.stat().st_size for path in checkpoints_in(directory))
    checkpoint = (4 + 2 * state_bytes) * model.n_parameters()
    needed = checkpoint * (keep + 2)  # the last ones, the best, and one being written
    advice = f"free some space, lower keep_checkpoints (now {keep}) or change the folder"
    check_free_space(directory, needed - replaced, "the checkpoints need", advice)
