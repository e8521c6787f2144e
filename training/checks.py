"""Checks of a run: settings, ranks, schedule, prompt, disk space, the checkpoint to continue."""

import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from checkpoint import TrainingState, check_tokenizer, checkpoints_in
from common.errors import UserError, printable
from common.files import check_free_space
from model import GPT
from training.learning_rates import learning_rate_at
from training.metrics import tracker_of

SHAPE = ("n_layers", "n_embd", "n_heads", "n_kv_heads", "block_size", "layer_norm_eps")
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

FIXED_SETTINGS = ("finetune", "optimizer", "seed")  # a resumed run has the same ones
PATH_SETTINGS = (
    "data_dir",
    "out_dir",
    "finetune_data_dir",
    "finetune_out_dir",
    "resume_checkpoint",
    "init_from",
    "watch_data_dir",
)
# Settings that an earlier train.py had other values of.
RECIPE_OF_SOPHIAG = ("beta1", "beta2", "rho", "cautious")
RECIPE = ("embedding_optimizer", "learning_rate", "embedding_learning_rate")
# Parts of the messages of PyTorch's CPU allocator, whose errors have no type of their own.
OUT_OF_MEMORY_SIGNS = ("DefaultCPUAllocator", "Storage size calculation overflowed")
EARLIER = ": start from an earlier checkpoint (move this one away)"


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


def check_decay(config: Any, old: TrainingState, total: int, data_steps: int, name: Path) -> None:
    """Refuses to continue at a lower rate of "wsd" than the checkpoint's, of another length.

    Its decay should have begun before. A rate that rises again is only announced. `data_steps` are
    those for which there is data.
    """
    groups = old.optimizer_state_dict.get("param_groups")
    same_peak = old.config.get("learning_rate") == config.learning_rate
    if config.schedule != "wsd" or not groups or not same_peak or not 0 < old.iter_num < total:
        return
    settings = (config.learning_rate, config.warmup_iters, total, config.min_lr_ratio)
    rate = learning_rate_at(old.iter_num - 1, *settings, "wsd", config.decay_share)
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
    check_tokenizer(old.tokenizer_sha256, name, new.tokenizer_sha256)
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
    check_embedding_optimizer(old_config, new_config, name)
    check_tensors(old, new, name)
    return [
        f"{key} {old_config[key]!r} -> {value!r}"
        for key, value in new_config.items()
        if key in old_config and old_config[key] != value
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
