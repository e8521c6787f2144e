"""benchmark.py --section=decode: one answer, token by token, ours beside other runtimes.

Every contestant reads the same prompt and writes equally many tokens greedily, prompt included. The
limit of each is the time to read its weights once a token, at the rate at which this machine sums
as many floats. With --exports=True random weights of the same shape are written as ONNX and GGUF
files into a temporary folder, by export.py's writers, and run by onnxruntime and llama.cpp.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.inputs import SHAPE
from benchmarks.peers import llama_of, original_of
from generation.fast_decode import Decoder
from model import GPT, GPTConfig
from ops.kv_cache import KVCache
from tokenizer import load_tokenizer

PROMPT = 16  # tokens

Contestants = dict[str, tuple[Callable[[], object], float]]  # and the bytes of the weights


def original_answer(original: torch.nn.Module, prompt: torch.Tensor, n: int) -> None:
    ids = original.generate(prompt, n, top_k=1)  # its way to be greedy
    assert ids.shape[1] == prompt.shape[1] + n


def peers(
    gpt: GPT, prompt: torch.Tensor, n: int, device: torch.device, dtype: torch.dtype
) -> Contestants:
    """transformers' generate and the original's; on CUDA also transformers' compiled one."""
    contestants: Contestants = {}
    n_bytes = gpt.n_parameters() * dtype.itemsize
    llama, original = llama_of(gpt.config), original_of(gpt.config)
    llama = llama.to(device, dtype).eval()
    llama.generation_config.eos_token_id = None  # all write equally many tokens
    options = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    contestants["transformers generate"] = partial(llama.generate, prompt, **options), n_bytes
    if device.type == "cuda":  # there a static cache makes it compile its step into CUDA graphs
        options = options | {"cache_implementation": "static"}
        static = partial(llama.generate, prompt, **options)
        contestants["transformers, static cache, compiled"] = static, n_bytes
    if original is not None:
        original = original.to(device, dtype).eval()
        name = "original Lille generate"
        contestants[name] = partial(original_answer, original, prompt, n), n_bytes
    return contestants


def decoders(gpt: GPT, compiled: bool) -> dict[str, tuple[Decoder, float]]:
    """Ours by name, each with the bytes of its weights; one that cannot be here has a note."""
    weight = gpt.lm_head.weight
    n, size = gpt.n_parameters(), weight.dtype.itemsize
    wanted: dict[str, tuple[dict[str, Any], int]] = {
        "ours, plain PyTorch": ({"mode": "eager"}, size)
    }
    if weight.is_cuda:
        wanted["ours"] = {}, size
        wanted["ours, compiled"] = {"mode": "compile"}, size
    else:
        wanted["ours, float32"] = {}, 4
        wanted["ours, bfloat16 weights"] = {"weights": "bfloat16"}, 2
        wanted["ours, int8 weights"] = {"weights": "int8"}, 1
        if compiled:
            wanted["ours, float32, torch.compile"] = {"mode": "compile"}, 4
    found = {}
    for name, (options, bytes_each) in wanted.items():
        try:
            found[name] = Decoder(gpt, **options), n * bytes_each
        except ValueError as error:  # no C++ compiler
            print(f"{name}: left out, {error}")
    return found


def onnx_contestants(gpt: GPT, folder: Path, prompt: list[int], n: int) -> Contestants:
    if not all(map(timing.peer, ("onnx", "onnxscript", "onnxruntime"))):
        return {}
    from formats.onnx_runtime import CONFIG, MODEL, OnnxBackend
    from formats.write_onnx import write_graph, write_json

    def answer(backend: OnnxBackend) -> None:
        ids = list(prompt)
        for _ in range(n):
            ids.append(int(backend.logits(ids).argmax()))

    contestants: Contestants = {}
    for dtype in ("fp32", "int8"):
        target = folder / dtype
        target.mkdir()
        write_graph(gpt, target / MODEL, dtype)
        write_json(target / CONFIG, {"model_type": "lille-onnx", **gpt.config.to_dict()})
        n_bytes = sum(file.stat().st_size for file in target.glob("model.onnx*"))
        contestants[f"onnxruntime, {dtype}"] = partial(answer, OnnxBackend(target, "cpu")), n_bytes
    return contestants


