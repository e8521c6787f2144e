"""SophiaG's two updates: the formula, and implementations in plain PyTorch and in C++.

sophia_triton.py has the Triton kernels and the optimizer, which chooses an implementation.
`run_cpp` and `run_eager` update the parameters of a bucket in place. Their arguments are the
bucket, the finite factor of its gradients as a tensor on its device, the name of the update, "step"
or "hessian", and its constants in the order of `sophia_step` or `sophia_hessian`. They return the
number of coordinates that a step did not clip, and None for a Hessian update.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ops.cpp_build import native_library
from ops.parameter_table import BLOCK_SIZE, Bucket

SOURCE = Path(__file__).with_name("sophia_step.cpp")


def sophia_step(p, g, m, h, lr, weight_decay, beta1, rho_bs, eps, cautious):
    """One step for float32 tensors: new parameter, new momentum, mask of unclipped coordinates."""
    m = beta1 * m + (1 - beta1) * g
    ratio = m / (rho_bs * h).clamp(min=eps)
    update = ratio.clamp(-1, 1)  # sign(m) min(|ratio|, 1)
    if cautious:
        update = torch.where(update * g <= 0, 0.0, update)  # a NaN propagates
    return p * (1 - lr * weight_decay) - lr * update, m, ratio.abs() < 1


def sophia_hessian(g, h, decay, gain, squared):
    """The new diagonal Hessian average from `g`, the gradient of the sampled-label loss.

    `decay` is beta2. `gain` is 1 - beta2, or (1 - beta2) / bs where g is `squared` already.
    """
    return decay * h + (gain * g if squared else gain * g * g)


# Stochastic rounding to bfloat16: add 16 random bits below the ones that stay, then truncate. The
# bits are a hash of (parameter, step, coordinate), so a resumed run repeats them, the global random
# state is untouched, and PyTorch (int64, no overflow here), C++ and Triton (uint32) agree.
HASH_OFFSET, HASH_FACTOR = 0x1E3779B9, 0x45D9F3B


def hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash of the low 32 bits of int64 `x`."""
    x = (x + HASH_OFFSET) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * HASH_FACTOR) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * HASH_FACTOR) & 0xFFFFFFFF
    return x ^ (x >> 16)


def rounding_seed(step: Tensor, stream: int) -> Tensor:
    """The hash key of one moment (number `stream`) at one step, a 0-d int64 tensor."""
    return hash32(step.to(torch.int64) ^ hash32(torch.full_like(step, stream, dtype=torch.int64)))


def round_stochastic(x: Tensor, seed: Tensor, index: Tensor) -> Tensor:
    """Float32 `x` as bfloat16, up or down with the probability that is unbiased."""
    noise = (hash32(index ^ seed) & 0xFFFF).to(torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x == x, rounded, x).to(torch.bfloat16)  # the sum would overflow some NaNs


