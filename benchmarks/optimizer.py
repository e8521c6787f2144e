"""Optimizer speed on the models' lists of parameters, compared with peers and memory bandwidth.

    python benchmark.py --section=optimizer

An update is memory-bandwidth-bound: its limit is the bytes that its formula moves, at this
machine's copy bandwidth. Gradients are made outside the timed calls; the optimizers of a table
share parameters and gradients, and each has its own moments.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.inputs import demo_config, model_config, train_config
from benchmarks.timing import compare, limits, peer
from model import GPT
from sophia_triton import SophiaG
from training.optimizers import gradient_scale, make_optimizer

# Bytes that a formula moves per float32 parameter: reads of p, g and moments, writes of p, moments
ADAMW, SOPHIA, SOPHIA_BF16, HESSIAN = 28, 24, 18, 12
NORM, SCALE = 4, 8  # the gradients' norm; their multiplication by the clip factor


def compare_updates(
    title: str, model: GPT, device: torch.device, rounds: int, muon: bool
) -> dict[str, Any]:
    """Table of the updates of all of a model's parameters."""
    parameters = list(model.to(device).parameters())
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3
    adamw = torch.optim.AdamW(parameters, fused=True)
    ours = SophiaG(parameters, cautious=True)
    ours_bf16 = SophiaG(parameters, cautious=True, state_dtype=torch.bfloat16)
    for optimizer in (ours, ours_bf16):  # a Hessian of zeros would clip every coordinate
        optimizer.update_hessian()
    loss = torch.zeros((), device=device)

    def clip_and_adamw() -> None:
        nn.utils.clip_grad_norm_(parameters, 1e6)  # no effect: gradients stay as they are
        adamw.step()

    def clip_and_ours() -> None:
        _, scale = gradient_scale(parameters, loss, 1.0)
        ours.step(grad_scale=scale)

    functions: dict[str, tuple[Callable[[], Any], int]] = {  # with bytes for each parameter
        "torch.optim.AdamW(fused=True)": (adamw.step, ADAMW),
        "clip_grad_norm_ and AdamW": (clip_and_adamw, NORM + SCALE + ADAMW),
    }
    if (sophia_opt := peer("sophia_opt")) is not None:
        official = sophia_opt.SophiaG(parameters)  # a loop over the tensors in plain PyTorch
        official.update_hessian()
        functions["SophiaG of its authors"] = official.step, SOPHIA
    if muon:
        rates = dict.fromkeys(("learning_rate", "embedding_learning_rate"), 1e-3)
        two = make_optimizer(model, train_config(optimizer="muon", **rates))
        functions["torch.optim.Muon and AdamW"] = two.step, 0
    functions |= {
        "ours, SophiaG": (ours.step, SOPHIA),
        "ours, clip and SophiaG": (clip_and_ours, NORM + SOPHIA),
        "ours, bfloat16 moments": (ours_bf16.step, SOPHIA_BF16),
        "ours, Hessian update": (ours.update_hessian, HESSIAN),
    }
    n, rate = model.n_parameters(), limits(device)["copy_bandwidth"]
    return compare(
        f"{title}: {len(parameters)} tensors, {n:,} float32 parameters",
        {name: function for name, (function, _) in functions.items()},
        rounds,
        device,
        bounds={name: size * n / rate for name, (_, size) in functions.items() if size},
    )


def run(config: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """The section, on the shape in `config` (n_layers, n_embd, ...) and on the demo's."""
    # Muon's products take half a minute on a CPU for the full model: there it is timed on the small
    muon, rounds = device.type == "cuda", 3 * config.rounds
    yield compare_updates("full model", GPT(model_config(config)), device, rounds, muon)
    demo_model = GPT(model_config(demo_config()))
    yield compare_updates("the demo's model", demo_model, device, rounds, muon=True)
