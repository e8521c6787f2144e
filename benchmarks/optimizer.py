"""Optimizer speed on the models' real lists of parameters, beside peers and the memory's speed.

    python benchmark.py --section=optimizer

An update reads and writes each tensor once and computes next to nothing, so its limit is the bytes
that its formula moves, at this machine's copy bandwidth. Gradients are made outside the timed
calls; the contestants of a table share parameters and gradients, and each has its own moments.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import demo
import train
from benchmarks.timing import compare, limits, peer
from common.settings import config_from_constants
from model import GPT, GPTConfig
from sophia_triton import SophiaG
from tokenizer import load_tokenizer
from training.optimizers import gradient_scale

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SHAPE = ("n_layers", "n_embd", "n_heads", "n_kv_heads", "block_size")
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

    def with_gradient(self):
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
        for group, p, m, h, n in self.with_gradient():
            one_step_kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK_SIZE"]),)](
                p, p.grad, m, h, group["lr"], group["weight_decay"], group["betas"][0],
                float(group["rho"] * group["bs"]), group["eps"], n, BLOCK_SIZE=1024,
            )  # fmt: skip

    @torch.no_grad()
    def update_hessian(self) -> None:
        for group, p, _, h, n in self.with_gradient():
            one_hessian_kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK_SIZE"]),)](
                p.grad, h, group["betas"][1], n, BLOCK_SIZE=1024
            )


def give_gradients(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3


def official_sophia(parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The authors' SophiaG, plain PyTorch, or None where sophia-opt is absent."""
    module = peer("sophia_opt")
    return None if module is None else module.SophiaG(parameters)


