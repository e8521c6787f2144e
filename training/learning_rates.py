"""The rule for learning rates: peaks and warm-up by optimizer, width and tokens of a step.

A rate is stated at a reference size and multiplied by powers of the width and of the tokens of a
step, found by `python -m benchmarks.learning --study=sizes`; LOG.md has the runs. Nothing is
measured above a width of 256 and 16,384 tokens, nor for other depths than 4: the full model's rates
are extrapolated, and above 16,384 tokens they stay what they are there.
"""

import dataclasses
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
    """`config` with the rule's rates in place of those that are 0, less of them in a fine-tune."""
    tokens = config.batch_size * config.gradient_accumulation_steps * block_size
    rules = {"learning_rate": HIDDEN[config.optimizer], "embedding_learning_rate": EMBEDDING}
    if config.embedding_optimizer == "same":
        rules = {}
    share = FINETUNE_SHARE if config.finetune else 1.0
    rates = {name: share * rule.at(n_embd, tokens) for name, rule in rules.items()}
    rates = {name: float(f"{r:.3g}") for name, r in rates.items() if not getattr(config, name)}
    return dataclasses.replace(config, **rates)


def warmup_steps(warmup_iters: int, total_steps: int) -> int:
    """`warmup_iters`, or if that is 0 a tenth of the run, at most MAX_WARMUP."""
    return warmup_iters or max(1, min(MAX_WARMUP, round(total_steps / 10)))
