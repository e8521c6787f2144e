"""Saving, loading and resuming of checkpoints; defines their keys and reads the old formats.

A checkpoint is a torch.save file with the keys of `TrainingState`, of which `model_state_dict`,
`optimizer_state_dict`, `model_args`, `iter_num` and `best_val_loss` are the original's. It is
always loaded with `weights_only=True`:

    model = load_model("checkpoints/best_model.pt")
    model, tokenizer = load_model_and_tokenizer("checkpoints/best_model.pt")
"""

import os
import re
import shutil
import sys
import threading
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, one_line, printable
from common.files import atomic_file
from formats.llama import check_bounds
from formats.pretrained import folder_tokenizer, gpt_from_folder, resolve_model
from model import GPT, GPTConfig
from tokenizer import HASTINGS, Tokenizer, load_tokenizer

BEST = "best_model.pt"
CHECKPOINT = re.compile(r"ckpt_([0-9]{7,})\.pt")  # the step, in at least seven digits
KEY_PREFIXES = ("_orig_mod.", "module.")  # torch.compile, DistributedDataParallel


def clean_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plain keys: without wrappers' prefixes and without the original's saved RoPE tables."""
    cleaned = {}
    for key, tensor in state.items():
        while key.startswith(KEY_PREFIXES):
            key = key.split(".", 1)[1]
        if not key.startswith("rotary_emb."):
            cleaned[key] = tensor
    return cleaned


def model_config(model_args: dict[str, Any]) -> GPTConfig:
    """The configuration of a checkpoint; one without `rope_style` is the original's: "lille"."""
    return GPTConfig(**({"rope_style": "lille"} | model_args))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; UserError when it is missing, damaged or unsafe."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the path of a .pt file in it")
    if not path.exists():
        raise UserError(f"{path} is not there: give the path of a .pt checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not notice flipped bits
            if any(member.compress_type for member in archive.infolist()):
                raise UserError(f"{path} is compressed, which torch.save never does")
            damaged_member = archive.testzip()
        if damaged_member is not None:
            raise UserError(f"{path} is damaged (its {damaged_member} does not match its checksum)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        raise UserError(f"{path} is not a checkpoint, or only half of one") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        if isinstance(error, UserError | MemoryError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a weights-only checkpoint: {reason}") from None
    missing = {"model_state_dict", "model_args"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise UserError(f"{path} has no {' and no '.join(sorted(missing))}: not a Lille checkpoint")
    return state


def model_from_checkpoint(state: dict[str, Any], name: str | Path, **changes: Any) -> GPT:
    """The model of a loaded checkpoint, its `model_args` with `changes`, in training mode."""
    try:
        config = model_config(state["model_args"] | changes)
        weights = clean_state_dict(state["model_state_dict"])
        check_bounds(config, weights)
        with torch.device("meta"):  # names and shapes, before memory is taken
            GPT(config).load_state_dict(weights, assign=True)
        head, embedding = weights.get("lm_head.weight"), weights.get("tok_embeddings.weight")
        both = head is not None and embedding is not None
        if both and not torch.equal(head, embedding):
            raise ValueError("lm_head.weight is not tok_embeddings.weight")
        model = GPT(config)
        model.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name}: its weights do not fit its model_args: {reason}") from None
    return model


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> GPT:
    """A model in evaluation mode, from a checkpoint or from any form that it is published in.

    `path` is a `.pt`, ours or the original's; an exported folder; the original's published folder;
    a hub id such as "Nikity/lille-130m-instruct"; "130m-instruct" or "130m-base". `dtype` None
    keeps that of a folder's weights; those of a `.pt` are float32 then. UserError for anything
    else, and for a folder or checkpoint that contradicts itself.
    """
    path = resolve_model(path)
    if path.is_dir():
        model = gpt_from_folder(path)
    else:
        model = model_from_checkpoint(load_checkpoint(path), path)
    return model.to(device=device, dtype=dtype).eval()


def load_model_and_tokenizer(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[GPT, Tokenizer]:
    """A model as `load_model` gives it, and the tokenizer that came with it.

    UserError too for a model of another project, whose tokenizer has no control tokens of ours.
    """
    path = resolve_model(path, with_tokenizer=True)
    if path.is_dir():
        return load_model(path, device, dtype), folder_tokenizer(path)
    state = load_checkpoint(path)
    model = model_from_checkpoint(state, path)
    tokenizer = checkpoint_tokenizer(state, path, model.config.vocab_size)
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def checkpoint_tokenizer(state: dict[str, Any], name: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a loaded checkpoint; one that carries none must be of Hastings.

    UserError if it is not that of a model with `vocab_size`.
    """
    content, sha256 = state.get("tokenizer_json"), state.get("tokenizer_sha256")
    try:
        tokenizer = Tokenizer(content.encode()) if content else load_tokenizer()
    except Exception as error:  # a checkpoint may hold anything
        raise UserError(f"{name}: its tokenizer cannot be read ({one_line(error)})") from None
    if sha256 is not None and str(sha256) != tokenizer.sha256:
        raise UserError(
            f"{name} was trained with another tokenizer than "
            + ("it carries: it is damaged" if content else f"{HASTINGS.name}, and carries none")
            + ": give another checkpoint of its run"
        )
    if vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{name} has vocab_size {vocab_size} and the tokenizer {tokenizer.vocab_size}: it is "
            "not a Lille model"
        )
    return tokenizer


@dataclass
class TrainingState:
    """Everything that an exact resume needs. The field names are the keys of a checkpoint."""

    model_state_dict: dict[str, torch.Tensor]
    optimizer_state_dict: dict[str, Any]
    scaler_state_dict: dict[str, Any]  # of the float16 loss scaling; empty without it
    model_args: dict[str, Any]
    iter_num: int  # completed steps
    best_val_loss: float
    config: dict[str, Any]  # the settings in force
    tokenizer_sha256: str
    data_cursor: int  # number of the next row
    rng_state: dict[str, torch.Tensor]  # by device type
    data: str | None  # dataset id of the training data
    base: str | None  # sha256 of the weights that the run started from
    average: dict[str, Any] | None = None  # {"n": steps, "weights": {name: tensor}}; n 0: is one
    tokenizer_json: str | None = None  # its file; None in earlier checkpoints: Hastings

    @classmethod
    def of(cls, checkpoint: dict[str, Any], name: str | Path) -> "TrainingState":
        """The state in a loaded checkpoint; UserError for one that holds weights alone."""
        if "config" not in checkpoint:
            raise UserError(
                f"{name} has no training state to continue from: start from it with "
                f"--init_from={name} and another out_dir, or to fine-tune with --finetune "
                f"--model={name} and another finetune_out_dir than its folder"
            )
        return cls(**{field.name: checkpoint.get(field.name) for field in fields(cls)})

    def is_finite(self) -> bool:
        """Whether all weights, moments and step counts are."""
        moments = (self.optimizer_state_dict or {}).get("state", {})
        groups = (self.model_state_dict or {}, *moments.values())
        values = (value for group in groups for value in group.values())
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        return all(bool(tensor.sum(dtype=torch.float32).isfinite()) for tensor in tensors)


def check_tokenizer(state: dict[str, Any], name: str | Path, expected: str) -> None:
    """Refuses to train on from a checkpoint of another tokenizer; the original's are Hastings'."""
    sha256 = state.get("tokenizer_sha256")
    if str(load_tokenizer().sha256 if sha256 is None else sha256) != expected:
        settings = state.get("config")
        known = settings.get("tokenizer") if isinstance(settings, dict) else None
        raise UserError(
            f"{name} was trained with another tokenizer: give --tokenizer={known or HASTINGS}, as "
            "it was then, here and to the prepare scripts, or train anew in another out_dir"
        )


def snapshot(value: Any, copies: dict[tuple, torch.Tensor] | None = None) -> Any:
    """A copy of nested dicts and lists whose tensors are on the CPU and no longer change.

    A tensor that occurs twice, as the tied embedding does, is copied and saved once.
    """
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() == 0 or key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {key: snapshot(item, copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item, copies) for item in value)
    return value


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy where links are not possible."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        if os.name == "nt":
            raise OSError("a link to a file that is open cannot be renamed")
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as original, atomic_file(target) as copy:
            shutil.copyfileobj(original, copy)
    else:
        os.replace(temporary, target)


def checkpoints_in(directory: Path) -> list[Path]:
    """The `ckpt_0001000.pt` files of a folder, newest first."""
    found = [path for path in directory.glob("ckpt_*.pt") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_in_name, reverse=True)


def step_in_name(path: Path) -> int:
    return int(CHECKPOINT.fullmatch(path.name)[1])


def latest_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and content of the newest readable checkpoint; damaged ones are reported and skipped."""
    best = directory / BEST
    for path in [*checkpoints_in(directory), *([best] if best.exists() else [])]:
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            print(f"skipped a checkpoint: {printable(error)}", file=sys.stderr)
    return None


class CheckpointWriter:
    """Writes checkpoints in the background; keeps the last `keep` of them and the best one.

    `save` copies the tensors before it returns, so training continues at once; UserError if they
    are not finite, which would replace good ones. `best` saves the same state as the best model, or
    the state `averaged`. A failed write (a full disk) is reported and
    leaves the earlier checkpoints; `wait` raises it. With several ranks only one is `active`; the
    others write nothing.
    """

    def __init__(self, directory: Path, keep: int, active: bool = True):
        self.directory, self.keep, self.active = directory, keep, active
        self.written = threading.Event()  # not Thread.join: after Ctrl-C in it, it does not wait
        self.written.set()
        self.error: OSError | None = None
        self.unsaved_best: dict[str, Any] | None = None
        if active:
            directory.mkdir(parents=True, exist_ok=True)

    def save(self, state: TrainingState, best: bool, averaged: TrainingState | None = None) -> Path:
        self.close()
        path = self.directory / f"ckpt_{state.iter_num:07d}.pt"
        if not self.active:
            return path
        if not state.is_finite():
            good = next(iter(checkpoints_in(self.directory)), None)
            raise UserError(
                f"step {state.iter_num}: weights or moments are not finite any more and are not "
                f"saved: lower learning_rate (now {state.config.get('learning_rate')}) or raise "
                "warmup_iters, and "
                + (f"continue from {good}, which is good" if good else "start anew")
            )
        copy = snapshot(vars(state))
        other = snapshot(vars(averaged)) if best and averaged else copy
        thread = threading.Thread(target=self.write, args=(path, copy, other if best else None))
        self.written.clear()
        thread.start()
        return path

    def write(self, path: Path, state: dict[str, Any], best: dict[str, Any] | None) -> None:
        try:
            other = self.unsaved_best if best is None else best
            if other is not None and other is not state:
                with atomic_file(self.directory / BEST) as file:
                    torch.save(other, file)
            with atomic_file(path) as file:
                torch.save(state, file)
                # Before the rename: after a kill in between, a resumed run makes it again.
                if best is state:
                    file.flush()
                    os.fsync(file.fileno())
                    link_or_copy(Path(file.name), self.directory / BEST)
            files = checkpoints_in(self.directory)
            written = [p for p in files if step_in_name(p) <= step_in_name(path)]
            for old in written[self.keep :]:  # newer, damaged ones do not count
                old.unlink()
            self.error = self.unsaved_best = None
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self.error = error if isinstance(error, OSError) else OSError(str(error))
            self.unsaved_best = self.unsaved_best if best is None else best
            print(f"could not save {path}: {error}; the earlier checkpoints are intact", flush=True)
        finally:
            self.written.set()

    def close(self) -> None:
        """Waits for the write in progress; a failed one has been reported."""
        while not self.written.wait(1):  # a time limit lets Windows see Ctrl-C
            pass

    def wait(self) -> None:
        """Returns when everything is on disk; UserError if the last checkpoint is not."""
        self.close()
        if self.error is not None:
            raise UserError(
                f"the last checkpoint could not be written ({self.error}): free some space in "
                f"{self.directory} and run again to continue from the one before"
            )
