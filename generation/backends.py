"""Next-token logits from our own model, transformers or onnxruntime behind one interface.

    backend, tokenizer = open_backend("torch", "checkpoints_ft/best_model.pt")
    logits = backend.logits(ids)  # of the token after ids, (V,)

A backend knows token ids and logits only; prompts, sampling, stopping and text are in
conversation.py.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoint import load_model_and_tokenizer
from common.errors import UserError
from formats.onnx_runtime import OnnxBackend
from formats.pretrained import (
    CONFIG,
    count_tensors,
    folder_tokenizer,
    quiet_transformers,
    read_json,
    resolve_model,
)
from generation.fast_decode import Decoder
from model import GPT
from ops.kv_cache import KVCache, common_prefix
from tokenizer import Tokenizer

BACKENDS = ("torch", "huggingface", "onnx")
DTYPES = ("float32", "bfloat16", "float16")


class Backend(Protocol):
    block_size: int  # longest sequence, tokens
    vocab_size: int

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 logits (V,) of the token after `ids`, of which there are 1 to block_size.

        Only the tokens after the longest prefix shared with the previous call are computed, at
        least the last one. Raises ValueError for another number of ids. Not thread-safe.
        """


def reusable_prefix(cached_ids: list[int], ids: list[int], block_size: int) -> int:
    """Number of leading `ids` whose cached keys and values can be reused; the last is computed."""
    if not 1 <= len(ids) <= block_size:
        raise ValueError(f"{len(ids)} ids: the context takes 1 to {block_size}")
    return min(common_prefix(cached_ids, ids), len(ids) - 1)


class TorchBackend:
    """The project's own model with its KV cache; `weights` as in `fast_decode.Decoder`."""

    def __init__(self, gpt: GPT, weights: str | None = None):
        self.gpt, self.decoder = gpt.eval(), Decoder(gpt, weights)
        self.block_size, self.vocab_size = gpt.config.block_size, gpt.config.vocab_size
        self.cache = KVCache.empty(gpt.config, 1, like=gpt.tok_embeddings.weight.detach())
        self.cached_ids: list[int] = []

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        ids = list(ids)
        n_cached = reusable_prefix(self.cached_ids, ids, self.block_size)
        self.cached_ids = ids[:n_cached]  # all that is certain if Ctrl-C interrupts this call
        self.cache.lengths.fill_(n_cached)
        tokens = torch.tensor(ids[n_cached:], device=self.cache.keys.device)  # (T,)
        if len(tokens) == 1:
            logits = self.decoder(tokens, self.cache)
        else:
            logits = self.gpt.lm_head(self.gpt.hidden(tokens[None], cache=self.cache)[:, -1])
        self.cached_ids = ids
        return logits[0].float()


class HuggingFaceBackend:
    """A transformers model with full attention, such as Llama, and its DynamicCache."""

    def __init__(self, model: Any):
        self.model = model.eval()
        self.block_size = model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size
        self.cache: Any = None
        self.cached_ids: list[int] = []

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        from transformers import DynamicCache

        ids = list(ids)
        n_cached = reusable_prefix(self.cached_ids, ids, self.block_size)
        cache, excess = self.cache, len(self.cached_ids) - n_cached
        self.cache, self.cached_ids = None, []  # Ctrl-C may leave layers of different lengths
        if n_cached == 0:
            cache = DynamicCache(config=self.model.config)
        elif excess:
            cache.crop(-excess)
        tokens = torch.tensor([ids[n_cached:]], device=self.model.device)  # (1, T)
        output = self.model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        self.cache, self.cached_ids = cache, ids
        return output.logits[0, -1].float()


def open_backend(
    kind: str,
    model: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[Backend, Tokenizer]:
    """A model in a backend, one of BACKENDS, and its tokenizer; arguments as in `inference.lille`.

    Raises UserError.
    """
    if kind not in BACKENDS:
        raise UserError(f"backend={kind!r}: choose one of {', '.join(BACKENDS)}")
    if kind == "onnx":
        backend = OnnxBackend(model, None if device is None else str(device), dtype and str(dtype))
        return backend, folder_tokenizer(backend.folder)
    path, device = resolve_model(model, with_tokenizer=True), resolve_device(device)
    name = str(dtype or "").removeprefix("torch.")
    if kind == "torch" and name == "int8":
        gpt, tokenizer = load_model_and_tokenizer(path, device)
        return TorchBackend(gpt, weights="int8"), tokenizer
    if name and name not in DTYPES:
        names = ", ".join(DTYPES)
        raise UserError(f"dtype={name!r}: choose one of {names}, or int8 with the torch backend")
    dtype = getattr(torch, name) if name else None
    if kind == "huggingface" and has_transformers_class(path):
        return open_transformers(path, device, dtype), folder_tokenizer(path)
    gpt, tokenizer = load_model_and_tokenizer(path, device, dtype)
    return TorchBackend(gpt), tokenizer


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device `device`, checked for use; None is the GPU if there is one, else the CPU."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name!r} cannot be used ({reason}): try 'cpu'") from None
    return device


def has_transformers_class(path: Path) -> bool:
    """Whether transformers itself has the architecture of a folder; our loader reads the others.

    Code in a folder or on the Hub is never run. Raises UserError for a checkpoint file.
    """
    from transformers import CONFIG_MAPPING

    if path.is_file():
        raise UserError(
            f"{path} is a file: use the torch backend, or export it with "
            f"python export.py --model={path} --format=hf"
        )
    return str(read_json(path / CONFIG).get("model_type")) in CONFIG_MAPPING


def open_transformers(
    folder: Path, device: torch.device, dtype: torch.dtype | None
) -> HuggingFaceBackend:
    """Loads a folder with transformers, from safetensors only."""
    from transformers import AutoModelForCausalLM

    n_layers = read_json(folder / CONFIG).get("num_hidden_layers")
    try:
        if isinstance(n_layers, int) and n_layers > max(1000, n_tensors := count_tensors(folder)):
            raise ValueError(f"{n_layers} layers cannot be made of {n_tensors} tensors")
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # config.json may hold anything
        if isinstance(error, MemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} cannot be loaded by transformers: {reason}") from None
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[kind]:  # transformers would fill in random weights
            first = sorted(map(str, report[kind]))[0]
            raise UserError(f"{folder}: its tensors are not its config's, {kind}: {first}")
    return HuggingFaceBackend(model.to(device))
