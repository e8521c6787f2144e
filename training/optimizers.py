"""Optimizers of a training run, all with one protocol: `step(grad_scale=...)`.

`grad_scale`, a scalar tensor on the device, multiplies every gradient; where it is not finite the
step changes nothing: no parameter, no moment, no step count. SophiaG has the protocol itself.
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


def make_optimizer(model: GPT, config: Any) -> SophiaG | AdamW:
    """SophiaG or fused AdamW as configured, with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        betas = (config.adamw_beta1, config.adamw_beta2)
        fused = parameters[0].device.type != "mps"  # there the fused kernel ignores grad_scale
        return AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)
    return SophiaG(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        rho=config.rho,
        bs=config.batch_size * model.config.block_size,  # a Hessian estimate's: one micro-batch
        state_dtype=getattr(torch, config.optimizer_state_dtype),
    )


def first_moments(
    optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> dict[int, dict[str, torch.Tensor]]:
    """What `optimizer.state_dict()["state"]` holds after one step, as tensors without data."""
    names = ("exp_avg", "hessian" if isinstance(optimizer, SophiaG) else "exp_avg_sq")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    step = torch.empty((), device="meta")
    return {
        number: {"step": step}
        | {name: torch.empty(p.shape, dtype=dtype, device="meta") for name in names}
        for number, p in enumerate(parameters)
    }


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
