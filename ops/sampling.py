"""Sampling of token ids, for generation, text samples and the labels of the Hessian estimate."""

import torch
import torch.nn.functional as F

from common.errors import UserError

GROUP = 128  # entries of which `draw` first takes the sum


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises UserError for a negative temperature, top_k below 1 and top_p outside (0, 1]."""
    if not temperature >= 0:  # NaN too
        raise UserError(f"temperature={temperature} must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1; None keeps every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1")


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws token ids (B,) from logits (B, V); a temperature below 1e-30 takes the most likely one.

    `top_k` keeps the k most likely tokens, `top_p` the fewest whose probabilities reach p.
    Raises UserError as `check_sampling` does.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature < 1e-30:  # the division would overflow in float32
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # so that no division overflows
    probabilities = F.softmax(logits / temperature, dim=-1)
    if top_k is not None and top_k < probabilities.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]  # probabilities may be rounded to the same value
        probabilities = probabilities.masked_fill(logits < least, 0.0)
    if top_p is not None and top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    return race(probabilities, generator)


def draw(probabilities: torch.Tensor) -> torch.Tensor:
    """Draws an index (B,) from each row of probabilities (B, V), which need not sum to 1.

    First a group of GROUP entries, then one of them, so that noise is drawn for V / GROUP + GROUP
    entries in place of V: 128 rows of 32,768 take 2 ms on a CPU, and `sample` 90.
    """
    padding = -probabilities.shape[1] % GROUP
    groups = F.pad(probabilities, (0, padding)) if padding else probabilities
    groups = groups.unflatten(1, (-1, GROUP))
    group = race(groups.sum(dim=2))
    rows = torch.arange(len(groups), device=groups.device)
    return group * GROUP + race(groups[rows, group])


def race(weights: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws an index (B,) in proportion to weights (B, N).

    argmax(w / e) with e ~ Exp(1) draws from w, without the synchronisation of multinomial, and
    rounding of the weights changes the winner only where two are nearly equal.
    """
    noise = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / noise).argmax(dim=-1)


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities (B, V) with zeros for all but the fewest tokens that hold `top_p` of the mass.

    On the CPU a partial sort is tried first: it is nearly always enough and saves 2 of 3 ms.
    """
    mass = top_p * probabilities.sum(dim=-1, keepdim=True)
    partial_sort_suffices = False
    if probabilities.is_cpu and probabilities.shape[-1] > 1024:
        values, order = probabilities.topk(1024)
        partial_sort_suffices = bool((values.sum(dim=-1, keepdim=True) > mass).all())
    if not partial_sort_suffices:
        values, order = probabilities.sort(dim=-1, descending=True)
    tail = values.cumsum(dim=-1) - values >= mass  # the tokens before it hold enough
    tail[:, 0] = False  # kept also where float32 rounds the mass to zero
    return torch.zeros_like(probabilities).scatter(-1, order, values.masked_fill(tail, 0.0))
