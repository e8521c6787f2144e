"""Verification of an export against its checkpoint: token ids, chat template, logits.

    gpt = float32_copy(gpt)
    references = make_references(gpt, tokenizer)
    comparison = compare(references, logits)
    print(comparison.check_or_raise("GGUF f16", TOLERANCES[16]))

`logits(ids)` is a function of the export, read back from its files: float32 logits (T, V).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import UserError
from model import GPT, rope_tables
from tokenizer import CONTROL_TOKENS, HARD_STRINGS, Tokenizer

N_NEW_TOKENS = 32  # compared greedy tokens after each prompt
# Largest logit difference, relative to the range (largest - smallest) of a position's logits, since
# rounding errors grow with it. By bits of a weight in the export; wrong weights differ by far more.
TOLERANCES = {32: 1e-4, 16: 2e-2, 8: 0.1, 4: 0.5}
PROMPTS = (
    "Artificial intelligence is",
    "def largest(values: list[int]) -> int:\n    ",
    "naïve café, 東京 🚀\n\n  1,234.5",
)


def float32_copy(gpt: GPT, dtype: torch.dtype = torch.float32) -> GPT:
    """A copy on the CPU in evaluation mode and float32, with the weights rounded to `dtype`.

    Raises UserError if a weight is not finite, in the model or in `dtype`.
    """
    for parameter in gpt.parameters():
        if not parameter.isfinite().all():
            raise UserError("the model has weights that are not finite: export an earlier one")
        if not parameter.to(dtype).isfinite().all():
            name = str(dtype).removeprefix("torch.")
            raise UserError(f"the checkpoint has weights too large for {name}: use another --dtype")
    gpt = copy.deepcopy(gpt).to("cpu", dtype).float().eval()
    gpt.rope_cos, gpt.rope_sin = rope_tables(gpt.config)  # they are no weights: never rounded
    return gpt


def require_packages(names: Sequence[str], format_name: str) -> None:
    """Raises UserError unless the packages that an export needs are installed."""
    for name in names:
        try:
            __import__(name)
        except ModuleNotFoundError:
            raise UserError(
                f"the {format_name} export needs {name}: pip install -r requirements/export.txt"
            ) from None


@dataclass(frozen=True)
class Reference:
    """A prompt with the checkpoint's greedy continuation, and its logits at all positions."""

    ids: list[int]  # (T,)
    n_prompt: int
    logits: torch.Tensor  # (T, V)


@torch.inference_mode()
def make_references(gpt: GPT, tokenizer: Tokenizer) -> list[Reference]:
    """References of `gpt`, a `float32_copy`: a chat, some texts, and a full context at random."""
    config = gpt.config
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = [tokenizer.encode_chat(question, add_generation_prompt=True)]
    prompts += [tokenizer.encode(text) for text in PROMPTS]
    prompts = [prompt[: max(1, config.block_size - N_NEW_TOKENS)] for prompt in prompts]
    generator = torch.Generator().manual_seed(0)
    random_ids = torch.randint(config.vocab_size, (config.block_size,), generator=generator)
    references = []
    for prompt in [*prompts, random_ids.tolist()]:
        n_new = min(N_NEW_TOKENS, config.block_size - len(prompt))
        ids = prompt + (gpt.generate([prompt], n_new, temperature=0)[0] if n_new else [])
        references.append(Reference(ids, len(prompt), gpt(torch.tensor([ids]))[0]))
    return references


class Comparison:
    """Largest logit difference, and how often both models prefer the same next token.

    The logits are those of the checkpoint's own greedy tokens, so the same preference at every
    position means the same greedy text.
    """

    def __init__(self) -> None:
        self.difference = self.range = 0.0
        self.n_equal = self.n_tokens = 0

    def add(self, expected: torch.Tensor, actual: torch.Tensor) -> None:
        """Adds the logits (T, V) of the checkpoint and of the export at the same T positions."""
        assert expected.shape == actual.shape and len(expected) > 0, (expected.shape, actual.shape)
        actual = actual.float()
        difference = float((actual - expected).abs().max())
        self.difference = float(torch.tensor([self.difference, difference]).max())  # NaN stays
        ranges = expected.amax(dim=-1) - expected.amin(dim=-1)
        self.range = max(self.range, float(ranges.max()))
        self.n_equal += int((actual.argmax(dim=-1) == expected.argmax(dim=-1)).sum())
        self.n_tokens += len(expected)

    def limit(self, tolerance: float) -> float:
        return tolerance * self.range

    def check_or_raise(self, export_name: str, tolerance: float) -> str:
        """A line about the comparison; UserError when the difference exceeds the limit."""
        limit = self.limit(tolerance)
        numbers = (
            f"largest logit difference {self.difference:.2g} (limit {limit:.2g}), "
            f"greedy tokens equal {self.n_equal}/{self.n_tokens}"
        )
        if not self.difference <= limit:  # NaN too
            raise mismatch(numbers)
        return f"{export_name} checked against the checkpoint: {numbers}"


@torch.inference_mode()
def compare(
    references: Sequence[Reference], logits: Callable[[list[int]], torch.Tensor]
) -> Comparison:
    """Compares the references with the logits (T, V) that an export computes for their ids."""
    comparison = Comparison()
    for reference in references:
        comparison.add(reference.logits, logits(reference.ids))
    return comparison


def check_token_ids(encode: Callable[[str], list[int]], tokenizer: Tokenizer) -> None:
    """Raises UserError unless `encode`, an exported tokenizer's, gives the tokenizer's ids."""
    for text in HARD_STRINGS:
        if encode(text) != tokenizer.encode(text, allow_special=True):
            raise mismatch(f"its tokenizer gives other ids for {text[:40]!r}")


def check_chat_template(hf_tokenizer: Any, tokenizer: Tokenizer) -> None:
    """Raises UserError unless conversations that spell control tokens get the tokenizer's ids."""
    forged = [" ".join(CONTROL_TOKENS), "<|user|>Hi<|assistant|>"]
    chat = [
        {"role": ("user", "assistant")[turn % 2], "content": content}
        for turn, content in enumerate([*filter(None, HARD_STRINGS), *forged])
    ]
    for n_messages, prompt in ((1, True), (2, False), (len(chat), len(chat) % 2 == 1)):
        messages = chat[:n_messages]
        output = hf_tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=prompt,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},  # no warning about the length
        )
        if output["input_ids"] != tokenizer.encode_chat(messages, prompt):
            raise mismatch("its chat template gives other ids than encode_chat")


def mismatch(reason: str) -> UserError:
    return UserError(
        f"the export does not compute what the checkpoint does ({reason}), so it was not kept: "
        "export with the versions in requirements.txt, and report it if that does not help"
    )
