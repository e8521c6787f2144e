"""The checkpoint that a run continues: finding it; that it is of this run, whole, and in time."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint import (
    BEST,
    TrainingState,
    check_tokenizer,
    checkpoints_in,
    latest_checkpoint,
    load_checkpoint,
)
from common.errors import UserError, printable
from training.checks import FINETUNE_NAMES, flag_name
from training.learning_rates import schedule_of

FIXED_SETTINGS = ("finetune", "optimizer", "seed")  # a resumed run has the same ones
PATH_SETTINGS = (
    "data_dir",
    "out_dir",
    "finetune_data_dir",
    "finetune_out_dir",
    "resume_checkpoint",
    "init_from",
    "watch_data_dir",
    "tokenizer",
)
# Settings that an earlier train.py had other values of.
RECIPE_OF_SOPHIAG = ("beta1", "beta2", "rho", "cautious")
RECIPE = ("embedding_optimizer", "learning_rate", "embedding_learning_rate")
EARLIER = ": start from an earlier checkpoint (move this one away)"


def find_checkpoint(config: Any) -> tuple[Path, dict[str, Any]] | None:
    """Path and content of the checkpoint to continue from, or None for a new run.

    UserError when `resume_checkpoint` cannot be read, and when a new run would overwrite the
    results of another.
    """
    out_dir = Path(config.out_dir)
    checkpoints = checkpoints_in(out_dir)
    if config.resume_checkpoint not in ("auto", ""):
        path = Path(config.resume_checkpoint)
        checkpoint = load_checkpoint(path)
        if not checkpoints and (out_dir / BEST).exists():
            checkpoints = [out_dir / BEST]
        if checkpoints and checkpoints[0].resolve() != path.resolve():
            raise UserError(
                f"{checkpoints[0]} is newer than {path} or of another run, and continuing would "
                f"replace it: change {flag_name(config, 'out_dir')}, move its files away, or "
                "continue that run with --resume_checkpoint=auto"
            )
        return path, checkpoint
    if config.resume_checkpoint == "auto":
        newest = latest_checkpoint(out_dir)
        if newest is not None:
            return newest
    if checkpoints or (out_dir / BEST).exists():
        ways = f"change {flag_name(config, 'out_dir')}, or move its files away"
        if config.resume_checkpoint == "":
            ways = f"continue it with --resume_checkpoint=auto, {ways}"
        raise UserError(f"{out_dir} holds the results of an earlier run: {ways}")
    return None


def is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_text(value: Any) -> bool:
    return value is None or type(value) is str


def is_plain(value: Any) -> bool:
    """Whether it is a dict of settings."""
    return type(value) is dict and {*map(type, value.values())} <= {bool, int, float, str}


def is_average(value: Any) -> bool:
    keys = type(value) is dict and value.keys() == {"n", "weights"}
    return keys and is_number(value["n"]) and type(value["weights"]) is dict


# What a checkpoint to continue must hold beside its tensors.
VALUES: dict[str, Callable[[Any], bool]] = {
    "optimizer_state_dict": lambda value: type(value) is dict and type(value.get("state")) is dict,
    "scaler_state_dict": lambda value: value is None or type(value) is dict,
    "model_args": is_plain,
    "iter_num": is_number,
    "best_val_loss": lambda value: type(value) is float and value == value,
    "config": is_plain,
    "data_cursor": is_number,
    "rng_state": lambda value: type(value) is dict,
    "data": is_text,
    "base": is_text,
    "tokenizer_sha256": is_text,
    "tokenizer_json": is_text,
    "average": lambda value: value is None or is_average(value),
}


def check_resume(old: TrainingState, new: TrainingState, name: Path) -> list[str]:
    """Refuses to continue `old`, of the file `name`, as another run; returns harmless changes.

    `new` is the state that the run has before its first step, with moments as after it. What
    decides the weights' shape or the order of the data must be the same, and so must the training
    data and, in a fine-tune, its base. A base of `new` that is None is gone, and not compared.
    """
    unfit = [key for key, fits in VALUES.items() if not fits(getattr(old, key))]
    if unfit:
        raise UserError(f"{name}: its {unfit[0]} is missing or impossible{EARLIER}")
    check_tokenizer(vars(old), name, new.tokenizer_sha256)
    old_config, new_config = with_embedding_optimizer(old.config), new.config
    required = {key: (old_config.get(key), new_config[key]) for key in FIXED_SETTINGS}
    required |= {key: (old.model_args.get(key), arg) for key, arg in new.model_args.items()}
    for key in ("data", "base"):
        if getattr(old, key) and getattr(new, key):
            required[key] = (getattr(old, key), getattr(new, key))
    if old.data and "-" not in old.data.rpartition("(")[2]:  # see PackedRows.fingerprint
        required["data"] = (old.data, re.sub("-[0-9a-f]*[)]$", ")", new.data))
    for key, (old_value, value) in required.items():
        if old_value != value and key != "dropout":
            flag = "--model=none" if new_config["finetune"] else "--init_from="
            without = f" (or without it, by {flag})" if key == "base" else ""
            if key == "data":  # the numbers may be equal, as with other weights of a mixture
                old_value = f"{old_config.get('data_dir')!r}, {old_value},"
                value = f"{new_config['data_dir']!r}, {value}"
            raise UserError(
                f"{name} was trained with {key}={old_value} and this run has {value}: change it "
                f"back to continue{without}, or start anew in another output folder"
            )
    started_from = old.base or old_config.get("init_from") or new_config["finetune"]
    if new_config["init_from"] and not started_from:
        raise UserError(
            f"{name} is of a run that began with random weights, not with init_from="
            f"{new_config['init_from']!r}: choose another out_dir, or leave out init_from"
        )
    begun, given = old_config.get("init_from"), new_config["init_from"]
    compared = old.base and new.base  # above, by what is in them
    if begun and begun != given and not compared and given not in ("", "none"):
        raise UserError(
            f"{name} began with init_from={begun!r}, not {given!r}: give that again, or choose "
            "another output folder"
        )
    check_embedding_optimizer(old_config, new_config, name)
    check_tensors(old, new, name)
    return [
        f"{key} {old_config[key]!r} -> {value!r}"
        for key, value in new_config.items()
        if key in old_config and old_config[key] != value
        if key == "dropout" or key not in new.model_args  # which are compared above
        if key not in PATH_SETTINGS and not key.startswith("finetune_")  # in force by plain names
    ]


def with_embedding_optimizer(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint, with what they lack where they are of an earlier version."""
    embedding = "adamw" if settings.get("embedding_learning_rate") else "same"
    return {"embedding_optimizer": embedding, "cautious": False} | settings


