"""Decoding: greedy answers, ours beside other runtimes, by speed, quality and memory.

    python benchmark.py --section=decode [--exports] [--model=lille-hf --text=wiki.txt]

Three tables: answers to one prompt, answers to several at once, and the time until the first token
of an answer to a long prompt. All runtimes read the same prompts, prompt included in the time, and
write equally many tokens. The limit is the time to read the weights once for each token, at the
best rate of this machine. With --exports the weights are also written as ONNX and GGUF files and
run by onnxruntime and llama.cpp, and the peak memory of each runtime is measured: that of a process
of its own, which loads the files and answers once, less what it held before.

Weights are random, or those of `model`; then KL is the mean of KL(float32 || runtime) over the
next-token distributions on the beginning of `text`, in nats, so that nobody is faster by being
worse.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import model_config
from benchmarks.peers import original_of
from benchmarks.runtimes import Ours, Runtime, makers, write_files
from benchmarks.timing import compare, error_line, limits
from common.errors import UserError
from evaluation.models import Lille, open_model
from formats.llama import gpt_from_llama
from model import GPT

KL_TOKENS = 512  # of `text`, or as many as the context holds


def check_settings(config: Any) -> None:
    """UserError for prompts that do not fit and for a text or a model without the other."""
    block_size = config.block_size
    if not config.model and config.prompt_tokens + config.new_tokens > block_size:
        raise UserError(
            f"new_tokens={config.new_tokens} after a prompt of {config.prompt_tokens} do not fit "
            f"into block_size={block_size}: lower it"
        )
    if not config.model and config.long_prompt > block_size:
        raise UserError(
            f"long_prompt={config.long_prompt} does not fit into block_size={block_size}: lower it"
        )
    if bool(config.model) != bool(config.text):
        raise UserError("--model and --text go together: KL is measured on a text")
    if config.text and not Path(config.text).is_file():
        raise UserError(f"text={config.text!r} is not a file: give a text in UTF-8")


def weights_and_text(config: Any) -> tuple[GPT, list[int]]:
    """The model on the CPU in float32, and the ids of the text's beginning."""
    if not config.model:
        return GPT(model_config(config)), []
    opened = open_model(config.model)
    is_ours = isinstance(opened, Lille)
    gpt = (
        opened.gpt
        if is_ours
        else gpt_from_llama(opened.model.config.to_dict(), opened.model.state_dict())
    )
    longest = max(config.prompt_tokens + config.new_tokens, config.long_prompt)
    if longest > gpt.config.block_size:
        raise UserError(
            f"the context of {config.model} holds {gpt.config.block_size} tokens: "
            "lower prompt_tokens, new_tokens or long_prompt"
        )
    text = Path(config.text).read_text("utf-8", errors="replace")[: 20 * KL_TOKENS]
    return gpt, opened.encode([text])[0][: min(KL_TOKENS, gpt.config.block_size)]


class Original:
    """The original's model, with random weights: only its speed is known."""

    def __init__(self, gpt: GPT, device: torch.device, dtype: torch.dtype):
        self.model = original_of(gpt.config).to(device, dtype).eval()
        self.device, self.n_bytes = device, gpt.n_parameters() * dtype.itemsize

    def answer(self, prompts: list[list[int]], n: int) -> object:
        ids = torch.tensor(prompts, device=self.device)
        return self.model.generate(ids, n, top_k=1)  # its way to be greedy


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL(reference || logits) of logits (T, V), in nats."""
    p, q = reference.double().log_softmax(dim=-1), logits.double().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).mean().item()


def peak_megabytes(folder: Path, name: str, config: Any) -> float | None:
    """Peak memory of a process that makes the runtime and answers once; None if it failed."""
    command = [sys.executable, "-m", "benchmarks.runtimes", str(folder), name]
    command += [config.device, config.dtype, str(config.prompt_tokens), str(config.new_tokens)]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        print(f"{name}: left out, a process of its own ended with: {reason}", flush=True)
        return None
    return int(result.stdout.split()[-1]) / 1e6


def make_runtimes(
    gpt: GPT, folder: Path, config: Any, device: torch.device
) -> tuple[dict[str, Runtime], dict[str, float]]:
    """The runtimes that work here; with exports also the peak memory of each in MB, by name."""
    runtimes: dict[str, Runtime] = {}
    memory: dict[str, float] = {}
    dtype = getattr(torch, config.dtype)
    for name, make in makers(device.type, dtype, config.exports).items():
        if (
            config.exports
        ):  # first, so that a crash of another project's code ends only that process
            if (megabytes := peak_megabytes(folder, name, config)) is None:
                continue
            memory[name] = megabytes
        try:
            runtimes[name] = make(folder)
        except Exception as error:  # any that another project's code raises
            print(f"{name}: left out, {error_line(error)}", flush=True)
    if not config.model and original_of(gpt.config) is not None:
        runtimes["original Lille generate"] = Original(gpt, device, dtype)
    return runtimes, memory


def run(config: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """The tables; the first has KL, or the largest error of our logits, and peak memory."""
    gpt, text = weights_and_text(config)
    gpt = gpt.eval()
    ids = [int(token) for token in torch.randint(gpt.config.vocab_size, (config.long_prompt,))]
    if config.exports and device.type != "cpu":
        print("decode: onnxruntime and llama.cpp are timed on the CPU only (--device=cpu)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(gpt, folder, config.exports and device.type == "cpu")
        runtimes, memory = make_runtimes(gpt, folder, config, device)
        of = f"{gpt.n_parameters():,} parameters"
        of += f" of {Path(config.model).name}" if config.model else ""
        n_in, n = config.prompt_tokens, config.new_tokens
        prompt, batch = [ids[:n_in]], [[*ids[i:n_in], *ids[:i]] for i in range(config.decode_rows)]
        batched = {k: v for k, v in runtimes.items() if not isinstance(v, Original)}
        timed = partial(compare, rounds=config.rounds, device=device)

        def answers(runtimes: dict[str, Runtime], prompts: list[list[int]]) -> dict[str, Any]:
            rate = limits(device)["read_bandwidth"]
            return timed(
                f"{of}, {config.dtype}, {len(prompts)} x {n_in} tokens in, {n} out",
                {name: partial(it.answer, prompts, n) for name, it in runtimes.items()},
                unit="tokens/s",
                amounts=dict.fromkeys(runtimes, n * len(prompts)),
                bounds={name: n * it.n_bytes / rate for name, it in runtimes.items()},
            )

        table = answers(runtimes, prompt)
        add_quality(table["rows"], runtimes, gpt, text)
        for name, megabytes in memory.items():
            if name in table["rows"]:
                table["rows"][name]["peak MB"] = megabytes
        yield table
        yield answers(batched, batch)
        yield timed(
            f"{of}, {config.dtype}, first token of a prompt of {len(ids)}",
            {name: partial(it.answer, [ids], 1) for name, it in batched.items()},
        )


@torch.inference_mode()
def add_quality(
    rows: dict[str, dict], runtimes: dict[str, Runtime], gpt: GPT, text: list[int]
) -> None:
    """Adds KL on a text; with random weights the largest error of our logits on 64 ids."""
    ids = text or list(range(min(64, gpt.config.block_size)))
    reference = gpt(torch.tensor([ids]))[0]
    for name, runtime in runtimes.items():
        if name in rows and text:
            rows[name]["KL, nats"] = divergence(reference, runtime.logits(ids))
        elif name in rows and isinstance(runtime, Ours):
            error = (runtime.logits(ids) - reference).abs().max().item()
            rows[name]["logit error"] = error
