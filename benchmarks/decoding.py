"""Decoding speed at batch 1: one greedy answer, ours beside other runtimes.

    python benchmark.py --section=decode [--exports]

All read the same prompt and write equally many tokens, prompt included in the time. The limit is
the time to read the weights once for each token, at the rate of a large float sum on this machine.
With --exports random weights of the same shape are written as ONNX and GGUF files into a temporary
folder, by export.py's writers, and run by onnxruntime and llama.cpp.
"""

import tempfile
from collections.abc import Callable, Iterator
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


def peer_answers(gpt: GPT, prompt: torch.Tensor, n: int) -> Answers:
    """transformers' generate and the original's; on CUDA also transformers' compiled one."""
    weight = gpt.lm_head.weight
    n_bytes = gpt.n_parameters() * weight.dtype.itemsize
    llama = llama_of(gpt.config).to(weight.device, weight.dtype).eval()
    llama.generation_config.eos_token_id = None  # all write equally many tokens
    options = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    generate = partial(llama.generate, prompt, **options)
    answers: Answers = {"transformers generate": (generate, n_bytes)}
    if weight.is_cuda:  # a static cache makes it compile its step into CUDA graphs
        static = partial(generate, cache_implementation="static")
        answers["transformers, static cache, compiled"] = static, n_bytes
    if (original := original_of(gpt.config)) is not None:
        original = original.to(weight.device, weight.dtype).eval()
        answer = partial(original.generate, prompt, n, top_k=1)  # its way to be greedy
        answers["original Lille generate"] = answer, n_bytes
    return answers


def decoders(gpt: GPT) -> dict[str, tuple[Decoder, float]]:
    """Our decoders by name, each with the bytes of its weights; prints why one is unavailable."""
    weight = gpt.lm_head.weight
    variants: dict[str, dict[str, Any]] = {"ours, plain PyTorch": {"mode": "eager"}}
    if weight.is_cuda:
        variants |= {"ours": {}, "ours, compiled": {"mode": "compile"}}
    else:
        dtypes = ("float32", "bfloat16", "int8")
        variants |= {f"ours, {dtype} weights": {"weights": dtype} for dtype in dtypes}
    by_name = {}
    for name, options in variants.items():
        dtype = getattr(torch, options.get("weights", str(weight.dtype)[6:]))
        try:
            by_name[name] = Decoder(gpt, **options), gpt.n_parameters() * dtype.itemsize
        except ValueError as error:  # no C++ compiler
            print(f"{name}: left out, {error}")
    return by_name


def export_answers(gpt: GPT, folder: Path, prompt: list[int], n: int) -> Answers:
    """onnxruntime and llama.cpp on exports of the model, on the CPU."""
    answers: Answers = {}
    if all(map(peer, ("onnx", "onnxscript", "onnxruntime"))):
        from formats.onnx_runtime import FILES, OnnxBackend
        from formats.write_onnx import write_configs, write_graph

        def onnx_answer(backend: OnnxBackend) -> None:
            ids = list(prompt)
            for _ in range(n):
                ids.append(int(backend.logits(ids).argmax()))

        (folder / "onnx").mkdir()
        write_configs(gpt, load_tokenizer(), folder, "fp32")
        for dtype in ("fp32", "int8"):
            write_graph(gpt, folder / FILES[dtype], dtype)
            n_bytes = sum(file.stat().st_size for file in folder.glob(FILES[dtype] + "*"))
            answer = partial(onnx_answer, OnnxBackend(folder, "cpu", dtype))
            answers[f"onnxruntime, {dtype}"] = answer, n_bytes
    if peer("gguf") and (llama_cpp := peer("llama_cpp")):
        from formats.write_gguf import write_file

        def llama_answer(llama: Any) -> None:
            llama.reset()
            llama.eval(prompt)
            for _ in range(n - 1):
                llama.eval([llama.sample(temp=0.0)])
            llama.sample(temp=0.0)

        threads = torch.get_num_threads()
        options = {"n_ctx": gpt.config.block_size, "n_threads": threads, "verbose": False}
        for dtype in ("f32", "q8_0"):
            path = folder / f"{dtype}.gguf"
            write_file(gpt, load_tokenizer(), path, dtype)
            llama = llama_cpp.Llama(str(path), n_threads_batch=threads, **options)
            answers[f"llama.cpp, {dtype}"] = partial(llama_answer, llama), path.stat().st_size
    return answers


@torch.inference_mode()
def logit_error(gpt: GPT, decoder: Decoder) -> float:
    """Largest deviation of a decoder's logits from the full forward pass, over 64 tokens."""
    weight = gpt.lm_head.weight
    ids = torch.arange(min(64, gpt.config.block_size), device=weight.device)[None]
    cache = KVCache.empty(gpt.config, 1, like=weight)
    rows = []
    for token in ids[0]:
        rows.append(decoder(token[None], cache)[0].float())
        cache.lengths += 1
    return (torch.stack(rows) - gpt(ids)[0].float()).abs().max().item()


def run(config: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Greedy answers at batch 1, and what the rounding of the weights does to logits."""
    n = config.new_tokens
    gpt = GPT(model_config(config)).to(device, getattr(torch, config.dtype)).eval()
    prompt = torch.randint(gpt.config.vocab_size, (1, config.prompt_tokens), device=device)
    ours = decoders(gpt)
    cache = KVCache.empty(gpt.config, 1, like=gpt.tok_embeddings.weight)

    def answer(decoder: Decoder) -> None:
        gpt.generate(prompt, n, temperature=0, decoder=decoder, cache=cache)

    with tempfile.TemporaryDirectory() as name:
        answers = peer_answers(gpt, prompt, n)
        answers |= {k: (partial(answer, decoder), size) for k, (decoder, size) in ours.items()}
        if config.exports and device.type == "cpu":
            answers |= export_answers(gpt, Path(name), prompt[0].tolist(), n)
        elif config.exports:
            print("decode: onnxruntime and llama.cpp are timed on the CPU only (--device=cpu)")
        rate = limits(device)["read_bandwidth"]
        table = compare(
            f"{gpt.n_parameters():,} parameters, {config.dtype}, "
            f"{config.prompt_tokens} tokens in, {n} out",
            {name: function for name, (function, _) in answers.items()},
            config.rounds,
            device,
            unit="tokens/s",
            amounts=dict.fromkeys(answers, n),
            bounds={name: n * size / rate for name, (_, size) in answers.items()},
        )
    for name, (decoder, _) in ours.items():
        if name in table["rows"]:
            table["rows"][name]["logit error"] = logit_error(gpt, decoder)
    yield table
