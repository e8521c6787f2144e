"""Decoding speed at batch 1: one greedy answer, ours beside other runtimes.

    python benchmark.py --section=decode [--exports]

Everyone reads the same prompt and writes equally many tokens, prompt included in the time. The
limit is the time to read the weights once for each token, at the rate of a large float sum on this
machine. With --exports random weights of the same shape are written as ONNX and GGUF files into a
temporary folder, by export.py's writers, and run by onnxruntime and llama.cpp.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import model_config
from benchmarks.peers import llama_of, original_of
from benchmarks.timing import compare, limits, peer
from generation.fast_decode import Decoder
from model import GPT
from ops.kv_cache import KVCache
from tokenizer import load_tokenizer

Answers = dict[str, tuple[Callable[[], object], float]]  # name -> (one answer, bytes of weights)


def peer_answers(
    gpt: GPT, prompt: torch.Tensor, n: int, device: torch.device, dtype: torch.dtype
) -> Answers:
    """transformers' generate and the original's; on CUDA also transformers' compiled one."""
    answers: Answers = {}
    n_bytes = gpt.n_parameters() * dtype.itemsize
    if (llama := llama_of(gpt.config)) is not None:
        llama = llama.to(device, dtype).eval()
        llama.generation_config.eos_token_id = None  # all write equally many tokens
        options = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(prompt)
        answers["transformers generate"] = partial(llama.generate, prompt, **options), n_bytes
        if device.type == "cuda":  # a static cache makes it compile its step into CUDA graphs
            static = partial(llama.generate, prompt, **options, cache_implementation="static")
            answers["transformers, static cache, compiled"] = static, n_bytes
    if (original := original_of(gpt.config)) is not None:
        original = original.to(device, dtype).eval()
        answer = partial(original.generate, prompt, n, top_k=1)  # its way to be greedy
        answers["original Lille generate"] = answer, n_bytes
    return answers


def decoders(gpt: GPT) -> dict[str, tuple[Decoder, float]]:
    """Our decoders by name, each with the bytes of its weights; a line for each impossible one."""
    weight = gpt.lm_head.weight
    size = weight.dtype.itemsize
    variants: dict[str, tuple[dict[str, Any], int]] = {
        "ours, plain PyTorch": ({"mode": "eager"}, size)
    }
    if weight.is_cuda:
        variants |= {"ours": ({}, size), "ours, compiled": ({"mode": "compile"}, size)}
    else:
        variants["ours, float32"] = {}, 4
        variants["ours, bfloat16 weights"] = {"weights": "bfloat16"}, 2
        variants["ours, int8 weights"] = {"weights": "int8"}, 1
    by_name = {}
    for name, (options, bytes_each) in variants.items():
        try:
            by_name[name] = Decoder(gpt, **options), gpt.n_parameters() * bytes_each
        except ValueError as error:  # no C++ compiler
            print(f"{name}: left out, {error}")
    return by_name


def onnx_answers(gpt: GPT, folder: Path, prompt: list[int], n: int) -> Answers:
    if not all(map(peer, ("onnx", "onnxscript", "onnxruntime"))):
        return {}
    from formats.onnx_runtime import CONFIG, MODEL, OnnxBackend
    from formats.write_hf import write_json
    from formats.write_onnx import write_graph

    def answer(backend: OnnxBackend) -> None:
        ids = list(prompt)
        for _ in range(n):
            ids.append(int(backend.logits(ids).argmax()))

    answers: Answers = {}
    for dtype in ("fp32", "int8"):
        target = folder / dtype
        target.mkdir()
        write_graph(gpt, target / MODEL, dtype)
        write_json(target / CONFIG, {"model_type": "lille-onnx", **gpt.config.to_dict()})
        n_bytes = sum(file.stat().st_size for file in target.glob("model.onnx*"))
        answers[f"onnxruntime, {dtype}"] = partial(answer, OnnxBackend(target, "cpu")), n_bytes
    return answers


def gguf_answers(gpt: GPT, folder: Path, prompt: list[int], n: int) -> Answers:
    llama_cpp = peer("llama_cpp") if peer("gguf") else None
    if llama_cpp is None:
        return {}
    from formats.write_gguf import write_file

    def answer(llama) -> None:
        llama.reset()
        llama.eval(prompt)
        for _ in range(n - 1):
            llama.eval([llama.sample(temp=0.0)])
        llama.sample(temp=0.0)

    answers: Answers = {}
    threads = torch.get_num_threads()
    options = {"n_ctx": gpt.config.block_size, "n_threads": threads, "n_threads_batch": threads}
    for dtype in ("f32", "q8_0"):
        path = folder / f"{dtype}.gguf"
        write_file(gpt, load_tokenizer(), path, dtype)
        llama = llama_cpp.Llama(str(path), verbose=False, **options)
        answers[f"llama.cpp, {dtype}"] = partial(answer, llama), path.stat().st_size
    return answers


@torch.inference_mode()
def logit_errors(gpt: GPT, by_name: dict[str, tuple[Decoder, float]]) -> dict[str, dict]:
    """Largest deviation of each decoder's logits from the full forward pass, over 64 tokens."""
    weight = gpt.lm_head.weight
    ids = torch.randint(gpt.config.vocab_size, (1, min(64, gpt.config.block_size)))
    ids = ids.to(weight.device)
    expected = gpt(ids)[0].float()
    columns = {}
    for name, (decoder, _) in by_name.items():
        cache = KVCache.empty(gpt.config, 1, like=weight)
        rows = []
        for token in ids[0]:
            rows.append(decoder(token[None], cache)[0].float())
            cache.lengths += 1
        columns[name] = {"logit error": (torch.stack(rows) - expected).abs().max().item()}
    return columns


def run(config: Any, device: torch.device) -> None:
    """Greedy answers at batch 1, and what the rounding of the weights does to logits."""
    dtype, n = getattr(torch, config.dtype), config.new_tokens
    gpt = GPT(model_config(config)).to(device, dtype).eval()
    prompt = torch.randint(gpt.config.vocab_size, (1, config.prompt_tokens), device=device)
    ours = decoders(gpt)
    cache = KVCache.empty(gpt.config, 1, like=gpt.tok_embeddings.weight)

    def answer(decoder: Decoder) -> None:
        gpt.generate(prompt, n, temperature=0, decoder=decoder, cache=cache)

    with tempfile.TemporaryDirectory() as name:
        answers = peer_answers(gpt, prompt, n, device, dtype)
        answers |= {k: (partial(answer, decoder), size) for k, (decoder, size) in ours.items()}
        if config.exports and device.type == "cpu":
            for make in (onnx_answers, gguf_answers):
                answers |= make(gpt, Path(name), prompt[0].tolist(), n)
        elif config.exports:
            print("decode: onnxruntime and llama.cpp are timed on the CPU only (--device=cpu)")
        rate = limits(device).read_bandwidth
        size = f"{gpt.n_parameters():,} parameters, {config.dtype}"
        compare(
            "decode",
            f"{size}, {config.prompt_tokens} tokens in, {n} out",
            {name: function for name, (function, _) in answers.items()},
            config.rounds,
            device,
            work=("tokens/s", n),
            bound={name: n * size / rate for name, (_, size) in answers.items()},
            extra=logit_errors(gpt, ours),
        )
