"""Runtimes that decode one model, each made from files of a folder.

`write_files` makes the folder: hf/ for transformers and ours, and on request an ONNX graph and a
GGUF of each dtype. Run as a module it makes one runtime, answers once and prints the memory that
this took: the process's peak less what it held before.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.timing import peer
from checkpoint import load_model
from formats.pretrained import quiet_transformers
from generation.fast_decode import BLOCK, Decoder
from model import GPT
from ops.kv_cache import KVCache
from tokenizer import load_tokenizer

Prompts = list[list[int]]  # of equal length


class Runtime(Protocol):
    n_bytes: float  # of the weights, which a step reads once

    def answer(self, prompts: Prompts, n: int) -> object:
        """`n` greedy tokens after each prompt."""

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits (T, V) after each of T tokens, which are given one by one."""


@functools.cache
def gpt_of(folder: Path, device: str, dtype: torch.dtype) -> GPT:
    return load_model(folder / "hf", device, dtype)


class Ours:
    def __init__(self, folder: Path, device: str, dtype: torch.dtype, **options: Any):
        """`options` are those of Decoder; ValueError where it cannot have them."""
        self.gpt = gpt_of(folder, device, dtype)
        self.decoder = Decoder(self.gpt, **options)
        weights = getattr(torch, options.get("weights") or str(dtype)[6:])
        scale = 2 / BLOCK if weights is torch.int8 else 0  # bytes of its share of a scale
        self.n_bytes = self.gpt.n_parameters() * (weights.itemsize + scale)
        self.cache = functools.cache(self.new_cache)  # by the number of rows

    def new_cache(self, rows: int) -> KVCache:
        return KVCache.empty(self.gpt.config, rows, like=self.gpt.lm_head.weight)

    def answer(self, prompts: Prompts, n: int) -> object:
        cache = self.cache(len(prompts))
        return self.gpt.generate(prompts, n, temperature=0, decoder=self.decoder, cache=cache)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        cache, rows = self.new_cache(1), []
        for token in torch.tensor(ids, device=cache.keys.device):
            rows.append(self.decoder(token[None], cache)[0].float().cpu())
            cache.lengths += 1
        return torch.stack(rows)


class Transformers:
    def __init__(self, folder: Path, device: str, dtype: torch.dtype, **options: Any):
        """`options` are those of generate."""
        with quiet_transformers():
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(
                folder / "hf", dtype=dtype, attn_implementation="sdpa", trust_remote_code=True
            )
        self.model, self.options = model.to(device).eval(), options
        self.model.generation_config.eos_token_id = None  # all write equally many tokens
        self.n_bytes = model.num_parameters() * dtype.itemsize

    def answer(self, prompts: Prompts, n: int) -> object:
        ids = torch.tensor(prompts, device=self.model.device)
        options = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0} | self.options
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        cache, rows = None, []
        for token in torch.tensor(ids, device=self.model.device):
            step = self.model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            rows.append(step.logits[0, 0].float().cpu())
        return torch.stack(rows)


class Onnxruntime:
    def __init__(self, folder: Path, device: str, dtype: str):
        from formats.onnx_runtime import FILES, OnnxBackend

        self.backend = OnnxBackend(folder, device, dtype)
        self.n_bytes = sum(file.stat().st_size for file in folder.glob(FILES[dtype] + "*"))

    def answer(self, prompts: Prompts, n: int) -> object:
        ids, past = np.array(prompts), self.backend.no_past(len(prompts))
        for _ in range(n):
            logits, *past = self.backend.run(ids, past)
            ids = logits.numpy()[:, -1].argmax(axis=-1)[:, None]

    def logits(self, ids: list[int]) -> torch.Tensor:
        return torch.stack([self.backend.logits(ids[: i + 1]) for i in range(len(ids))])


