"""What computes the logits: our own model, transformers, or onnxruntime behind one interface.

    backend = open_backend("torch", "checkpoints_ft/best_model.pt")
    logits = backend.logits(ids)  # of the token after ids, (V,)

A backend knows ids and logits only: prompts, sampling, stopping and text live in inference.py.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoint import load_model
from common.errors import UserError
from formats.onnx_runtime import OnnxBackend
from formats.pretrained import CONFIG, model_folder, read_json
from formats.verify_hf import quiet_transformers
from generation.fast_decode import Decoder
from model import GPT
from ops.kv_cache import KVCache, common_prefix

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


def checked(ids: Sequence[int], block_size: int) -> list[int]:
    """`ids` as a list; ValueError when there are none or more than the context holds."""
    if not 1 <= len(ids) <= block_size:
        raise ValueError(f"{len(ids)} ids: the context takes 1 to {block_size}")
    return [int(token) for token in ids]


class TorchBackend:
    """The project's own model with its KV cache; `weights` as of `decoding.Decoder`."""

    def __init__(self, gpt: GPT, weights: str | None = None):
        self.gpt, self.decoder = gpt.eval(), Decoder(gpt, weights)
        self.block_size, self.vocab_size = gpt.config.block_size, gpt.config.vocab_size
        self.cache = KVCache.empty(gpt.config, 1, like=gpt.tok_embeddings.weight.detach())
        self.cached: list[int] = []  # the ids whose keys and values are in the cache

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        ids = checked(ids, self.block_size)
        known = min(common_prefix(self.cached, ids), len(ids) - 1)
        self.cached = ids[:known]  # what is surely there if Ctrl-C ends this call halfway
        self.cache.lengths.fill_(known)
        new = torch.tensor(ids[known:], device=self.cache.keys.device)  # (T,)
        if len(new) == 1:
            logits = self.decoder(new, self.cache)
        else:
            logits = self.gpt.lm_head(self.gpt.hidden(new[None], cache=self.cache)[:, -1])
        self.cached = ids
        return logits[0].float()


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
        return OnnxBackend(model, None if device is None else str(device))
    device = known_device(device)
    if kind == "huggingface":
        folder = transformers_folder(model)
        if folder is not None:
            return open_transformers(folder, device, known_dtype(dtype))
    if str(dtype).removeprefix("torch.") == "int8":
        try:
            return TorchBackend(load_model(model, device), weights="int8")
        except ValueError as error:
            raise UserError(str(error)) from None
    return TorchBackend(load_model(model, device, known_dtype(dtype)))


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
        names = ", ".join(DTYPES)
        raise UserError(f"dtype={name!r}: choose one of {names}, or int8 with the torch backend")
    return DTYPES.get(name)


def transformers_folder(model: str | os.PathLike) -> Path | None:
    """The folder of a model on disk or on the hub, or None if transformers has no such model.

    Code that a folder or the hub brings along is never run: our own loader reads those models.
    """
    from transformers import CONFIG_MAPPING

    folder = model_folder(model)
    if folder is None and Path(model).is_file():
        raise UserError(
            f"{model} is a file: use the torch backend, or export it with "
            f"python export.py --model={model} --format=hf"
        )
    if folder is None:
        return None  # load_model says what is wrong
    return folder if read_json(folder / CONFIG).get("model_type") in CONFIG_MAPPING else None


def open_transformers(
    folder: Path, device: torch.device, dtype: torch.dtype | None
) -> HuggingFaceBackend:
    """A model that transformers knows, safetensors only."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
            )
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} cannot be loaded by transformers: {reason}") from None
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[kind]:  # transformers would go on with random weights
            first = sorted(map(str, report[kind]))[0]
            raise UserError(f"{folder}: its tensors are not its config's, {kind}: {first}")
    return HuggingFaceBackend(model.to(device))