def masked_copy_(target: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Copies `value` where the scalar `mask` is true or None; target and value differ in dtype."""
    target.copy_(value if mask is None else torch.where(mask, value.to(target.dtype), target))


def step_(p, g, m, h, finite, scale, noise, *constants) -> Tensor:
    """`sophia_step` in place for tensors of any dtype; the number of unclipped coordinates."""
    new_p, new_m, unclipped = sophia_step(
        p.float(), scale * g.float(), m.float(), h.float(), *constants
    )
    masked_copy_(p, new_p, finite)
    masked_copy_(m, round_stochastic(new_m, *noise) if noise else new_m, finite)
    return unclipped.sum(dtype=torch.int32)  # on a CPU int64 and float32 are slower


def hessian_(p, g, m, h, finite, scale, noise, *constants) -> None:
    """`sophia_hessian` in place for tensors of any dtype."""
    new_h = sophia_hessian(scale * g.float(), h.float(), *constants)
    masked_copy_(h, round_stochastic(new_h, *noise) if noise else new_h, finite)


CHUNK = 1 << 15  # elements that plain PyTorch updates at a time on a CPU: in its cache, 5x faster
CPP_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in sophia_step.cpp


@functools.cache
def cpp_library() -> ctypes.CDLL | None:
    """sophia_step.cpp, compiled and declared; None where no compiler works."""
    library = native_library(SOURCE, "-ffp-contract=off")  # rounds as PyTorch does
    if library is not None:
        table = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 5 + [ctypes.c_double]
        library.sophia_step.argtypes = table + [ctypes.c_double] * 5 + [ctypes.c_int64]
        library.sophia_hessian.argtypes = table + [ctypes.c_double] * 2 + [ctypes.c_int64]
        library.sophia_step.restype, library.sophia_hessian.restype = ctypes.c_int64, None
    return library


def suits_cpp(bucket: Bucket) -> bool:
    """Whether sophia_step.cpp supports these tensors."""
    param, grad, moment = bucket.dtypes
    on_cpu = bucket.device.type == "cpu"
    return on_cpu and bucket.is_dense and param == grad and {param, moment} <= CPP_TYPES.keys()


def run_cpp(bucket: Bucket, scale: Tensor, update: str, constants: dict) -> Tensor | None:
    """The update in one call of sophia_step.cpp."""
    n_blocks = len(bucket.block_rows)
    unclipped = getattr(cpp_library(), f"sophia_{update}")(
        bucket.table.data_ptr(),
        bucket.block_rows.data_ptr(),
        n_blocks,
        BLOCK_SIZE,
        CPP_TYPES[bucket.dtypes[0]],
        CPP_TYPES[bucket.dtypes[2]],
        min(torch.get_num_threads(), 1 + n_blocks // 16),  # a thread costs time to wake
        float(scale),
        *constants.values(),
    )
    return torch.tensor(unclipped) if update == "step" else None


def run_eager(bucket: Bucket, scale: Tensor, update: str, constants: dict) -> Tensor | None:
    """The update in plain PyTorch, on any device and for any strides.

    On a GPU, whose `scale` the host does not know, one that is not finite changes nothing.
    """
    finite, factor = (None, float(scale)) if scale.is_cpu else (scale.isfinite(), scale)
    function, moment = (step_, 0) if update == "step" else (hessian_, 1)
    counts = []
    for p, state, number in zip(bucket.params, bucket.states, bucket.numbers, strict=True):
        m, h, noise = state["exp_avg"], state["hessian"], ()
        tensors = [p, p.grad, m, h]
        if m.dtype == torch.bfloat16:
            noise = (rounding_seed(state["step"] + (1 - moment), 2 * number + moment),)
            index = torch.arange(m.numel(), device=m.device)
            tensors.append(index.as_strided(m.shape, m.stride()))  # offsets in memory
        tensors = [torch.atleast_1d(t) for t in tensors]
        length = len(tensors[0])
        if p.is_cpu:
            length = max(1, CHUNK * length // p.numel())
        for p_, g_, m_, h_, *index in zip(*(t.split(length) for t in tensors), strict=True):
            settings = finite, factor, (*noise, *index), *constants.values()
            counts.append(function(p_, g_, m_, h_, *settings))
    return sum(counts) if update == "step" else None


def finish_eager(bucket: Bucket, scale: Tensor, count: Tensor, total: int) -> Tensor:
    """`finish` in plain PyTorch, for the updates that return the `count` itself."""
    finite = scale.isfinite()
    torch._foreach_add_([state["step"] for state in bucket.states], finite.float())
    return torch.where(finite, count / total, torch.nan)


def as_scalar(value: float | Tensor | None, device: torch.device) -> Tensor:
    """A gradient scale as a float32 scalar on `device`, without waiting for the device."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, torch.float32, non_blocking=True)
    return torch.full((), 1.0 if value is None else value, dtype=torch.float32, device=device)
