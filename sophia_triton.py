"""SophiaG, a second-order optimizer: Triton kernels and a torch.optim class.

    optimizer = SophiaG(model.parameters(), lr=1e-3, rho=0.05, weight_decay=0.1, bs=8192)
    every 10th step:  backward of the mean cross-entropy over `bs` tokens against labels sampled
                      from the model, optimizer.update_hessian(), zero_grad(); then as always:
    every step:       backward of the training loss, optimizer.step(), zero_grad()

The formula is in ops/sophia_reference.py. Each update is one pass over memory for all parameters
of a group together: on CUDA one launch of a Triton kernel, on a CPU one call of
ops/sophia_step.cpp, compiled at its first use. Without Triton or a C++ compiler it is plain
PyTorch, and slower.

References: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training", arXiv 2305.14342, Algorithms 2 (Gauss-Newton-Bartlett, GNB) and 3; the authors'
code, github.com/Liuhong99/Sophia, which adds eps where Algorithm 3 and this one take a maximum.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.parameter_table import BLOCK_SIZE, Bucket, ParameterTables
from ops.sophia_reference import (
    as_scalar,
    cpp_library,
    finish_eager,
    run_cpp,
    run_eager,
    suits_cpp,
)

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:
    # The table, its rows and ALIGNED are described in ops/parameter_table.py.

    @triton.jit
    def locate(table_ptr, block_rows_ptr, scale, ALIGNED: tl.constexpr, BLOCK_SIZE: tl.constexpr):
        """This block's row, its first element and its number of elements (0: skip the step)."""
        pid = tl.program_id(0)
        row_ptr = table_ptr + tl.load(block_rows_ptr + pid) * 8

        start = (pid - tl.load(row_ptr + 6)) * BLOCK_SIZE
        remaining = tl.minimum(tl.load(row_ptr + 5) - start, BLOCK_SIZE).to(tl.int32)
        remaining = tl.where(scale - scale == 0, remaining, 0)
        if ALIGNED:
            remaining = tl.multiple_of(remaining, 16)
        return row_ptr, start, remaining

    @triton.jit
    def pointers(row_ptr, column: tl.constexpr, start, offsets, DTYPE, ALIGNED: tl.constexpr):
        """Pointers to this block's elements of one tensor of the row."""
        base_ptr = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            base_ptr = tl.multiple_of(base_ptr, 16)
        return base_ptr + start + offsets

    @triton.jit
    def hash32_kernel(x):
        """`hash32` of a uint32."""
        x = x + 0x1E3779B9
        x = (x ^ (x >> 16)) * 0x45D9F3B
        x = (x ^ (x >> 16)) * 0x45D9F3B
        return x ^ (x >> 16)

    @triton.jit
    def round_to_moment_dtype(x, row_ptr, index, moment: tl.constexpr, DTYPE: tl.constexpr):
        """Float32 `x` in the moments' dtype: `round_stochastic` when that is bfloat16."""
        if DTYPE == tl.bfloat16:
            step = tl.load(tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32))).to(tl.uint32)
            step += 1 - moment  # finish_kernel counts this step when all blocks have read it
            stream = (tl.load(row_ptr + 7) * 2 + moment).to(tl.uint32)
            seed = hash32_kernel(step ^ hash32_kernel(stream))
            noise = (hash32_kernel(index.to(tl.uint32) ^ seed) & 0xFFFF).to(tl.int32)
            rounded = (x.to(tl.int32, bitcast=True) + noise) & -0x10000
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
        return x.to(DTYPE)

    @triton.jit
    def step_kernel(
        table_ptr, block_rows_ptr, scale_ptr, counters_ptr,
        lr, weight_decay, beta1, rho_bs, eps, cautious: tl.constexpr,
        PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
        ALIGNED: tl.constexpr, BLOCK_SIZE: tl.constexpr, COUNTERS: tl.constexpr,
    ):  # fmt: skip
        """m = beta1 m + (1 - beta1) s g; p = p (1 - lr wd) - lr u, where u is the update.

        u = clip(m / max(rho bs h, eps), 1), or 0 where `cautious` and u s g <= 0.
        """
        scale = tl.load(scale_ptr)
        row_ptr, start, remaining = locate(table_ptr, block_rows_ptr, scale, ALIGNED, BLOCK_SIZE)
        offsets = tl.arange(0, BLOCK_SIZE)
        mask = offsets < remaining

        p_ptrs = pointers(row_ptr, 0, start, offsets, PARAM, ALIGNED)
        g_ptrs = pointers(row_ptr, 1, start, offsets, GRAD, ALIGNED)
        m_ptrs = pointers(row_ptr, 2, start, offsets, MOMENT, ALIGNED)
        h_ptrs = pointers(row_ptr, 3, start, offsets, MOMENT, ALIGNED)
        p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)

        g = scale * g
        m = beta1 * m + (1 - beta1) * g
        bound = rho_bs * h  # compared, not tl.maximum: a NaN propagates
        ratio = m / tl.where(bound < eps, eps, bound)
        update = tl.where(ratio > 1, 1.0, tl.where(ratio < -1, -1.0, ratio))
        if cautious:
            update = tl.where(update * g <= 0, 0.0, update)  # a NaN propagates
        p = p * (1 - lr * weight_decay) - lr * update
        unclipped = tl.sum(tl.where(mask, (tl.abs(ratio) < 1).to(tl.int32), 0))

        m = round_to_moment_dtype(m, row_ptr, start + offsets, 0, MOMENT)
        tl.store(p_ptrs, p.to(PARAM), mask=mask)
        tl.store(m_ptrs, m, mask=mask)
        tl.atomic_add(counters_ptr + tl.program_id(0) % COUNTERS, unclipped, sem="relaxed")

    @triton.jit
    def finish_kernel(
        table_ptr, scale_ptr, counters_ptr, share_ptr,
        n_rows, total,
        COUNTERS: tl.constexpr,
    ):  # fmt: skip
        """After step_kernel: step += 1 in every row; share = sum of the counters / total.

        A scale that is not finite counts no step and gives the share NaN.
        """
        scale = tl.load(scale_ptr)
        offsets = tl.arange(0, COUNTERS)
        share = tl.sum(tl.load(counters_ptr + offsets).to(tl.int64)).to(tl.float32) / total
        n_counted = tl.where(scale - scale == 0, n_rows, 0)

        tl.store(share_ptr, tl.where(scale - scale == 0, share, float("nan")))
        for first in range(0, n_rows, COUNTERS):
            mask = first + offsets < n_counted
            addresses = tl.load(table_ptr + (first + offsets) * 8 + 4, mask=mask, other=0)
            step_ptrs = addresses.to(tl.pointer_type(tl.float32))
            tl.store(step_ptrs, tl.load(step_ptrs, mask=mask, other=0.0) + 1, mask=mask)

    @triton.jit
    def hessian_kernel(
        table_ptr, block_rows_ptr, scale_ptr,
        decay, gain, squared: tl.constexpr,
        GRAD: tl.constexpr, MOMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ):  # fmt: skip
        """h = decay h + gain (s g)^2, or decay h + gain s g where g is `squared` already."""
        scale = tl.load(scale_ptr)
        row_ptr, start, remaining = locate(table_ptr, block_rows_ptr, scale, ALIGNED, BLOCK_SIZE)
        offsets = tl.arange(0, BLOCK_SIZE)
        mask = offsets < remaining

        g_ptrs = pointers(row_ptr, 1, start, offsets, GRAD, ALIGNED)
        h_ptrs = pointers(row_ptr, 3, start, offsets, MOMENT, ALIGNED)
        g = scale * tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)

        if squared:
            h = decay * h + gain * g
        else:
            h = decay * h + gain * g * g

        h = round_to_moment_dtype(h, row_ptr, start + offsets, 1, MOMENT)
        tl.store(h_ptrs, h, mask=mask)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COUNTERS = 1024  # partial counts of a step: atomic additions to a single one would wait in line


