"""Saves, loads and resumes checkpoints; the only file that knows key prefixes and old formats.

A checkpoint is a torch.save file with `model_state_dict`, `optimizer_state_dict`, `model_args`,
`iter_num` and `best_val_loss`, as the original's had, and the run's config, tokenizer hash, data
cursor and RNG states. It loads with `weights_only=True`, always:

    model = load_model("checkpoints/best_model.pt")
"""

import os
import shutil
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import atomic_file
from formats.pretrained import VERSIONS, gpt_of_folder, model_folder
from model import GPT, GPTConfig

BEST = "best_model.pt"
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
    """Reads a whole checkpoint on the CPU; UserError when it is missing, damaged or unsafe."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the path of a .pt file in it")
    if not path.exists():
        raise UserError(f"{path} is not there: give the path of a .pt checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not notice flipped bits
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path} is damaged (its {damaged} does not match its checksum)")
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


def model_of(state: dict[str, Any], name: str | Path, **changes: Any) -> GPT:
    """The model of a loaded checkpoint, its `model_args` with `changes`, in training mode."""
    try:
        model = GPT(model_config(state["model_args"] | changes))
        weights = clean_state_dict(state["model_state_dict"])
        head, embedding = weights.get("lm_head.weight"), weights.get("tok_embeddings.weight")
        both = head is not None and embedding is not None
        if both and not torch.equal(head, embedding):
            raise ValueError("lm_head.weight is not tok_embeddings.weight")
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
    folder = model_folder(path)
    if folder is None and not Path(path).is_file():
        what = "a folder without config.json" if Path(path).is_dir() else "not there"
        raise UserError(
            f"{path} is {what}: give the path of a .pt checkpoint or of an exported folder, a hub "
            f"id like {VERSIONS['130m-instruct']}, or {' or '.join(VERSIONS)}"
        )
    model = gpt_of_folder(folder) if folder else model_of(load_checkpoint(path), path)
    return model.to(device=device, dtype=dtype).eval()


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


def same_content(source: Path, target: Path) -> None:
    """Makes `target` the file `source` without writing its bytes again where links are possible."""
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
    return sorted(directory.glob(f"ckpt_{'[0-9]' * 7}.pt"), reverse=True)


def latest_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read; a damaged one is named and skipped."""
    best = directory / BEST
    for path in [*checkpoints_in(directory), *([best] if best.exists() else [])]:
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            print(f"skipped a checkpoint: {error}", file=sys.stderr)
    return None


class CheckpointWriter:
    """Writes checkpoints in the background, keeps the last `keep` of them and the best one.

    `save` copies the tensors before it returns, so training may go on at once. A failed write (a
    full disk) is reported and leaves the earlier checkpoints; `wait` raises it. Of several ranks
    only one is `active`, the others write nothing.
    """

    def __init__(self, directory: Path, keep: int, active: bool = True):
        self.directory, self.keep, self.active = directory, keep, active
        self.thread: threading.Thread | None = None
        self.error: OSError | None = None
        self.unsaved_best: dict[str, Any] | None = None
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.pt.tmp"):  # of a killed run
            leftover.unlink()

    def save(self, state: dict[str, Any], best: bool) -> Path:
        self.join()
        path = self.directory / f"ckpt_{state['iter_num']:07d}.pt"
        if not self.active:
            return path
        self.thread = threading.Thread(target=self.write, args=(path, snapshot(state), best))
        self.thread.start()
        return path

    def write(self, path: Path, state: dict[str, Any], best: bool) -> None:
        try:
            if self.unsaved_best is not None and not best:
                with atomic_file(self.directory / BEST) as file:
                    torch.save(self.unsaved_best, file)
            with atomic_file(path) as file:
                torch.save(state, file)
                if best:  # before the rename: after a kill in between, "auto" makes it again
                    file.flush()
                    os.fsync(file.fileno())
                    same_content(Path(file.name), self.directory / BEST)
            written = [p for p in checkpoints_in(self.directory) if p.name <= path.name]
            for old in written[self.keep :]:  # not by damaged newer ones
                old.unlink()
            self.error = self.unsaved_best = None
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self.error = error if isinstance(error, OSError) else OSError(str(error))
            self.unsaved_best = state if best else self.unsaved_best
            print(f"could not save {path}: {error}; the earlier checkpoints are intact", flush=True)

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def wait(self) -> None:
        """Returns when everything is on disk; UserError if the last checkpoint is not."""
        self.join()
        if self.error is not None:
            raise UserError(
                f"the last checkpoint could not be written ({self.error}): free some space in "
                f"{self.directory} and run again to continue from the one before"
            )
