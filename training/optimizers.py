"""The optimizers of a training run: parameter groups, learning rates, one protocol for all kinds.

The tied embedding, which is also the head, wants larger steps than the hidden matrices: it and the
norms have AdamW with a rate of their own, and only the hidden matrices the configured optimizer.

Protocol: `step(grad_scale=...)`. `grad_scale`, a scalar tensor on the device, multiplies every
gradient; where it is not finite the step changes nothing: no parameter, no moment, no step count.
SophiaG has the protocol itself.
"""

from collections.abc import Callable
from typing import Any

import torch

from model import GPT
from sophia_triton import SophiaG


def scale_gradients(optimizer: torch.optim.Optimizer, grad_scale: torch.Tensor | None) -> bool:
    """Multiplies the gradients in place; False, and no change, if `grad_scale` is not finite.

    Waits for the device. For optimizers that cannot skip a step on the device.
    """
    if grad_scale is None:
        return True
    if not torch.isfinite(grad_scale):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], grad_scale)
    return True


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, fused where the fused kernel honours `grad_scale`."""

    def step(self, closure: Callable | None = None, *, grad_scale: torch.Tensor | None = None):
        if not self.defaults["fused"]:
            return super().step(closure) if scale_gradients(self, grad_scale) else None
        if grad_scale is not None:  # the interface that GradScaler uses: a divisor and a skip flag
            self.found_inf = (~torch.isfinite(grad_scale)).float()
            self.grad_scale = 1.0 / torch.nan_to_num(grad_scale, nan=1.0, posinf=1.0, neginf=1.0)
        return super().step(closure)


class Muon(torch.optim.Muon):
    """PyTorch's Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/), for matrices.

    Its steps are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982).
    """

    def step(self, closure: Callable | None = None, *, grad_scale: torch.Tensor | None = None):
        return super().step(closure) if scale_gradients(self, grad_scale) else None


class OptimizerPair:
    """Two optimizers as one: the hidden matrices' and that of the other parameters.

    A state dict numbers the parameters of the first, then those of the second.
    """

    def __init__(self, hidden: SophiaG | AdamW | Muon, others: AdamW):
        self.hidden, self.others = hidden, others
        self.optimizers = (hidden, others)
        if isinstance(hidden, SophiaG):
            self.update_hessian = hidden.update_hessian

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        return self.hidden.state | self.others.state

    @property
    def win_rate(self) -> torch.Tensor:
        return self.hidden.win_rate

    def step(self, *, grad_scale: torch.Tensor | None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step(grad_scale=grad_scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def n_hidden(self) -> int:
        return sum(len(group["params"]) for group in self.hidden.param_groups)

    def state_dict(self) -> dict[str, Any]:
        parts, first = [optimizer.state_dict() for optimizer in self.optimizers], self.n_hidden()
        for group in parts[1]["param_groups"]:
            group["params"] = [first + number for number in group["params"]]
        others = {first + number: values for number, values in parts[1]["state"].items()}
        return {
            "state": parts[0]["state"] | others,
            "param_groups": parts[0]["param_groups"] + parts[1]["param_groups"],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        first, n_groups = self.n_hidden(), len(self.hidden.param_groups)
        state, groups = state_dict["state"], state_dict["param_groups"]
        hidden = {number: values for number, values in state.items() if number < first}
        others = {number - first: values for number, values in state.items() if number >= first}
        self.hidden.load_state_dict({"state": hidden, "param_groups": groups[:n_groups]})
        groups = [
            group | {"params": [number - first for number in group["params"]]}
            for group in groups[n_groups:]
        ]
        self.others.load_state_dict({"state": others, "param_groups": groups})


def make_optimizer(model: GPT, config: Any) -> OptimizerPair | SophiaG | AdamW:
    """The optimizer as configured, with weight decay on matrices only.

    The hidden matrices have `config.optimizer`; SophiaG is bias-corrected. The tied embedding and
    the norms have AdamW; with `embedding_optimizer` "same" a single optimizer has all parameters.
    """
    parameters, decay = list(model.parameters()), {"weight_decay": config.weight_decay}
    matrices = [p for p in parameters if p.dim() >= 2]
    norms = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    if config.embedding_optimizer == "same":
        return make_one([{"params": matrices} | decay, norms], model, config)
    ratio = config.embedding_learning_rate / config.learning_rate
    embedding = model.tok_embeddings.weight
    hidden = [p for p in matrices if p is not embedding]
    others = [{"params": [embedding]} | decay, norms]
    others = make_adamw([group | {"lr_scale": ratio} for group in others], config)
    return OptimizerPair(make_one([{"params": hidden} | decay], model, config), others)


def make_one(groups: list[dict[str, Any]], model: GPT, config: Any) -> SophiaG | AdamW | Muon:
    """The optimizer that `config.optimizer` names."""
    if config.optimizer == "adamw":
        return make_adamw(groups, config)
    if config.optimizer == "muon":
        return Muon(groups, lr=config.learning_rate, adjust_lr_fn="match_rms_adamw")
    return SophiaG(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        rho=config.rho,
        bs=config.batch_size * model.config.block_size,  # a Hessian estimate's: one micro-batch
        bias_correction=config.embedding_optimizer != "same",
        cautious=config.cautious,
        state_dtype=getattr(torch, config.optimizer_state_dtype),
    )


def make_adamw(groups: list[dict[str, Any]], config: Any) -> AdamW:
    """Fused AdamW, except on Apple GPUs, where the fused kernel ignores grad_scale."""
    betas = (config.adamw_beta1, config.adamw_beta2)
    fused = groups[0]["params"][0].device.type != "mps"
    return AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)


def set_learning_rate(optimizer: OptimizerPair | SophiaG | AdamW, learning_rate: float) -> None:
    """Sets the rate of every group: the hidden matrices' `learning_rate` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def first_moments(
    optimizer: OptimizerPair | SophiaG | AdamW, dtype: torch.dtype
) -> dict[int, dict[str, Any]]:
    """`optimizer.state_dict()["state"]` as it is after one step, in tensors without data.

    `dtype` is that of SophiaG's moments.
    """
    step, moments = torch.empty((), device="meta"), {}
    for part in getattr(optimizer, "optimizers", (optimizer,)):
        names, part_dtype, rest = ("exp_avg", "exp_avg_sq"), torch.float32, {"step": step}
        if isinstance(part, SophiaG):
            names, part_dtype = ("exp_avg", "hessian"), dtype
            rest = rest | ({"hessian_updates": 0} if part.defaults["bias_correction"] else {})
        elif isinstance(part, Muon):
            names, rest = ("momentum_buffer",), {}
        for p in (p for group in part.param_groups for p in group["params"]):
            like = {name: torch.empty(p.shape, dtype=part_dtype, device="meta") for name in names}
            moments[len(moments)] = rest | like
    return moments


def gradient_scale(
    parameters: list[torch.Tensor], loss: torch.Tensor, grad_clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients' norm and the factor that clips it to `grad_clip` (0: no clipping).

    Both stay on the device. The factor is NaN where the loss or a gradient is not finite, which
    makes the optimizers skip the step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    scale = (grad_clip / (norm + 1e-6)).clamp(max=1.0) if grad_clip > 0 else torch.ones_like(norm)
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    return norm, torch.where(finite, scale, torch.full_like(scale, torch.nan))