def launch(bucket: Bucket, scale: Tensor, update: str, constants: dict) -> Tensor | None:
    """The update ("step" or "hessian") in one kernel; counters of the coordinates not clipped.

    A `scale` that is not finite changes nothing.
    """
    param, grad, moment = (
        getattr(tl, str(dtype).removeprefix("torch.")) for dtype in bucket.dtypes
    )
    arguments = dict(
        table_ptr=bucket.table,
        block_rows_ptr=bucket.block_rows,
        scale_ptr=scale,
        **constants,
        GRAD=grad,
        MOMENT=moment,
        ALIGNED=bucket.is_aligned,
        BLOCK_SIZE=BLOCK_SIZE,
        num_warps=8,
    )
    grid = (len(bucket.block_rows),)
    with torch.cuda.device_of(scale):
        if update == "hessian":
            hessian_kernel[grid](**arguments)
            return None
        counters = torch.zeros(COUNTERS, dtype=torch.int32, device=bucket.device)
        step_kernel[grid](counters_ptr=counters, COUNTERS=COUNTERS, PARAM=param, **arguments)
        return counters


def finish(bucket: Bucket, scale: Tensor, counters: Tensor, total: int) -> Tensor:
    """Counts the step; the share of `total` that it did not clip, NaN if it was skipped."""
    share = torch.empty_like(scale)
    with torch.cuda.device_of(scale):
        finish_kernel[(1,)](
            table_ptr=bucket.table,
            scale_ptr=scale,
            counters_ptr=counters,
            share_ptr=share,
            n_rows=len(bucket.params),
            total=float(total),
            COUNTERS=COUNTERS,
        )
    return share


