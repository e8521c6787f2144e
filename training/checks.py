"""What train.py checks before the first step, so that no mistake costs an hour: settings, device,
disk, and whether a checkpoint belongs to the run that wants to continue it."""

import dataclasses
import importlib.util
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch

from checkpoint import BEST, checkpoints_in, latest_checkpoint, load_checkpoint
from common.errors import UserError
from model import GPT
from training.distributed import ALONE, Ranks

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


def setting(config: Any, name: str) -> str:
    """The name under which a user sets `name` in this run."""
    return f"finetune_{name}" if config.finetune and name in FINETUNE_NAMES else name


def check_settings(config: Any) -> None:
    """Refuses values and combinations that cannot be meant; UserError says what to change."""
    at_least = dict.fromkeys(("max_steps", "warmup_iters", "sample_tokens", "seed"), 0)
    counts = ("batch_size", "gradient_accumulation_steps", "num_epochs", "eval_interval")
    counts += ("eval_rows", "log_interval", "hess_interval", "keep_checkpoints")
    counts += ("hess_batches",)
    at_least |= dict.fromkeys(counts, 1) | {"block_size": 2, "weight_decay": 0, "grad_clip": 0}
    for name, least in at_least.items():
        if (value := getattr(config, name)) < least:
            raise UserError(f"{setting(config, name)}={value} must be at least {least}")
    for name in ("learning_rate", "rho", "distributed_timeout_minutes"):
        if (value := getattr(config, name)) <= 0:
            raise UserError(f"{setting(config, name)}={value} must be above 0")
    for name in ("beta1", "beta2", "adamw_beta1", "adamw_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 0 and below 1")
    if not 0 <= config.min_lr_ratio <= 1:
        raise UserError(f"min_lr_ratio={config.min_lr_ratio} must be between 0 and 1")
    choices = {
        "optimizer": ("sophiag", "adamw"),
        "device": ("auto", "cuda", "mps", "cpu"),
        "dtype": ("auto", "float32", "bfloat16", "float16"),
        "gradient_dtype": ("float32", "bfloat16"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"{name}={getattr(config, name)!r} must be one of {', '.join(allowed)}")
    wandb = importlib.util.find_spec("wandb") if config.wandb_log else None
    if config.wandb_log and (wandb is None or wandb.origin is None):  # a folder of old runs
        raise UserError("wandb_log=True needs wandb: pip install wandb, or set wandb_log=False")
    if config.hess_batches > config.gradient_accumulation_steps:
        name = setting(config, "gradient_accumulation_steps")
        raise UserError(
            f"hess_batches={config.hess_batches} is more than the {name}="
            f"{config.gradient_accumulation_steps} micro-batches of a step"
        )


def check_ranks(config: Any, world_size: int) -> None:
    """Refuses a number of ranks that the micro-batches of a step cannot be dealt to evenly."""
    name = setting(config, "gradient_accumulation_steps")
    value = config.gradient_accumulation_steps
    below = value // world_size * world_size
    if below != value:
        near = [str(count) for count in (below, below + world_size) if count]
        raise UserError(
            f"{name}={value} micro-batches cannot be dealt to {world_size} ranks evenly: set it to "
            f"{' or '.join(near)}, and batch_size to keep the tokens of a step"
        )


def check_sample_prompt(config: Any, n_tokens: int, block_size: int) -> None:
    """Refuses a prompt that could not be continued at the first evaluation."""
    if config.sample_tokens and not 0 < n_tokens <= block_size:
        raise UserError(
            f"{setting(config, 'sample_prompt')} has {n_tokens} tokens, the context {block_size}: "
            "change it, or set sample_tokens=0"
        )


def check_schedule(config: Any, total_steps: int) -> None:
    """Refuses a warm-up that never ends: the learning rate would only rise."""
    if 0 < total_steps <= config.warmup_iters:
        name = setting(config, "warmup_iters")
        raise UserError(
            f"{name}={config.warmup_iters} takes up all of the run's {total_steps} steps: lower it "
            f"with --{name}={total_steps // 10}, or train for longer"
        )


def choose_device(config: Any, ranks: Ranks = ALONE) -> tuple[torch.device, torch.dtype]:
    """The device and compute type that `auto` stands for here; each rank of a machine has a GPU."""
    name = config.device
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda', but PyTorch sees no GPU: set device='auto'")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device='mps', but PyTorch sees no Apple GPU: set device='auto'")
    if ranks.world_size > 1 and name == "mps":
        raise UserError("several ranks cannot share an Apple GPU: run python train.py once")
    if ranks.world_size > 1 and name == "cuda":
        if ranks.local_world_size > (count := torch.cuda.device_count()):
            raise UserError(
                f"{ranks.local_world_size} ranks on {socket.gethostname()}, where PyTorch sees "
                f"{count} GPU(s): start torchrun with --nproc_per_node={count}"
            )
        name = f"cuda:{ranks.local_rank}"
        torch.cuda.set_device(name)
    if config.dtype != "auto":
        if not name.startswith("cuda") and config.dtype != "float32":
            raise UserError(f"dtype={config.dtype!r} needs a CUDA GPU: set dtype='auto'")
        return torch.device(name), getattr(torch, config.dtype)
    if name.startswith("cuda"):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device(name), torch.bfloat16 if bf16 else torch.float16
    return torch.device(name), torch.float32


def make_folder(directory: Path) -> None:
    """Makes the output folder; UserError when it cannot be made or written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {directory}: {error.strerror or error}") from None
    if not os.access(directory, os.W_OK):
        raise UserError(f"cannot write to {directory}: change its permissions, or choose another")


def check_disk(directory: Path, model: GPT, keep: int) -> None:
    """Refuses to start when the checkpoints cannot fit: weights and two moments in float32 each."""
    there = sum(path.stat().st_size for path in checkpoints_in(directory))  # will be replaced
    needed = 12 * model.n_parameters() * (keep + 2)  # kept ones, the best, and one being written
    free = shutil.disk_usage(directory).free
    if free + there < needed:
        raise UserError(
            f"{directory} has {free / 1e9:.1f} GB free and the checkpoints need "
            f"{(needed - there) / 1e9:.1f} GB: free some space, lower keep_checkpoints (now {keep})"
            " or change the folder"
        )


def check_tokenizer(state: dict[str, Any], name: str | Path, sha256: str) -> None:
    """Refuses a checkpoint that was trained with another tokenizer; the original's has no hash."""
    if state.get("tokenizer_sha256", sha256) != sha256:
        raise UserError(
            f"{name} was trained with another tokenizer than this project's hastings.json: restore "
            "that file, or train anew in another out_dir"
        )


def find_checkpoint(config: Any) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from, or None for a new run.

    UserError when there is nothing to read at `resume_checkpoint`, and when a new run would
    overwrite another one's results.
    """
    out_dir = Path(config.out_dir)
    there = checkpoints_in(out_dir)
    if config.resume_checkpoint not in ("auto", ""):
        path = Path(config.resume_checkpoint)
        state = load_checkpoint(path)
        if not there and (out_dir / BEST).exists():
            there = [out_dir / BEST]
        if there and there[0].resolve() != path.resolve():
            raise UserError(
                f"{there[0]} is newer than {path} or of another run, and continuing would replace "
                f"it: change {setting(config, 'out_dir')}, move its files away, or continue that "
                "run with --resume_checkpoint=auto"
            )
        return path, state
    if config.resume_checkpoint == "auto":
        found = latest_checkpoint(out_dir)
        if found is not None:
            return found
    if there or (out_dir / BEST).exists():
        ways = f"change {setting(config, 'out_dir')}, or move its files away"
        if config.resume_checkpoint == "":
            ways = f"continue it with --resume_checkpoint=auto, {ways}"
        raise UserError(f"{out_dir} holds the results of an earlier run: {ways}")
    return None


def check_resume(
    config: Any,
    name: Path,
    state: dict[str, Any],
    model: GPT,
    origin: dict[str, Any],
    tokenizer_sha256: str,
) -> list[str]:
    """Refuses to continue a checkpoint of another run; returns the harmless settings that changed.

    What decides the weights' shape or the order of the data must be as it was, and so must
    `origin`: the training data and, of a fine-tune, the sha256 of its base (None if it is gone).
    """
    if "config" not in state:
        raise UserError(
            f"{name} has no training state to continue from: fine-tune from it with "
            f"--finetune=True --finetune_checkpoint={name}"
        )
    check_tokenizer(state, name, tokenizer_sha256)
    then, now = state["config"], dataclasses.asdict(config)
    fixed = {key: (then.get(key), now[key]) for key in ("finetune", "optimizer", "seed")}
    fixed |= {k: (state["model_args"].get(k), v) for k, v in model.config.to_dict().items()}
    known = {key: value for key, value in origin.items() if value and state.get(key)}
    fixed |= {key: (state[key], value) for key, value in known.items()}
    for key, (old, new) in fixed.items():
        if old != new and key != "dropout":
            raise UserError(
                f"{name} was trained with {key}={old} and this run has {new}: change it back to "
                "continue, or start anew in another output folder"
            )
    paths = {"data_dir", "out_dir", "resume_checkpoint"}
    changed = [key for key in now if key in then and then[key] != now[key] and key not in paths]
    return [f"{key} {then[key]} -> {now[key]}" for key in changed]
