"""What train.py checks before the first step, so that no mistake costs an hour: settings, device,
disk, and whether a checkpoint belongs to the run that wants to continue it."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from checkpoint import BEST, checkpoints_in, latest_checkpoint, load_checkpoint
from config import UserError
from model import GPT


def check_settings(config: Any) -> None:
    """Refuses values and combinations that cannot be meant; UserError says what to change."""
    positive = ("batch_size", "gradient_accumulation_steps", "num_epochs", "eval_interval")
    positive += ("eval_rows", "log_interval", "hess_interval", "keep_checkpoints", "learning_rate")
    for name in positive:
        if getattr(config, name) <= 0:
            raise UserError(f"{name}={getattr(config, name)} must be above 0")
    for name in ("max_steps", "warmup_iters", "weight_decay", "grad_clip", "sample_tokens"):
        if getattr(config, name) < 0:
            raise UserError(f"{name}={getattr(config, name)} must not be negative")
    choices = {
        "optimizer": ("sophiag", "adamw"),
        "device": ("auto", "cuda", "mps", "cpu"),
        "dtype": ("auto", "float32", "bfloat16", "float16"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"{name}={getattr(config, name)!r} must be one of {', '.join(allowed)}")
    if not 0 <= config.min_lr_ratio <= 1:
        raise UserError(f"min_lr_ratio={config.min_lr_ratio} must be between 0 and 1")
    if config.rho <= 0:
        raise UserError(f"rho={config.rho} must be above 0")
    for name in ("beta1", "beta2", "adamw_beta1", "adamw_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 0 and below 1")


def check_schedule(config: Any, total_steps: int) -> None:
    """Refuses a warm-up that never ends: the learning rate would only rise."""
    if 0 < total_steps <= config.warmup_iters:
        name = "finetune_warmup_iters" if config.finetune else "warmup_iters"
        raise UserError(
            f"{name}={config.warmup_iters} takes up all of the run's {total_steps} steps: lower it "
            f"with --{name}={total_steps // 10}, or train for longer"
        )


def choose_device(config: Any) -> tuple[torch.device, torch.dtype]:
    """The device and compute type that `auto` stands for here."""
    name = config.device
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda', but PyTorch sees no GPU: set device='auto'")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device='mps', but PyTorch sees no Apple GPU: set device='auto'")
    if config.dtype != "auto":
        if name != "cuda" and config.dtype != "float32":
            raise UserError(f"dtype={config.dtype!r} needs a CUDA GPU: set dtype='auto'")
        return torch.device(name), getattr(torch, config.dtype)
    if name == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device(name), torch.bfloat16 if bf16 else torch.float16
    return torch.device(name), torch.float32


def check_disk(directory: Path, model: GPT, keep: int) -> None:
    """Refuses to start when the checkpoints cannot fit: weights and two moments in float32 each."""
    needed = 12 * model.n_parameters() * (keep + 2)  # kept ones, the best, and one being written
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory} has {free / 1e9:.1f} GB free and the checkpoints need {needed / 1e9:.1f} "
            f"GB: free some space, lower keep_checkpoints (now {keep}) or change out_dir"
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
    if config.resume_checkpoint not in ("auto", ""):
        return Path(config.resume_checkpoint), load_checkpoint(config.resume_checkpoint)
    if config.resume_checkpoint == "auto":
        found = latest_checkpoint(out_dir)
        if found is not None:
            return found
    if checkpoints_in(out_dir) or (out_dir / BEST).exists():
        ways = "change the output folder, or move its files away"
        if config.resume_checkpoint == "":
            ways = f"continue it with --resume_checkpoint=auto, {ways}"
        raise UserError(f"{out_dir} holds the results of an earlier run: {ways}")
    return None


def check_resume(
    config: Any, name: Path, state: dict[str, Any], model: GPT, data: str, tokenizer_sha256: str
) -> list[str]:
    """Refuses to continue a checkpoint of another run; returns the harmless settings that changed.

    What decides the weights' shape or the order of the data must be as it was.
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
    fixed["training data"] = (state["data"], data)
    for key, (old, new) in fixed.items():
        if old != new and key != "dropout":
            raise UserError(
                f"{name} was trained with {key}={old} and this run has {new}: change it back to "
                "continue, or start anew in another output folder"
            )
    paths = {"data_dir", "out_dir", "resume_checkpoint"}
    changed = [key for key in now if key in then and then[key] != now[key] and key not in paths]
    return [f"{key} {then[key]} -> {now[key]}" for key in changed]
