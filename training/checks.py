"""Checks of a run: settings, ranks, schedule, prompt, disk space."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from checkpoint import checkpoints_in
from common.errors import UserError
from common.files import check_free_space
from model import GPT
from training.metrics import tracker_of

SHAPE = ("n_layers", "n_embd", "n_heads", "n_kv_heads", "layer_norm_eps")
# A fine-tune uses finetune_NAME in place of NAME.
FINETUNE_NAMES = (
    "data_dir",
    "out_dir",
    "learning_rate",
    "embedding_learning_rate",
    "num_epochs",
    "warmup_iters",
    "gradient_accumulation_steps",
    "sample_prompt",
)
MINIMA = {
    **dict.fromkeys(("max_steps", "warmup_iters", "sample_tokens", "seed"), 0),
    **dict.fromkeys(("weight_decay", "grad_clip"), 0),
    **dict.fromkeys(("learning_rate", "embedding_learning_rate"), 0),
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "num_epochs", "hess_batches"), 1),
    **dict.fromkeys(("eval_interval", "eval_rows", "log_interval", "hess_interval"), 1),
    "keep_checkpoints": 1,
    "block_size": 2,
}
MAXIMA = {
    "rho": 1e6,
    "distributed_timeout_minutes": 1e6,  # 2 years
    "n_layers": 10_000,
}
CHOICES = {
    "optimizer": ("sophiag", "adamw", "muon"),
    "schedule": ("cosine", "linear", "wsd"),
    "tracker": ("none", "trackio", "wandb"),
    "embedding_optimizer": ("adamw", "same"),
    "optimizer_state_dtype": ("float32", "bfloat16"),
    "device": ("auto", "cuda", "mps", "cpu"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "gradient_dtype": ("float32", "bfloat16"),
}

# Parts of the messages of PyTorch's CPU allocator, whose errors have no type of their own.
OUT_OF_MEMORY_SIGNS = ("DefaultCPUAllocator", "Storage size calculation overflowed")


def flag_name(config: Any, name: str) -> str:
    """The constant that sets `name` in this run; some are finetune_`name` in a fine-tune."""
    return f"finetune_{name}" if config.finetune and name in FINETUNE_NAMES else name


def check_arguments(arguments: list[str], finetune: bool) -> None:
    """Refuses settings on the command line that have no effect, with or without `finetune`.

    One that is given together with its namesake is for a command line that both kinds of run share.
    """
    given = {text[2:].partition("=")[0] for text in arguments if text.startswith("--")}
    for name in FINETUNE_NAMES:
        idle, used, how = f"finetune_{name}", name, "without"
        if finetune:
            idle, used, how = used, idle, "with"
        if idle in given and used not in given and idle != "data_dir":  # for pretrain_val_loss
            raise UserError(f"--{idle} has no effect {how} --finetune: set --{used} in its place")
    shape = [name for name in SHAPE if name in given]
    if "init_from" in given and shape:
        raise UserError(f"--{shape[0]} has no effect with --init_from, whose shape is taken")
    if "init_from" in given and finetune:
        raise UserError("--init_from has no effect with --finetune: set --model in its place")
    if "model" in given and not finetune:
        raise UserError("--model is what a fine-tune starts from: add --finetune, or leave it out")


def check_settings(config: Any, world_size: int = 1) -> None:
    """Refuses impossible values and combinations; UserError says what to change."""
    for name, minimum in MINIMA.items():
        if (value := getattr(config, name)) < minimum:
            raise UserError(f"{flag_name(config, name)}={value} must be at least {minimum}")
    for name, value in vars(config).items():
        maximum = MAXIMA.get(name, 2**63 - 1 if type(value) is int else value)  # PyTorch's
        if value > maximum:
            raise UserError(f"{flag_name(config, name)}={value} must be at most {maximum}")
    check_rates(config)
    if not config.out_dir:
        raise UserError(f"{flag_name(config, 'out_dir')} is empty: name a folder, such as '.'")
    for name in ("rho", "distributed_timeout_minutes"):
        if (value := getattr(config, name)) <= 0:
            raise UserError(f"{flag_name(config, name)}={value} must be above 0")
    for name in ("beta1", "beta2", "adamw_beta1", "adamw_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 0 and below 1")
    for name in ("min_lr_ratio", "decay_share", "average_last"):
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise UserError(f"{name}={value} must be between 0 and 1")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise UserError(f"{name}={getattr(config, name)!r} must be one of {', '.join(choices)}")
    if config.embedding_optimizer == "same":
        rates = [flag_name(config, name) for name in ("learning_rate", "embedding_learning_rate")]
        if config.optimizer == "muon":
            raise UserError(
                "optimizer='muon' is for the hidden matrices alone: set embedding_optimizer='adamw'"
            )
        if not config.learning_rate or config.embedding_learning_rate:
            raise UserError(
                "embedding_optimizer='same' is one optimizer with one rate, for which there is no "
                f"rule: set {rates[0]}, such as 1e-3, and {rates[1]}=0"
            )
    if config.optimizer_state_dtype != "float32" and config.optimizer != "sophiag":
        raise UserError(
            f"optimizer_state_dtype={config.optimizer_state_dtype!r} needs optimizer='sophiag': "
            "set it to 'float32'"
        )
    if config.wandb_log and config.tracker == "trackio":
        raise UserError("wandb_log=True and tracker='trackio': choose one, as tracker")
    if (name := tracker_of(config)) != "none":
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:  # a folder of old runs has none
            setting = "wandb_log=True" if config.wandb_log else f"tracker={name!r}"
            raise UserError(f"{setting} needs {name}: pip install {name}, or set tracker='none'")
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


def check_rates(config: Any) -> None:
    """Refuses rates that are too high; of a run that follows the rule, when they are known."""
    for name in ("learning_rate", "embedding_learning_rate"):
        rate, flag = getattr(config, name), flag_name(config, name)
        if rate > 1:  # a step changes each weight by up to this
            raise UserError(f"{flag}={rate} must be at most 1")
        if rate * config.weight_decay > 1:
            raise UserError(
                f"weight_decay={config.weight_decay} times {flag}={rate} is above 1, more than a "
                "whole weight each step: lower one"
            )


def check_sample_prompt(config: Any, n_tokens: int, block_size: int) -> None:
    """Refuses a prompt that could not be continued at the first evaluation."""
    if config.sample_tokens and not 0 < n_tokens <= block_size:
        raise UserError(
            f"{flag_name(config, 'sample_prompt')} has {n_tokens} tokens, the context {block_size}:"
            " change it, or set sample_tokens=0"
        )


def check_schedule(config: Any, total_steps: int, rows_per_step: int, n_rows: int) -> None:
    """UserError for less data than a step, and for a warm-up that takes the whole run.

    `n_rows` are the rows of all epochs together.
    """
    if total_steps and rows_per_step > n_rows:
        raise UserError(
            f"batch_size={config.batch_size} times "
            f"{flag_name(config, 'gradient_accumulation_steps')}="
            f"{config.gradient_accumulation_steps} are more rows than the run's {n_rows:,}: "
            "lower them"
        )
    if 1 < total_steps <= config.warmup_iters:
        name, epochs = flag_name(config, "warmup_iters"), flag_name(config, "num_epochs")
        raise UserError(
            f"{name}={config.warmup_iters} takes up all of the run's {total_steps} steps: lower it "
            f"with --{name}={total_steps // 10}, or train for longer (more {epochs}, or smaller "
            f"batch_size and {flag_name(config, 'gradient_accumulation_steps')})"
        )


def check_disk(directory: Path, model: GPT, keep: int, moments: dict[int, Any]) -> None:
    """Refuses to start when the checkpoints cannot fit, of float32 weights and `moments`."""
    replaced = sum(path.stat().st_size for path in checkpoints_in(directory))
    tensors = [v for values in moments.values() for v in values.values()]
    tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
    checkpoint = 4 * model.n_parameters() + sum(tensor.nbytes for tensor in tensors)
    needed = checkpoint * (keep + 2)  # the last ones, the best, and one being written
    advice = f"free some space, lower keep_checkpoints (now {keep}) or change the folder"
    check_free_space(directory, needed - replaced, "the checkpoints need", advice)


@contextmanager
def explain_out_of_memory(config: Any) -> Iterator[None]:
    """Turns running out of memory into a line that says which constants to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        gpu = isinstance(error, torch.OutOfMemoryError)
        known = gpu or isinstance(error, MemoryError)
        if not known and not any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS):
            raise
        shape = "" if config.init_from else "; or lower block_size, n_layers or n_embd"
        raise UserError(
            f"out of {'GPU ' if gpu else ''}memory: lower batch_size (now {config.batch_size}) and "
            f"raise {flag_name(config, 'gradient_accumulation_steps')} by the same factor{shape}"
        ) from None
