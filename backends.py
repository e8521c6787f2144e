"""What computes the logits: our own model, transformers, or onnxruntime behind one interface.

    backend = open_backend("torch", "checkpoints_ft/best_model.pt")
    logits = backend.logits(ids)  # of the token after ids, (V,)

A backend knows ids and logits only: prompts, sampling, stopping and text live in inference.py.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoint import load_model
from config import UserError
from model import GPT, KVCache

BACKENDS = ("torch", "huggingface", "onnx")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Backend(Protocol):
    block_size: int  # longest sequence, tokens
    vocab_size: int

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 logits (V,) of the token after `ids`, of which there are 1 to block_size.

        Only what follows the longest prefix shared with the previous call is computed, at least
        the last token. Not for two threads at once.
        """


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items at their beginning a and b share."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:  # each step of an answer: one comparison, not a loop
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def checked(ids: Sequence[int], block_size: int) -> list[int]:
    """`ids` as a list; ValueError when there are none or more than the context holds."""
    if not 1 <= len(ids) <= block_size:
        raise ValueError(f"{len(ids)} ids: the context takes 1 to {block_size}")
    return [int(token) for token in ids]


class TorchBackend:
    """The project's own model with its KV cache."""

    def __init__(self, gpt: GPT):
        self.gpt = gpt.eval()
        self.block_size, self.vocab_size = gpt.config.block_size, gpt.config.vocab_size
        self.cache = KVCache.empty(gpt.config, 1, like=gpt.tok_embeddings.weight.detach())
        self.cached: list[int] = []  # the ids whose keys and values are in the cache

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        ids = checked(ids, self.block_size)
        known = min(common_prefix(self.cached, ids), len(ids) - 1)
        self.cached = ids[:known]  # what is surely there if Ctrl-C ends this call halfway
        self.cache.lengths.fill_(known)
        new = torch.tensor([ids[known:]], device=self.cache.keys.device)  # (1, T)
        x = self.gpt.hidden(new, cache=self.cache)[:, -1]  # (1, C)
        self.cached = ids
        return self.gpt.lm_head(x)[0].float()


class HuggingFaceBackend:
    """A model of transformers that keeps all keys and values, as a Llama does."""

    def __init__(self, model: Any):
        self.model = model.eval()
        self.block_size = model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size
        self.cache: Any = None
        self.cached: list[int] = []

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        from transformers import DynamicCache

        ids = checked(ids, self.block_size)
        known = min(common_prefix(self.cached, ids), len(ids) - 1)
        cache, before = self.cache, len(self.cached)
        self.cache, self.cached = None, []  # Ctrl-C below may leave it with layers of two lengths
        if known == 0:
            cache = DynamicCache(config=self.model.config)
        elif known < before:
            cache.crop(known - before)
        new = torch.tensor([ids[known:]], device=self.model.device)  # (1, T)
        output = self.model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.cache, self.cached = cache, ids
        return output.logits[0, -1].float()


def open_backend(
    kind: str,
    model: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Backend:
    """The backend `kind` with a model; arguments as of `inference.lille`. Raises UserError."""
    if kind not in BACKENDS:
        raise UserError(f"backend={kind!r}: choose one of {', '.join(BACKENDS)}")
    if kind == "onnx":
        if dtype is not None:
            raise UserError("an ONNX file has its own dtype: export it with --dtype instead")
        return open_onnx(model, device)
    device, dtype = known_device(device), known_dtype(dtype)
    if kind == "huggingface" and not str(model).endswith(".pt"):
        config = transformers_config(str(model))
        if config is not None:
            return open_transformers(str(model), device, dtype)
    elif kind == "huggingface":
        raise UserError(
            f"{model} is a checkpoint: use the torch backend, or export it with "
            f"python export.py --model={model} --format=hf"
        )
    return TorchBackend(load_model(model, device, dtype))


def known_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; without one, the GPU where there is one."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name!r} cannot be used ({reason}): try 'cpu'") from None
    return device


def known_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of that name; None keeps the model's."""
    name = str(dtype or "").removeprefix("torch.")
    if name and name not in DTYPES:
        raise UserError(f"dtype={name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES.get(name)


def transformers_config(name: str) -> dict[str, Any] | None:
    """The config.json of a folder or hub id, or None if transformers has no such model itself.

    Code that a folder or the hub brings along is never run: our own loader reads those models.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if not Path(name).exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name} is not there: give a folder that export.py wrote, or a hub id")
    try:
        config, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name} has no config.json that can be read ({reason}): give a folder that export.py "
            "wrote or a hub id, and be online the first time"
        ) from None
    return config if config.get("model_type") in CONFIG_MAPPING else None


def open_transformers(
    name: str, device: torch.device, dtype: torch.dtype | None
) -> HuggingFaceBackend:
    """A model that transformers knows, from a folder or a hub id, safetensors only."""
    from transformers import AutoModelForCausalLM

    try:
        with transformers_quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
            )
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} cannot be loaded by transformers: {reason}") from None
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[kind]:  # transformers would go on with random weights
            first = sorted(map(str, report[kind]))[0]
            raise UserError(f"{name}: its tensors are not its config's, {kind}: {first}")
    return HuggingFaceBackend(model.to(device))


@contextmanager
def transformers_quiet() -> Iterator[None]:
    """Without its progress bars and warnings: what is wrong is said in one line instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def open_onnx(model: str | os.PathLike, device: str | torch.device | None) -> Backend:
    try:
        from backend_onnx import OnnxBackend
    except ModuleNotFoundError as error:
        raise UserError(
            f"the onnx backend needs {error.name}, which is not installed: "
            "pip install -r requirements-export.txt"
        ) from None
    return OnnxBackend(model, None if device is None else str(device))