class SophiaG(torch.optim.Optimizer):
    """Sophia with the Gauss-Newton-Bartlett estimator, arXiv 2305.14342, Algorithms 2 and 3.

    `bs` is the number of tokens whose mean loss `update_hessian`'s gradient averages (step's `bs`
    overrides it). `win_rate`, a scalar on the device, is the share of coordinates that the last
    step did not clip: NaN before the first. `bias_correction` divides the Hessian average by
    1 - beta2^updates, as Adam does (the authors do not): without it the average is too small, and
    nearly every coordinate clipped, while beta2^updates is large. `cautious` leaves out the
    coordinates whose update and gradient differ in sign (Liang et al., arXiv 2411.16085, without
    their rescaling: give about 1.5 times the learning rate). With `state_dtype` bfloat16 the
    moments take half the memory and are rounded stochastically; rounding to nearest would stall,
    since a change under 0.2 to 0.4 % of a value is lost and `hessian` moves by 1 % of the
    difference. Parameters are rounded to nearest: keep them in float32. `backend` "auto" takes the
    fastest; "triton", "cpp" (CPU) and "eager" force one. ValueError for impossible settings.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        *,
        eps: float = 1e-15,
        maximize: bool = False,
        bs: int = 8192,
        bias_correction: bool = False,
        cautious: bool = False,
        state_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ):
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype = {state_dtype}: use torch.float32 or torch.bfloat16")
        if backend not in ("auto", "triton", "cpp", "eager"):
            raise ValueError(f"backend = {backend!r}: use auto, triton, cpp or eager")
        if backend == "triton" and triton is None:
            raise ValueError("backend = 'triton': install the package triton, or use 'auto'")
        if backend == "cpp" and cpp_library() is None:
            raise ValueError("backend = 'cpp': install a C++ compiler (g++), or use 'auto'")
        self.state_dtype, self.backend = state_dtype, backend
        self.win_rate = torch.tensor(float("nan"))
        self._tables = ParameterTables()
        defaults = dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay)
        defaults |= dict(eps=eps, maximize=maximize, bs=bs, cautious=cautious)
        defaults |= dict(bias_correction=bias_correction)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; settings that it lacks are the constructor's."""
        group = {**self.defaults, **param_group}
        eps_min = torch.finfo(torch.float32).tiny  # a zero denominator would turn 0 / 0 into NaN
        lows = dict(lr=0, rho=0, weight_decay=0, eps=eps_min, bs=1)
        for name, low in lows.items():
            if not group[name] >= low:
                raise ValueError(f"{name} = {group[name]}: must be at least {low}")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas = {group['betas']}: two numbers of at least 0 and below 1")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(
        self,
        closure: Callable | None = None,
        bs: int | None = None,
        *,
        grad_scale: float | Tensor | None = None,
    ):
        """Updates the parameters that have a gradient; returns the closure's loss, if there is one.

        `grad_scale` (the clip factor; a tensor stays on its device) multiplies every gradient. If
        it is NaN or infinite nothing changes: no parameter, moment, step count or win rate.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if bs is not None and not bs >= 1:
            raise ValueError(f"bs = {bs}: the number of tokens is at least 1")

        buckets = self._buckets()
        total, shares = sum(bucket.numel for _, bucket in buckets), []
        for group, bucket in buckets:
            rho_bs = group["rho"] * (group["bs"] if bs is None else bs)
            if group["bias_correction"]:
                for state in bucket.states:
                    n_updates = state.setdefault("hessian_updates", 0)
                rho_bs /= 1 - group["betas"][1] ** max(1, n_updates)
            constants = dict(
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                beta1=float(group["betas"][0]),
                rho_bs=float(rho_bs),
                eps=float(group["eps"]),
                cautious=bool(group["cautious"]),
            )
            scale = as_scalar(grad_scale, bucket.device)
            scale = -scale if group["maximize"] else scale
            shares.append(self._update(bucket, scale, "step", constants, total))
            torch.autograd.graph.increment_version(bucket.params)
        if shares:  # each NaN where the step was skipped
            rate = sum((share.to(shares[0].device) for share in shares[1:]), shares[0])
            self.win_rate = torch.where(rate.isnan(), self.win_rate.to(rate.device), rate)
        return loss

    @torch.no_grad()
    def update_hessian(
        self, grad_scale: float | Tensor | None = None, *, squared: bool = False
    ) -> None:
        """Averages the squared gradients of the sampled-label loss into the Hessian.

        h = beta2 h + (1 - beta2) (grad_scale g)^2, where g is the gradient of the mean loss over
        `bs` tokens. With `squared` the gradients hold the mean over batches of n g^2 instead, n
        being a batch's own number of labels, and h = beta2 h + (1 - beta2) grad_scale g / bs.
        If `grad_scale` is NaN or infinite nothing changes.
        """
        for group, bucket in self._buckets():
            decay = float(group["betas"][1])
            gain = (1 - decay) / (group["bs"] if squared else 1)
            constants = dict(decay=decay, gain=gain, squared=squared)
            self._update(bucket, as_scalar(grad_scale, bucket.device), "hessian", constants)
            if group["bias_correction"]:  # counts a skipped update too: the host does not know
                for state in bucket.states:
                    state["hessian_updates"] = state.get("hessian_updates", 0) + 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads `state_dict`, the moments in `state_dtype` (torch.optim takes the parameters')."""
        super().load_state_dict(state_dict)
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            saved = state_dict["state"].get(number, {})
            for name in saved.keys() & {"exp_avg", "hessian"}:
                if saved[name].shape != p.shape:  # which might broadcast
                    raise ValueError(
                        f"{name} of parameter {number} has the shape {tuple(saved[name].shape)}, "
                        f"the parameter {tuple(p.shape)}: this is the state of another model"
                    )
                moment = torch.empty_like(p, dtype=self.state_dtype, requires_grad=False)
                self.state[p][name] = moment.copy_(saved[name])

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("state_dtype", "backend", "win_rate")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = ParameterTables()
        for group in self.param_groups:
            # The authors' states lack some of these, as do older ones of this class.
            for name in ("eps", "maximize", "bs", "cautious", "bias_correction"):
                group.setdefault(name, self.defaults[name])
        for p, values in self.state.items():
            if "step" in values:  # in old states a number, of shape (1,), or on another device
                step = torch.full((), float(values["step"]), dtype=torch.float32, device=p.device)
                values["step"] = step

    def _prepare(self, p: Tensor, number: int) -> dict[str, Tensor]:
        """The state of one parameter; what it lacks is created."""
        if p.dtype not in FLOATS or p.grad.layout != torch.strided:
            raise ValueError(
                f"parameter {number} is {p.dtype}, its gradient {p.grad.layout}: SophiaG takes "
                "dense float32, bfloat16 and float16; convert it or give it to another optimizer"
            )
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in ("exp_avg", "hessian"):
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=self.state_dtype, requires_grad=False)
        return state

    def _buckets(self) -> list[tuple[dict[str, Any], Bucket]]:
        """(group, bucket) for all parameters that have a gradient."""
        return self._tables.buckets(self.param_groups, self.state, self._prepare)

    def _update(
        self, bucket: Bucket, scale: Tensor, update: str, constants: dict, total: int = 0
    ) -> Tensor | None:
        """The update "step" or "hessian" of a bucket; the share of `total` that is not clipped."""
        backend = self.backend if bucket.is_dense else "eager"
        on_cuda = bucket.device.type == "cuda" and triton is not None
        if backend == "triton" or (backend == "auto" and on_cuda):
            try:
                counters = launch(bucket, scale, update, constants)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no C compiler, for example: nothing has been written
                if backend == "triton":
                    raise
                self._fall_back("Triton", str(error).strip() or type(error).__name__)
            else:
                return finish(bucket, scale, counters, total) if update == "step" else None
        run = run_eager
        if backend in ("auto", "cpp") and suits_cpp(bucket):
            run = run_cpp if cpp_library() is not None else run_eager
            if run is run_eager:
                self._fall_back("C++", "no compiler (g++) works here")
        if scale.is_cpu and not scale.isfinite():  # costs nothing here; a GPU would have to wait
            count = torch.zeros(())
        else:
            count = run(bucket, scale, update, constants)
        return finish_eager(bucket, scale, count, total) if update == "step" else None

    def _fall_back(self, missing: str, reason: str) -> None:
        reason = reason.partition("\n")[0]
        warnings.warn(f"SophiaG runs without {missing}, slower: {reason}", stacklevel=5)
        self.backend = "eager"
