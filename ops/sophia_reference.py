"""SophiaG's update: its formula, the same in place in plain PyTorch, and in C++.

sophia_triton.py holds the Triton kernels and the optimizer, and chooses. `run_cpp` and `run_eager`
take a bucket of parameters, the gradients' scale on its device, the settings, and the number of
elements of all buckets together, or 0 for the Hessian update instead of the step. A scale that is
not finite changes nothing.
"""

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from ops.cpp_build import native_library
from ops.parameter_table import BLOCK_SIZE, Bucket

SOURCE = Path(__file__).with_name("sophia_step.cpp")


def sophia_step(p, g, m, h, lr, weight_decay, beta1, rho_bs, eps):
    """One step for float32 tensors: new parameter, new momentum, which coordinates did not clip."""
    m = beta1 * m + (1 - beta1) * g
    ratio = m / (rho_bs * h).clamp(min=eps)
    p = p * (1 - lr * weight_decay) - lr * ratio.clamp(-1, 1)  # sign(m) min(|ratio|, 1)
    return p, m, ratio.abs() < 1


def sophia_hessian(g, h, decay, gain):
    """The new diagonal Hessian average from the gradient `g` of the sampled-label loss.

    `decay` is beta2 and `gain` is 1 - beta2.
    """
    return decay * h + gain * g * g


# Stochastic rounding to bfloat16: add 16 random bits below the ones that stay, then cut. The bits
# are a hash of (parameter, step, coordinate), so a resumed run repeats them, the global random
# state is untouched, and PyTorch (int64, no overflow here), C++ and Triton (uint32) agree.
HASH_OFFSET, HASH_FACTOR = 0x1E3779B9, 0x45D9F3B


def mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash of the low 32 bits of int64 `x`."""
    x = (x + HASH_OFFSET) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * HASH_FACTOR) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * HASH_FACTOR) & 0xFFFFFFFF
    return x ^ (x >> 16)


def rounding_seed(step: Tensor, stream: int) -> Tensor:
    """The hash key of one moment (`stream` is its number) at one step, a 0-d int64 tensor."""
    return mix(step.to(torch.int64) ^ mix(torch.full_like(step, stream, dtype=torch.int64)))


def round_stochastic(x: Tensor, seed: Tensor, index: Tensor) -> Tensor:
    """Float32 `x` as bfloat16, up or down with the probability that makes it right on average."""
    noise = (mix(index ^ seed) & 0xFFFF).to(torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x == x, rounded, x).to(torch.bfloat16)  # the sum would overflow some NaNs


def write(target: Tensor, value: Tensor, ok: Tensor | None) -> None:
    """Stores `value` if the step is not skipped; `ok` None says that the host has checked."""
    target.copy_(value if ok is None else torch.where(ok, value.to(target.dtype), target))


def step_torch(p, g, m, h, ok, scale, noise, *constants) -> Tensor:
    """`sophia_step` in place for tensors of any dtype; the count of coordinates not clipped."""
    new_p, new_m, unclipped = sophia_step(
        p.float(), scale * g.float(), m.float(), h.float(), *constants
    )
    write(p, new_p, ok)
    write(m, round_stochastic(new_m, *noise) if noise else new_m, ok)
    return unclipped.sum(dtype=torch.int32)  # on a CPU int64 and float32 are slower


def hessian_torch(p, g, m, h, ok, scale, noise, *constants) -> None:
    """`sophia_hessian` in place for tensors of any dtype."""
    new_h = sophia_hessian(scale * g.float(), h.float(), *constants)
    write(h, round_stochastic(new_h, *noise) if noise else new_h, ok)


PIECE = 1 << 15  # elements that plain PyTorch takes at a time on a CPU, to stay in its cache
CPP_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in sophia_step.cpp


@functools.cache
def cpp_library() -> ctypes.CDLL | None:
    """sophia_step.cpp, compiled and declared; None where nothing here can compile it."""
    library = native_library(SOURCE, "-ffp-contract=off")  # rounds as PyTorch does
    if library is not None:
        table = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 6
        library.sophia_step.argtypes = table + [ctypes.c_double] * 6
        library.sophia_hessian.argtypes = table + [ctypes.c_double] * 3
        library.sophia_step.restype, library.sophia_hessian.restype = ctypes.c_int64, None
    return library


def suits_cpp(bucket: Bucket) -> bool:
    """Whether sophia_step.cpp takes these tensors."""
    param, grad, moment = bucket.dtypes
    on_cpu = bucket.device.type == "cpu"
    return on_cpu and bucket.dense and param == grad and {param, moment} <= CPP_TYPES.keys()


def run_cpp(bucket: Bucket, scale: Tensor, constants: dict, total: int) -> Tensor:
    """One call for all parameters; returns the share of `total` that was not clipped."""
    factor, n_blocks = float(scale), len(bucket.block_rows)
    if not math.isfinite(factor):
        return torch.tensor(math.nan)
    function = cpp_library().sophia_step if total else cpp_library().sophia_hessian
    unclipped = function(
        bucket.table.data_ptr(),
        bucket.block_rows.data_ptr(),
        len(bucket.params),
        n_blocks,
        BLOCK_SIZE,
        CPP_TYPES[bucket.dtypes[0]],
        CPP_TYPES[bucket.dtypes[2]],
        min(torch.get_num_threads(), 1 + n_blocks // 16),  # a thread costs time to wake
        factor,
        *constants.values(),
    )
    return torch.tensor(unclipped / total if total else math.nan)


def run_eager(bucket: Bucket, scale: Tensor, constants: dict, total: int) -> Tensor:
    """The same in plain PyTorch, on any device and for any strides."""
    ok, counts = scale.isfinite(), []
    taken = ok.float()
    if scale.is_cpu:  # a check on the host costs nothing here
        if not ok:
            return torch.tensor(math.nan)
        ok, scale = None, float(scale)
    function = hessian_torch
    if total:
        function = step_torch
        torch._foreach_add_([state["step"] for state in bucket.states], taken)
    for p, state, number in zip(bucket.params, bucket.states, bucket.numbers, strict=True):
        m, h, noise = state["exp_avg"], state["hessian"], ()
        tensors = [p, p.grad, m, h]
        if m.dtype == torch.bfloat16:
            noise = (rounding_seed(state["step"], 2 * number + (not total)),)
            index = torch.arange(m.numel(), device=m.device)
            tensors.append(index.as_strided(m.shape, m.stride()))  # the place in memory
        tensors = [torch.atleast_1d(t) for t in tensors]
        length = len(tensors[0])
        if p.is_cpu:
            length = max(1, PIECE * length // p.numel())
        for p_, g_, m_, h_, *index in zip(*(t.split(length) for t in tensors), strict=True):
            settings = ok, scale, (*noise, *index), *constants.values()
            counts.append(function(p_, g_, m_, h_, *settings))
    if not total:
        return taken
    share = sum(counts) / total
    return share if ok is None else torch.where(ok, share, math.nan)
