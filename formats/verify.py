"""What exports share: nothing half-written, and a comparison with the checkpoint at the end.

with written_beside(target, names) as temporary:
    ...  # write `temporary`, load it again
    comparison = Comparison()
    comparison.add(reference.logits, logits_of_what_was_written)
    print(comparison.verdict("ONNX fp32", tolerance))
"""

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UserError
from common.files import locked, named_errors, sync_directory
from common.signals import interrupts_deferred
from model import GPT
from tokenizer import Tokenizer

NEW_TOKENS = 32  # greedy ones compared after each prompt
LEAST_LIMIT = 1e-4  # a difference of logits that is never an error
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = (
    "Artificial intelligence is",
    "def largest(values: list[int]) -> int:\n    ",
    "naïve café, 東京 🚀\n\n  1,234.5",
)


@contextmanager
def written_beside(
    target: Path, names: Sequence[str] = (), optional: Sequence[str] = (), magic: bytes = b""
) -> Iterator[Path]:
    """A path to write that becomes `target` when the block is done, or is removed if it fails.

    An export that is a folder has the files `names` and may have those of `optional`; without
    `names` it is one file, which begins with `magic`. An earlier export is replaced at the end.
    UserError when `target` holds anything else, and while another process exports to it. Only a
    killed process leaves a hidden `.NAME.exporting` behind, which the next export removes.
    """
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".{target.name}.exporting")
    old = target.with_name(f".{target.name}.replaced")
    check_target(target, names, optional, magic)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target, "export", lock_file=target.with_name(f".{target.name}.lock")):
        temporary.mkdir(exist_ok=True)
        try:
            for path in temporary.iterdir():  # of a killed export
                remove(path)
            if names and old.exists() and not target.exists():  # killed between the two renames
                os.replace(old, target)
            written = temporary if names else temporary / target.name
            with named_errors(target):
                yield written
                for path in temporary.iterdir():
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
            check_target(target, names, optional, magic)  # the export has taken some time
            with interrupts_deferred():
                if names and target.exists():  # no folder can be renamed onto one that has files
                    remove(old)
                    os.replace(target, old)
                os.replace(written, target)
                sync_directory(target.parent)
                remove(old if names else temporary)
        except BaseException:
            with interrupts_deferred():
                remove(temporary)
            raise


def check_target(target: Path, names: Sequence[str], optional: Sequence[str], magic: bytes) -> None:
    """UserError when an export to `target` would destroy something else."""
    if not names:
        if target.is_dir():
            raise UserError(f"{target} is a folder: give the path of a file to write")
        if target.exists() and first_bytes(target, len(magic)) != magic:
            raise UserError(f"{target} is there and is no earlier export: give another file")
        return
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: give the path of a folder to write")
    found = {path.name for path in target.iterdir()} if target.exists() else set()
    for name in sorted(found.difference(names, optional)):
        raise UserError(
            f"{target} holds {name}, which is not of an earlier export: give another folder"
        )
    if found and not found.issuperset(names):
        missing = next(name for name in names if name not in found)
        raise UserError(f"{target} is no earlier export (it has no {missing}): give another folder")


def first_bytes(path: Path, n: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(n)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def float32_copy(gpt: GPT) -> GPT:
    """A copy of the model on the CPU in fp32 and evaluation mode, the reference of every check."""
    check_finite(gpt)
    return copy.deepcopy(gpt).to("cpu", torch.float32).eval()


def check_finite(gpt: GPT, dtype: torch.dtype = torch.float32) -> None:
    """UserError if a weight is not finite, or would not be in `dtype`."""
    for parameter in gpt.parameters():
        if not parameter.isfinite().all():
            raise UserError("the checkpoint has weights that are not finite: export an earlier one")
        if not parameter.to(dtype).isfinite().all():
            name = str(dtype).removeprefix("torch.")
            raise UserError(f"the checkpoint has weights too large for {name}: use another --dtype")


def check_packages(names: Sequence[str], what: str) -> None:
    """UserError unless the packages that an export needs are installed."""
    for name in names:
        try:
            __import__(name)
        except ModuleNotFoundError:
            raise UserError(
                f"the {what} export needs {name}: pip install -r requirements/export.txt"
            ) from None


def check_vocabulary(gpt: GPT, tokenizer: Tokenizer) -> None:
    if gpt.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"the checkpoint has a vocabulary of {gpt.config.vocab_size} and the tokenizer one of "
            f"{tokenizer.vocab_size}: export it with the tokenizer it was trained with"
        )


@dataclass(frozen=True)
class Reference:
    """A prompt with the checkpoint's greedy answer, and the checkpoint's logits of all of it."""

    ids: list[int]  # (T,)
    n_prompt: int
    logits: torch.Tensor  # (T, V)


@torch.inference_mode()
def references(gpt: GPT, tokenizer: Tokenizer) -> list[Reference]:
    """What the checkpoint says to a few prompts; `gpt` is a `float32_copy`."""
    block_size, found = gpt.config.block_size, []
    prompts = [tokenizer.encode_chat(QUESTION, add_generation_prompt=True)]
    for prompt in prompts + [tokenizer.encode(text) for text in PROMPTS]:
        prompt = prompt[: max(1, block_size - NEW_TOKENS)]
        new = min(NEW_TOKENS, block_size - len(prompt))
        ids = prompt + gpt.generate([prompt], new, temperature=0)[0]
        found.append(Reference(ids, len(prompt), gpt(torch.tensor([ids]))[0]))
    return found


class Comparison:
    """The largest difference of logits so far, and how often both chose the same next token.

    The logits compared are those of the checkpoint's own greedy tokens, so that equal choices at
    every position mean equal greedy texts.
    """

    def __init__(self) -> None:
        self.difference = self.widest = 0.0
        self.equal = self.tokens = 0

    def add(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Logits (T, V) of the checkpoint and of the export at the same T positions."""
        assert expected.shape == found.shape and len(expected) > 0, (expected.shape, found.shape)
        found = found.float()
        difference = float((found - expected).abs().max())
        self.difference = float(torch.tensor([self.difference, difference]).max())  # NaN stays
        widths = expected.max(dim=-1).values - expected.min(dim=-1).values
        self.widest = max(self.widest, float(widths.max()))
        self.equal += int((found.argmax(dim=-1) == expected.argmax(dim=-1)).sum())
        self.tokens += len(expected)

    def verdict(self, what: str, tolerance: float) -> str:
        """A line about the check; UserError when the export is not the checkpoint.

        `tolerance` is the largest allowed difference as a part of the width (largest - smallest)
        of the logits, since rounding errors grow with them.
        """
        limit = max(LEAST_LIMIT, tolerance * self.widest)
        numbers = (
            f"largest logit difference {self.difference:.2g} (limit {limit:.2g}), "
            f"greedy tokens equal {self.equal}/{self.tokens}"
        )
        if not self.difference <= limit:
            raise UserError(f"{what} is not the checkpoint, nothing was written: {numbers}")
        return f"{what} checked against the checkpoint: {numbers}"