def check_embedding_optimizer(old: dict[str, Any], new: dict[str, Any], name: Path) -> None:
    """Refuses a checkpoint with other parameter groups; UserError has the flags to continue it."""
    used = old["embedding_optimizer"]
    if used == new["embedding_optimizer"]:
        return
    recipe = RECIPE + (RECIPE_OF_SOPHIAG if new["optimizer"] == "sophiag" else ())
    flags = [
        f"--{'finetune_' * (new['finetune'] and key in FINETUNE_NAMES)}{key}={old[key]}"
        for key in recipe
        if key in old
        and old[key] != new[key]
        and (used, key) != ("same", "embedding_learning_rate")
    ]
    raise UserError(
        f"{name} was trained with another optimizer for embedding and norms: to continue it add "
        f"{' '.join(flags)}, or start anew in another output folder"
    )


def check_tensors(old: TrainingState, new: TrainingState, name: Path) -> None:
    """Refuses tensors that are not finite, or not laid out as in `new`: kernels do not look."""
    moments, expected = old.optimizer_state_dict["state"], new.optimizer_state_dict["state"]
    devices = {"cpu"} | new.rng_state.keys() & old.rng_state.keys()
    generators = {key: new.rng_state[key] for key in devices}
    named = {key: v for key, v in new.model_state_dict.items() if key != "lm_head.weight"}
    average = old.average or {"n": 0}
    pairs = {
        "model_state_dict": (old.model_state_dict, new.model_state_dict),
        "optimizer_state_dict": (moments, expected if moments or old.iter_num else {}),
        "rng_state": ({key: old.rng_state.get(key) for key in generators}, generators),
        "average": (average["weights"], named) if average["n"] else ({}, {}),
    }
    if old.scaler_state_dict and new.scaler_state_dict:
        pairs["scaler_state_dict"] = (old.scaler_state_dict, new.scaler_state_dict)
    for key, (found, like) in pairs.items():
        if (where := misfit(found, like, key)) is not None:
            raise UserError(f"{name}: its {where} does not fit this run{EARLIER}")
    counts = ("step", "hessian_updates")
    steps = [values[name] for values in moments.values() for name in counts if name in values]
    if not all(0 <= step <= old.iter_num for step in steps):
        raise UserError(f"{name}: an optimizer's step is not one of its run{EARLIER}")
    try:
        for key in generators:
            torch.Generator(key).set_state(old.rng_state[key])
    except RuntimeError:
        raise UserError(f"{name}: its rng_state is no random state{EARLIER}") from None
    if not old.is_finite():
        raise UserError(f"{name} holds numbers that are not finite{EARLIER}")


def misfit(found: Any, like: Any, where: str) -> str | None:
    """The place where `found` has not the keys, types and tensor layouts of `like`, or None."""
    if isinstance(like, torch.Tensor):
        fits = isinstance(found, torch.Tensor) and found.layout == torch.strided
        fits = fits and not found.is_nested and found.is_cpu and found.is_contiguous()
        return None if fits and (found.shape, found.dtype) == (like.shape, like.dtype) else where
    if not isinstance(like, dict):
        return None if type(found) is type(like) else where
    if not isinstance(found, dict) or found.keys() != like.keys():
        return where
    places = (misfit(found[key], like[key], f"{where}[{key!r}]") for key in like)
    return next(filter(None, places), None)


def check_decay(config: Any, old: TrainingState, total: int, data_steps: int, name: Path) -> None:
    """Refuses to continue at a lower rate of "wsd" than the checkpoint's, of another length.

    Its decay should have begun before. A rate that rises again is only announced. `data_steps` are
    those for which there is data.
    """
    groups = old.optimizer_state_dict.get("param_groups")
    same_peak = old.config.get("learning_rate") == config.learning_rate
    if config.schedule != "wsd" or not groups or not same_peak or not 0 < old.iter_num < total:
        return
    rate = schedule_of(config, total)(old.iter_num - 1)
    before = groups[0]["lr"]
    if rate > before * (1 + 1e-6):
        print(printable(f"{name} has a rate of {before:.3g}, this run at its step {rate:.3g}"))
    if rate >= before * (1 - 1e-6):
        return
    longer = total
    while longer <= data_steps and longer - round(config.decay_share * longer) < old.iter_num:
        longer += 1
    ways = [f"set max_steps={longer} or more" if longer <= data_steps else "train for more epochs"]
    if (share := math.floor(1000 * (1 - old.iter_num / total)) / 1000) > 0:
        ways.append(f"lower decay_share to {share}")
    raise UserError(
        f"{name} has the rate {before:.3g} after step {old.iter_num}, and a run of {total} steps "
        f"has {rate:.3g} there, since its decay has begun: {', or '.join(ways)}"
    )