def muon_and_adamw(model: GPT) -> Callable[[], None]:
    """torch.optim.Muon for the matrices of the layers, fused AdamW for the rest, as is advised."""
    hidden = [p for p in model.layers.parameters() if p.dim() == 2]
    taken = set(map(id, hidden))
    muon = torch.optim.Muon(hidden)
    adamw = torch.optim.AdamW([p for p in model.parameters() if id(p) not in taken], fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def list_table(title: str, model: GPT, device: torch.device, rounds: int, muon: bool) -> None:
    """Updates of all of a model's parameters."""
    gpu = device.type == "cuda"
    parameters = list(model.to(device).parameters())
    give_gradients(parameters)
    adamw, ours = torch.optim.AdamW(parameters, fused=True), SophiaG(parameters)
    ours_bf16 = SophiaG(parameters, state_dtype=torch.bfloat16)
    loss = torch.zeros((), device=device)
    for optimizer in (ours, ours_bf16):  # a Hessian of zeros would clip every coordinate
        optimizer.update_hessian()

    def clipped_adamw() -> None:
        nn.utils.clip_grad_norm_(parameters, 1e6)  # without effect: gradients stay as they are
        adamw.step()

    def clipped_ours() -> None:
        _, scale = gradient_scale(list(model.parameters()), loss, 1.0)
        ours.step(grad_scale=scale)

    contestants: dict[str, Callable[[], Any]] = {"torch.optim.AdamW(fused=True)": adamw.step}
    moved = {"torch.optim.AdamW(fused=True)": ADAMW}

    def add(name: str, function: Callable[[], Any], n_bytes: int = 0) -> None:
        contestants[name] = function
        if n_bytes:
            moved[name] = n_bytes

    add("clip_grad_norm_ and AdamW", clipped_adamw, NORM + SCALE + ADAMW)
    if gpu and triton is not None:
        single = LaunchPerParameter(parameters)
        single.update_hessian()

        def clipped_single() -> None:
            nn.utils.clip_grad_norm_(parameters, 1e6)
            single.step()

        add("SophiaG, a launch per parameter", single.step, SOPHIA)
        add("  with clip_grad_norm_", clipped_single, NORM + SCALE + SOPHIA)
        add("  Hessian update", single.update_hessian, HESSIAN)
    if muon and hasattr(torch.optim, "Muon"):
        add("torch.optim.Muon and AdamW", muon_and_adamw(model))
    add("ours, SophiaG", ours.step, SOPHIA)
    add("ours, clip and SophiaG", clipped_ours, NORM + SOPHIA)
    add("ours, bfloat16 moments", ours_bf16.step, SOPHIA_BF16)
    add("ours, Hessian update", ours.update_hessian, HESSIAN)
    n, rate = model.n_parameters(), limits(device).copy_bandwidth
    bound = {name: n_bytes * n / rate for name, n_bytes in moved.items()}
    title = f"{title}: {len(parameters)} tensors, {n:,} float32 parameters"
    compare("optimizer", title, contestants, rounds, device, bound=bound)


def authors_table(title: str, model: GPT, device: torch.device, rounds: int) -> None:
    """The authors' SophiaG, a loop over the tensors in plain PyTorch: many times as slow."""
    parameters = list(model.to(device).parameters())
    if (official := official_sophia(parameters)) is None:
        return
    give_gradients(parameters)
    ours = SophiaG(parameters)
    contestants = {"SophiaG of its authors": official, "ours, SophiaG": ours}
    for optimizer in contestants.values():
        optimizer.update_hessian()
    steps = {name: optimizer.step for name, optimizer in contestants.items()}
    bound = SOPHIA * model.n_parameters() / limits(device).copy_bandwidth
    bounds = dict.fromkeys(steps, bound)
    compare("optimizer", f"{title}, the authors' code", steps, rounds, device, bound=bounds)


def square_table(device: torch.device, rounds: int, n_tensors: int = 10, width: int = 4096) -> None:
    """The original's own benchmark: ten large square matrices, step and Hessian update of each."""
    parameters = [nn.Parameter(torch.randn(width, width, device=device)) for _ in range(n_tensors)]
    give_gradients(parameters)
    adamw, ours = torch.optim.AdamW(parameters, fused=True), SophiaG(parameters)
    optimizers: dict[str, Any] = {}
    if triton is not None and device.type == "cuda":
        optimizers["SophiaG, a launch per parameter"] = LaunchPerParameter(parameters)
    optimizers["ours, SophiaG"] = ours

    def both(optimizer: Any) -> Callable[[], None]:
        def run() -> None:
            optimizer.update_hessian()
            optimizer.step()

        return run

    contestants = {"torch.optim.AdamW(fused=True)": adamw.step}
    contestants |= {f"{name}, with Hessian": both(o) for name, o in optimizers.items()}
    n, rate = sum(p.numel() for p in parameters), limits(device).copy_bandwidth
    bound = dict.fromkeys(contestants, (SOPHIA + HESSIAN) * n / rate)
    bound["torch.optim.AdamW(fused=True)"] = ADAMW * n / rate
    title = f"the original's benchmark: {n_tensors} tensors of {width} x {width}, float32"
    compare("optimizer", title, contestants, rounds, device, bound=bound)


def run(config: Any, device: torch.device) -> None:
    """The section, on the shape in `config` (n_layers, n_embd, ...) and on the demo's."""
    gpu = device.type == "cuda"
    vocab_size = load_tokenizer().vocab_size
    shape = {name: getattr(config, name) for name in SHAPE}
    small = config_from_constants(vars(train), demo.MODEL)
    demo_shape = {name: getattr(small, name) for name in SHAPE}
    # Muon's products take half a minute on a CPU for the full model: there it is timed on the small
    model = GPT(GPTConfig(**shape, vocab_size=vocab_size))
    list_table("full model", model, device, 3 * config.rounds, muon=gpu)
    authors_table("full model", model, device, max(2, config.rounds // 2))
    del model
    model = GPT(GPTConfig(**demo_shape, vocab_size=vocab_size))
    list_table("the demo's model", model, device, 3 * config.rounds, muon=True)
    if gpu:
        square_table(device, 3 * config.rounds)