class LlamaCpp:
    """llama.cpp's own functions, through llama-cpp-python, with its defaults."""

    ROWS, TOKENS = 64, 2048  # sequences and positions that fit

    def __init__(self, folder: Path, device: str, dtype: str):
        import llama_cpp.llama_cpp as native

        self.native, path = native, folder / f"{dtype}.gguf"
        self.silent = native.llama_log_callback(lambda level, text, data: None)
        native.llama_log_set(self.silent, None)
        native.llama_backend_init()
        self.n_bytes = path.stat().st_size
        model_options = native.llama_model_default_params()
        self.model = native.llama_model_load_from_file(str(path).encode(), model_options)
        options = native.llama_context_default_params()
        options.n_ctx = options.n_batch = self.TOKENS
        options.n_seq_max, options.kv_unified = self.ROWS, True
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = native.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot read {path}")
        self.n_vocab = native.llama_vocab_n_tokens(native.llama_model_get_vocab(self.model))
        self.batch = native.llama_batch_init(self.TOKENS, 0, 1)

    def clear(self) -> None:
        self.native.llama_memory_clear(self.native.llama_get_memory(self.context), True)

    def step(self, rows: Iterable[list[int]], start: int) -> np.ndarray:
        """Logits (B, V) after the last of each row's tokens, which begin at position `start`."""
        batch, n, last = self.batch, 0, []
        for row, ids in enumerate(rows):
            for position, token in enumerate(ids, start):
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, position, 1
                batch.seq_id[n][0], batch.logits[n] = row, position == start + len(ids) - 1
                n += 1
            last.append(n - 1)
        batch.n_tokens = n
        if self.native.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        pointers = [self.native.llama_get_logits_ith(self.context, i) for i in last]
        return np.stack([np.ctypeslib.as_array(p, (self.n_vocab,)) for p in pointers])

    def answer(self, prompts: Prompts, n: int) -> object:
        self.clear()
        rows, start = prompts, 0
        for _ in range(n):
            tokens = self.step(rows, start).argmax(axis=-1)
            start += len(rows[0])
            rows = [[int(token)] for token in tokens]

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.clear()
        return torch.from_numpy(np.concatenate([self.step([[t]], i) for i, t in enumerate(ids)]))


def makers(device: str, dtype: torch.dtype, exports: bool) -> dict[str, Callable[..., Runtime]]:
    """Factories of the runtimes, by name, each taking the folder; absent packages have none."""
    common: dict[str, Any] = {"device": device, "dtype": dtype}
    of: dict[str, Callable[..., Runtime]] = {
        "transformers generate": functools.partial(Transformers, **common),
        "ours, plain PyTorch": functools.partial(Ours, **common, mode="eager"),
    }
    if device == "cuda":  # a static cache makes transformers compile its step into CUDA graphs
        static = {"cache_implementation": "static"}
        name = "transformers, static cache, compiled"
        of[name] = functools.partial(Transformers, **common, **static)
        of["ours"] = functools.partial(Ours, **common)
        of["ours, compiled"] = functools.partial(Ours, **common, mode="compile")
        return of
    for weights in ("float32", "bfloat16", "int8"):
        of[f"ours, {weights} weights"] = functools.partial(Ours, **common, weights=weights)
    if exports and all(map(peer, ONNX_PACKAGES)):
        for name in ("fp32", "int8"):
            of[f"onnxruntime, {name}"] = functools.partial(Onnxruntime, device=device, dtype=name)
    if exports and all(map(peer, GGUF_PACKAGES)):
        for name in ("f32", "q8_0"):
            of[f"llama.cpp, {name}"] = functools.partial(LlamaCpp, device=device, dtype=name)
    return of


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
GGUF_PACKAGES = ("gguf", "llama_cpp")


def write_files(gpt: GPT, folder: Path, exports: bool) -> None:
    """Writes what `makers` reads; the tokenizer, which nobody uses, need not fit the model."""
    from formats import write_gguf, write_hf, write_onnx
    from formats.onnx_runtime import FILES

    tokenizer = load_tokenizer()
    (folder / "hf").mkdir()
    write_hf.write_folder(gpt, tokenizer, folder / "hf", "float32")
    if exports and all(map(peer, ONNX_PACKAGES)):
        (folder / "onnx").mkdir()
        write_onnx.write_configs(gpt, tokenizer, folder, "fp32")
        for dtype in ("fp32", "int8"):
            write_onnx.write_graph(gpt, folder / FILES[dtype], dtype)
    if exports and all(map(peer, GGUF_PACKAGES)):
        for dtype in ("f32", "q8_0"):
            write_gguf.write_file(gpt, None, folder / f"{dtype}.gguf", dtype)


def memory(device: str, peak: bool) -> int:
    """Bytes that this process holds, or has held at most; on CUDA what PyTorch has allocated."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if sys.platform == "linux":  # there ru_maxrss begins with the memory of the parent
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:" if peak else "VmRSS:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(path: str, name: str, device: str, dtype: str, n_prompt: str, n_new: str) -> None:
    make = makers(device, getattr(torch, dtype), exports=True)[name]
    before = memory(device, peak=False)
    make(Path(path)).answer([list(range(1, int(n_prompt) + 1))], int(n_new))
    print(memory(device, peak=True) - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
