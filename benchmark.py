"""Speed, measured side by side: each section times ours and its peers in turn in one process.

    python benchmark.py                    # all sections on the CPU, about seven minutes
    python benchmark.py --section=head     # "head", "optimizer", "step", "decode", "data"

Prints the median and range of each, after a warm-up, and its ratio to the first peer. Run nothing
else at the same time.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import benchmark_data
from config import UserError, config_from_constants, run_script
from cross_entropy import linear_cross_entropy
from decoding import Decoder
from model import GPT, GPTConfig, KVCache
from sophia_triton import SophiaG

section = "all"
rounds = 5  # timed repetitions of each, after one that is not counted
batch_size = 2  # rows of 512 tokens of the full model in "step"
new_tokens = 64  # of each answer in "decode"
onnx = ""  # also time these model.onnx of a full model in "decode", with a comma between
gguf = ""  # and these, by llama-cpp-python
compile = False  # also time torch.compile in "step" and "decode"; each takes a minute or two


def compare(
    title: str, contestants: dict[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Times the contestants in turn (A B A B ...) and prints a table; the first is the baseline.

    Returns each one's median, seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, function in contestants.items():
            started = time.perf_counter()
            function()
            if turn > 0:
                times[name].append(time.perf_counter() - started)
    print(f"\n{title}\n{'':34} median s      range            ratio")
    baseline = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        print(f"{name:34} {median:8.3f}  {spread:18} {median / baseline:7.3f}", flush=True)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def head(n_embd: int, rounds: int) -> None:
    """Output head and cross-entropy, forward and backward, of 2,048 tokens."""
    vocab_size, n = 32768, 2048
    weight = (torch.randn(vocab_size, n_embd) * 0.02).requires_grad_()
    x, targets = torch.randn(n, n_embd, requires_grad=True), torch.randint(vocab_size, (n,))
    contestants = {"F.cross_entropy": lambda: F.cross_entropy(x @ weight.T, targets).backward()}
    if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13
        options = torch.nn.LinearCrossEntropyOptions()

        def chunked() -> None:
            F.linear_cross_entropy(x, weight, targets, options=options).backward()

        contestants["F.linear_cross_entropy, chunked"] = chunked
    contestants["ours"] = lambda: (linear_cross_entropy(x, weight, targets) / n).backward()
    compare(f"head + cross-entropy, n_embd {n_embd}, {n} tokens", contestants, rounds)


def optimizer(rounds: int) -> None:
    """One step over the full model's 170 tensors, 127,171,200 float32 parameters."""

    def parameters() -> list[torch.nn.Parameter]:
        parameters = list(GPT(GPTConfig()).parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-3
        return parameters

    adamw, ours = torch.optim.AdamW(parameters(), fused=True), SophiaG(parameters())
    ours.update_hessian()
    scale = torch.tensor(0.5)
    steps = {
        "torch.optim.AdamW(fused=True)": adamw.step,
        "SophiaG, clip and win rate": lambda: ours.step(grad_scale=scale),
        "SophiaG, Hessian update": ours.update_hessian,
    }
    compare("optimizer step, full parameter list", steps, 2 * rounds)


def llama_of(config: GPTConfig) -> torch.nn.Module:
    """transformers' LlamaForCausalLM of the same shape, with new weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.n_embd,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.block_size,
            rms_norm_eps=config.layer_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )


def step(batch_size: int, compiled: bool, rounds: int) -> None:
    """Forward and backward of the full model, packed rows, against transformers' Llama."""
    config = GPTConfig()
    ours, theirs = GPT(config), llama_of(config)
    shape = (batch_size, config.block_size)
    ids = torch.randint(config.vocab_size, shape)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    positions = torch.arange(config.block_size).expand(shape).contiguous()

    def train_ours(forward: Callable) -> Callable[[], None]:
        def run() -> None:
            ours.zero_grad(set_to_none=True)
            (forward(ids, targets, positions) / ids.numel()).backward()

        return run

    def train_theirs() -> None:
        theirs.zero_grad(set_to_none=True)
        theirs(ids, labels=ids).loss.backward()

    contestants = {"transformers LlamaForCausalLM": train_theirs, "ours": train_ours(ours)}
    if compiled:
        contestants["ours, torch.compile"] = train_ours(torch.compile(ours))
    title = f"forward + backward, {ours.n_parameters():,} parameters, {batch_size} x 512 tokens"
    compare(title, contestants, rounds)


def exports(
    onnx: str, gguf: str, prompt: list[int], n: int
) -> dict[str, tuple[Callable[[], object], int]]:
    """Greedy answers of n tokens by onnxruntime and llama.cpp, and the bytes of each file."""
    contestants: dict[str, tuple[Callable[[], object], int]] = {}
    for path in filter(None, onnx.split(",")):
        from backend_onnx import OnnxBackend

        def onnx_answer(backend: OnnxBackend) -> None:
            ids = list(prompt)
            for _ in range(n):
                ids.append(int(backend.logits(ids).argmax()))

        size = sum(file.stat().st_size for file in Path(path).parent.glob("model.onnx*"))
        name = f"onnxruntime, {Path(path).parent.name}"
        contestants[name] = partial(onnx_answer, OnnxBackend(path)), size
    for path in filter(None, gguf.split(",")):
        from llama_cpp import Llama

        def gguf_answer(llama: Llama) -> None:
            llama.reset()
            llama.eval(prompt)
            for _ in range(n - 1):
                llama.eval([llama.sample(temp=0.0)])

        threads = torch.get_num_threads()
        llama = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
        size = Path(path).stat().st_size
        contestants[f"llama.cpp, {Path(path).name}"] = partial(gguf_answer, llama), size
    return contestants


def decode(new_tokens: int, compiled: bool, rounds: int, onnx: str, gguf: str) -> None:
    """Greedy answers of the full model to 16 tokens, batch 1, against transformers' generate.

    The bound of each is the time to read its weights once per token, at the rate at which this
    machine sums as many floats, measured in turn with the rest.
    """
    ours, theirs = GPT(GPTConfig()).eval(), llama_of(GPTConfig()).eval()
    theirs.generation_config.eos_token_id = None  # all write equally many tokens
    prompt = torch.randint(ours.config.vocab_size, (1, 16))
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    n_parameters = ours.n_parameters()
    floats = torch.ones(n_parameters)
    decoders = {
        "ours, float32, plain PyTorch": (Decoder(ours, mode="eager"), 4),
        "ours, float32": (Decoder(ours), 4),
        "ours, bfloat16 weights": (Decoder(ours, "bfloat16"), 2),
        "ours, int8 weights": (Decoder(ours, "int8"), 1),
    }
    if compiled:
        decoders["ours, float32, torch.compile"] = (Decoder(ours, mode="compile"), 4)
    contestants: dict[str, Callable[[], object]] = {
        "transformers LlamaForCausalLM": lambda: theirs.generate(prompt, **options),
        "reading the float32 weights once": floats.sum,
    }

    def answer(decoder: Decoder) -> Callable[[], object]:
        return lambda: ours.generate(prompt, new_tokens, temperature=0, decoder=decoder)

    contestants |= {name: answer(decoder) for name, (decoder, _) in decoders.items()}
    others = exports(onnx, gguf, prompt[0].tolist(), new_tokens)
    contestants |= {name: answer for name, (answer, _) in others.items()}
    title = f"decode, {n_parameters:,} parameters, 16 tokens in, {new_tokens} out"
    medians = compare(title, contestants, rounds)
    reading = medians.pop("reading the float32 weights once")
    sizes = {name: size for name, (_, size) in decoders.items()}  # bytes of a weight
    sizes["transformers LlamaForCausalLM"] = 4
    sizes |= {name: n_bytes / n_parameters for name, (_, n_bytes) in others.items()}
    print(f"reads {4 * n_parameters / reading / 1e9:.1f} GB/s\n{'':34} tokens/s  of its bound")
    for name, seconds in medians.items():
        share = reading * sizes[name] / 4 * new_tokens / seconds
        print(f"{name:34} {new_tokens / seconds:8.1f}  {share:6.0%}")
    ids = torch.randint(ours.config.vocab_size, (1, 64))
    with torch.inference_mode():
        exact = ours(ids)[0]
        for name, (decoder, _) in decoders.items():
            cache = KVCache.empty(ours.config, 1, like=ours.lm_head.weight)
            errors = []
            for step, token in enumerate(ids[0]):
                errors.append((decoder(token[None], cache)[0] - exact[step]).abs().max().item())
                cache.lengths += 1
            print(f"{name:34} largest logit error {max(errors):.1e} of {exact.abs().max():.1f}")


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    sections = ("head", "optimizer", "step", "decode", "data")
    if config.section not in ("all", *sections):
        raise UserError(f"section={config.section!r} must be all or one of {', '.join(sections)}")
    chosen = sections if config.section == "all" else (config.section,)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, float32")
    if "head" in chosen:
        head(128, config.rounds)
        head(640, config.rounds)
    if "optimizer" in chosen:
        optimizer(config.rounds)
    if "step" in chosen:
        step(config.batch_size, config.compile, config.rounds)
    if "decode" in chosen:
        decode(config.new_tokens, config.compile, config.rounds, config.onnx, config.gguf)
    if "data" in chosen:
        benchmark_data.main([])
    return 0


if __name__ == "__main__":
    run_script(main)
