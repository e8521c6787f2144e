"""The rule for learning rates: peaks and warm-up by optimizer, width and tokens of a step.

A rate is stated at a reference size and multiplied by powers of the width and of the tokens of a
step, found by `python -m benchmarks.learning --study=sizes`; LOG.md has the runs. Nothing is
measured above a width of 256 and 16,384 tokens: the full model's rates are extrapolated, and above
16,384 tokens they stay what they are there. Exponents come from one seed and rates by factors of 2;
those of the step from 64 wide, with twice the tokens in half the steps; Muon's there are AdamW's.
SophiaG was within 0.05 nats of its own best at each of six sizes, AdamW and Muon at each of four.
The loss is flat in the embedding's rate, whose power of the width is assumed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

REFERENCE_WIDTH, REFERENCE_TOKENS = 64, 4096
MAX_TOKENS = 16_384  # the largest step that was measured: rates do not rise further above it
MAX_WARMUP = 2000  # steps
FINETUNE_SHARE = 0.5  # of the rates, in a fine-tune


@dataclasses.dataclass(frozen=True)
class PeakRate:
    """reference * (n_embd / 64)^width * (tokens of a step, at most 16,384 / 4,096)^tokens."""

    reference: float
    width: float
    tokens: float

    def at(self, n_embd: int, tokens_per_step: int) -> float:
        """The peak at a size."""
        width = n_embd / REFERENCE_WIDTH
        tokens = min(tokens_per_step, MAX_TOKENS) / REFERENCE_TOKENS
        return self.reference * width**self.width * tokens**self.tokens


HIDDEN = {  # by the optimizer of the hidden matrices
    "sophiag": PeakRate(2.5e-3, -1.0, 0.4),
    "adamw": PeakRate(4e-3, -1.0, 0.25),
    "muon": PeakRate(2e-2, -1.0, 0.25),
}
EMBEDDING = PeakRate(4e-2, -1.0, 0.5)  # of the tied embedding and the norms, which have AdamW


def with_peak_rates(config: Any, n_embd: int, block_size: int) -> Any:
    """`config` with rates in place of those that are 0.

    They are the rule's, in a fine-tune FINETUNE_SHARE of them. If one of the two is given, the
    other is as many times the rule's as it.
    """
    if config.embedding_optimizer == "same":
        return config
    tokens = config.batch_size * config.gradient_accumulation_steps * block_size
    hidden, embedding = HIDDEN[config.optimizer].at(n_embd, tokens), EMBEDDING.at(n_embd, tokens)
    share = FINETUNE_SHARE if config.finetune else 1.0
    if config.learning_rate:
        share = config.learning_rate / hidden
    elif config.embedding_learning_rate:
        share = config.embedding_learning_rate / embedding
    rates = {"learning_rate": share * hidden, "embedding_learning_rate": share * embedding}
    rates = {name: float(f"{r:.3g}") for name, r in rates.items() if not getattr(config, name)}
    return dataclasses.replace(config, **rates)


def warmup_steps(total_steps: int) -> int:
    """A tenth of the run, at most MAX_WARMUP."""
    return max(1, min(MAX_WARMUP, round(total_steps / 10)))


def learning_rate_at(
    step: int,
    peak: float,
    warmup: int,
    total: int,
    min_ratio: float,
    schedule: str = "cosine",
    decay_share: float = 0.2,
) -> float:
    """Linear warm-up over `warmup` steps, then from `peak` to `min_ratio * peak`.

    By a cosine, linearly, or ("wsd": warm-up, stable, decay; Hu et al., arXiv 2404.06395) at the
    peak until the last `decay_share * total` steps, in which it falls linearly. Steps count from 0;
    step 0 already has peak / (warmup + 1), the last one min_ratio * peak.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    decay = total - 1 - warmup  # steps
    if schedule == "wsd":
        decay = min(decay, max(1, round(decay_share * total)))
    progress = min(1.0, max(0, step - (total - 1 - decay)) / max(1, decay))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return peak * (min_ratio + (1 - min_ratio) * left)


def schedule_of(config: Any, total: int) -> Callable[[int], float]:
    """The learning rate of each step of a run of `total` steps with train.py's settings."""
    return functools.partial(
        learning_rate_at,
        peak=config.learning_rate,
        warmup=config.warmup_iters,
        total=total,
        min_ratio=config.min_lr_ratio,
        schedule=config.schedule,
        decay_share=config.decay_share,
    )