def gguf_contestants(gpt: GPT, folder: Path, prompt: list[int], n: int) -> Contestants:
    llama_cpp = timing.peer("llama_cpp") if timing.peer("gguf") else None
    if llama_cpp is None:
        return {}
    from formats.write_gguf import write_file

    def answer(llama) -> None:
        llama.reset()
        llama.eval(prompt)
        for _ in range(n - 1):
            llama.eval([llama.sample(temp=0.0)])
        llama.sample(temp=0.0)

    contestants: Contestants = {}
    threads = torch.get_num_threads()
    options = {"n_ctx": gpt.config.block_size, "n_threads": threads, "n_threads_batch": threads}
    for dtype in ("f32", "q8_0"):
        path = folder / f"{dtype}.gguf"
        write_file(gpt, load_tokenizer(), path, dtype)
        llama = llama_cpp.Llama(str(path), verbose=False, **options)
        contestants[f"llama.cpp, {dtype}"] = partial(answer, llama), path.stat().st_size
    return contestants


@torch.inference_mode()
def logit_errors(gpt: GPT, found: dict[str, tuple[Decoder, float]]) -> None:
    """How far each of our decoders is from the full forward, so that none is fast and wrong."""
    weight = gpt.lm_head.weight
    length = min(64, gpt.config.block_size)
    ids = torch.randint(gpt.config.vocab_size, (1, length), device=weight.device)
    exact = gpt(ids)[0].float()
    rows: dict[str, dict[str, float | str]] = {}
    for name, (decoder, _) in found.items():
        cache = KVCache.empty(gpt.config, 1, like=weight)
        errors = []
        for step, token in enumerate(ids[0]):
            errors.append((decoder(token[None], cache)[0].float() - exact[step]).abs().max().item())
            cache.lengths += 1
        rows[name] = {"largest error": max(errors), "largest logit": exact.abs().max().item()}
    timing.facts("decode", f"logits beside the full forward's, {length} tokens", rows)


def run(config: Any, device: torch.device) -> None:
    """Greedy answers at batch 1 and what the rounding of the weights does to logits."""
    dtype, n = getattr(torch, config.dtype), config.new_tokens
    gpt = GPT(GPTConfig(**{name: getattr(config, name) for name in SHAPE})).to(device, dtype).eval()
    prompt = torch.randint(gpt.config.vocab_size, (1, PROMPT), device=device)
    found = decoders(gpt, config.compile)
    cache = KVCache.empty(gpt.config, 1, like=gpt.tok_embeddings.weight)

    def answer(decoder: Decoder) -> None:
        (ids,) = gpt.generate(prompt, n, temperature=0, decoder=decoder, cache=cache)
        assert len(ids) == n

    with tempfile.TemporaryDirectory() as name:
        contestants = peers(gpt, prompt, n, device, dtype)
        contestants |= {k: (partial(answer, decoder), size) for k, (decoder, size) in found.items()}
        if config.exports and device.type == "cpu":
            for make in (onnx_contestants, gguf_contestants):
                contestants |= make(gpt, Path(name), prompt[0].tolist(), n)
        elif config.exports:
            print("decode: onnxruntime and llama.cpp are timed on the CPU only (--device=cpu)")
        rate = timing.limits(device).read_bandwidth
        timing.compare(
            "decode",
            f"{gpt.n_parameters():,} parameters, {config.dtype}, {PROMPT} tokens in, {n} out",
            {name: function for name, (function, _) in contestants.items()},
            config.rounds,
            device,
            work=("tokens/s", n),
            bound={name: n * size / rate for name, (_, size) in contestants.items()},
        )
    logit_errors(gpt, found)
