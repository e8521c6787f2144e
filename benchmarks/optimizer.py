"""Optimizer speed on the models' lists of parameters, compared with peers and memory bandwidth.

    python benchmark.py --section=optimizer

An update is memory-bandwidth-bound: its limit is the bytes that its formula moves, at this
machine's copy bandwidth. Gradients are made outside the timed calls; the optimizers of a table
share parameters and gradients, and each has its own moments.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from benchmarks.inputs import demo_config, model_config
from benchmarks.timing import compare, limits, peer
from model import GPT
from sophia_triton import SophiaG
from training.trainer import gradient_scale

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Bytes that a formula moves per float32 parameter: reads of p, g and moments, writes of p, moments
ADAMW, SOPHIA, SOPHIA_BF16, HESSIAN = 28, 24, 18, 12
NORM, SCALE = 4, 8  # the gradients' norm; their multiplication by the clip factor

if triton is not None:

    @triton.jit
    def one_step_kernel(
        p_ptr, g_ptr, m_ptr, h_ptr, lr, weight_decay, beta1, rho_bs, eps, n_elements,
        BLOCK_SIZE: tl.constexpr,
    ):  # fmt: skip
        """m = beta1 m + (1 - beta1) g; p = p (1 - lr wd) - lr clip(m / max(rho bs h, eps), 1)."""
        offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = offsets < n_elements

        p, g = tl.load(p_ptr + offsets, mask=mask), tl.load(g_ptr + offsets, mask=mask)
        m, h = tl.load(m_ptr + offsets, mask=mask), tl.load(h_ptr + offsets, mask=mask)

        m = beta1 * m + (1 - beta1) * g
        ratio = m / tl.maximum(rho_bs * h, eps)
        p = p * (1 - lr * weight_decay) - lr * tl.minimum(tl.maximum(ratio, -1.0), 1.0)

        tl.store(p_ptr + offsets, p, mask=mask)
        tl.store(m_ptr + offsets, m, mask=mask)

    @triton.jit
    def one_hessian_kernel(g_ptr, h_ptr, beta2, n_elements, BLOCK_SIZE: tl.constexpr):
        """h = beta2 h + (1 - beta2) g^2."""
        offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = offsets < n_elements

        g, h = tl.load(g_ptr + offsets, mask=mask), tl.load(h_ptr + offsets, mask=mask)

        tl.store(h_ptr + offsets, beta2 * h + (1 - beta2) * g * g, mask=mask)


class LaunchPerParameter(torch.optim.Optimizer):
    """A baseline: SophiaG as the original designs it, one launch per float32 parameter.

    Blocks of 1,024 elements, settings passed as numbers, a grid computed in Python for each launch.
    """

    def __init__(self, params: Iterable, lr=1e-4, betas=(0.965, 0.99), rho=0.05, weight_decay=0.1):
        defaults = dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, eps=1e-15, bs=8192)
        super().__init__(params, defaults)

    def items(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(p)
                        state["hessian"] = torch.zeros_like(p)
                    yield group, p, state["exp_avg"], state["hessian"], p.numel()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        assert closure is None
        for group, p, m, h, n in self.items():
            one_step_kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK_SIZE"]),)](
                p, p.grad, m, h, group["lr"], group["weight_decay"], group["betas"][0],
                float(group["rho"] * group["bs"]), group["eps"], n, BLOCK_SIZE=1024,
            )  # fmt: skip

    @torch.no_grad()
    def update_hessian(self) -> None:
        for group, p, _, h, n in self.items():
            one_hessian_kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK_SIZE"]),)](
                p.grad, h, group["betas"][1], n, BLOCK_SIZE=1024
            )


def give_gradients(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3


def muon_and_adamw(model: GPT) -> Callable[[], None]:
    """torch.optim.Muon for the matrices of the layers and fused AdamW for the rest, as advised."""
    hidden = [p for p in model.layers.parameters() if p.dim() == 2]
    hidden_ids = set(map(id, hidden))
    muon = torch.optim.Muon(hidden)
    rest = [p for p in model.parameters() if id(p) not in hidden_ids]
    adamw = torch.optim.AdamW(rest, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def compare_updates(title: str, model: GPT, device: torch.device, rounds: int, muon: bool) -> None:
    """Times updates of all of a model's parameters."""
    parameters = list(model.to(device).parameters())
    give_gradients(parameters)
    adamw, ours = torch.optim.AdamW(parameters, fused=True), SophiaG(parameters)
    ours_bf16 = SophiaG(parameters, state_dtype=torch.bfloat16)
    loss = torch.zeros((), device=device)
    functions: dict[str, Callable[[], Any]] = {}
    traffic: dict[str, int] = {}  # bytes for each parameter

    def add(name: str, function: Callable[[], Any], n_bytes: int = 0) -> None:
        functions[name] = function
        if n_bytes:
            traffic[name] = n_bytes

    def clip_and(step: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            nn.utils.clip_grad_norm_(parameters, 1e6)  # no effect: gradients stay as they are
            step()

        return run

    def clip_and_ours() -> None:
        _, scale = gradient_scale(model, loss, 1.0)
        ours.step(grad_scale=scale)

    add("torch.optim.AdamW(fused=True)", adamw.step, ADAMW)
    add("clip_grad_norm_ and AdamW", clip_and(adamw.step), NORM + SCALE + ADAMW)
    if (sophia_opt := peer("sophia_opt")) is not None:
        official = sophia_opt.SophiaG(parameters)  # a loop over the tensors in plain PyTorch
        official.update_hessian()
        add("SophiaG of its authors", official.step, SOPHIA)
    if device.type == "cuda" and triton is not None:
        single = LaunchPerParameter(parameters)
        single.update_hessian()
        add("SophiaG, a launch per parameter", single.step, SOPHIA)
        add("  with clip_grad_norm_", clip_and(single.step), NORM + SCALE + SOPHIA)
        add("  Hessian update", single.update_hessian, HESSIAN)
    if muon and hasattr(torch.optim, "Muon"):
        add("torch.optim.Muon and AdamW", muon_and_adamw(model))
    for optimizer in (ours, ours_bf16):  # a Hessian of zeros would clip every coordinate
        optimizer.update_hessian()
    add("ours, SophiaG", ours.step, SOPHIA)
    add("ours, clip and SophiaG", clip_and_ours, NORM + SOPHIA)
    add("ours, bfloat16 moments", ours_bf16.step, SOPHIA_BF16)
    add("ours, Hessian update", ours.update_hessian, HESSIAN)
    n, rate = model.n_parameters(), limits(device).copy_bandwidth
    bound = {name: n_bytes * n / rate for name, n_bytes in traffic.items()}
    title = f"{title}: {len(parameters)} tensors, {n:,} float32 parameters"
    compare("optimizer", title, functions, rounds, device, bound=bound)


def run(config: Any, device: torch.device) -> None:
    """The section, on the shape in `config` (n_layers, n_embd, ...) and on the demo's."""
    # Muon's products take half a minute on a CPU for the full model: there it is timed on the small
    muon = device.type == "cuda"
    compare_updates("full model", GPT(model_config(config)), device, 3 * config.rounds, muon)
    small = GPT(model_config(demo_config()))
    compare_updates("the demo's model", small, device, 3 * config.rounds, muon=True)
