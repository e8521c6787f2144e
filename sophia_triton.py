"""SophiaG, a second-order optimizer: the formula, Triton kernels, and a torch.optim class.

    optimizer = SophiaG(model.parameters(), lr=1e-3, rho=0.05, weight_decay=0.1, bs=8192)
    every 10th step:  backward of the mean cross-entropy over `bs` tokens against labels sampled
                      from the model, optimizer.update_hessian(), zero_grad(); then as always:
    every step:       backward of the training loss, optimizer.step(), zero_grad()

On CUDA with Triton each update is one kernel launch for all parameters of a group. On a CPU it is
a torch.compile'd loop for models above a million parameters, and plain PyTorch in all other cases.

References: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training", arXiv 2305.14342, Algorithms 2 (Gauss-Newton-Bartlett, GNB) and 3; the authors'
code, github.com/Liuhong99/Sophia, which adds eps where Algorithm 3 and this file take a maximum.
"""

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def sophia_step(p, g, m, h, lr, weight_decay, beta1, rho_bs, eps):
    """One step for float32 tensors: new parameter, new momentum, which coordinates did not clip."""
    m = beta1 * m + (1 - beta1) * g
    ratio = m / (rho_bs * h).clamp(min=eps)
    p = p * (1 - lr * weight_decay) - lr * ratio.clamp(-1, 1)  # sign(m) min(|ratio|, 1)
    return p, m, ratio.abs() < 1


def sophia_hessian(g, h, beta2):
    """The new diagonal Hessian average from the gradient `g` of the sampled-label loss."""
    return beta2 * h + (1 - beta2) * g * g


# Stochastic rounding to bfloat16: add 16 random bits below the ones that stay, then cut. The bits
# are a hash of (parameter, step, coordinate), so a resumed run repeats them, the global random
# state is untouched, and PyTorch (int64, which has no overflow here) and Triton (uint32) agree.
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


def round_stochastic(x: Tensor, seed: Tensor, first: int) -> Tensor:
    """Float32 `x` as bfloat16, up or down with the probability that makes it right on average."""
    index = torch.arange(first, first + x.numel(), device=x.device, dtype=torch.int64)
    noise = (mix(index ^ seed) & 0xFFFF).to(torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x == x, rounded, x).to(torch.bfloat16)  # the sum would overflow some NaNs


def write(target: Tensor, value: Tensor, ok: Tensor | None) -> None:
    """Stores `value` where the step is not skipped; `ok` None says that the caller has checked."""
    value = value.to(target.dtype)
    target.copy_(value if ok is None else torch.where(ok, value, target))


def step_torch(p, g, m, h, seed, first, ok, scale, *constants) -> Tensor:
    """`sophia_step` in place on flat tensors of any dtype; the count of coordinates not clipped."""
    new_p, new_m, unclipped = sophia_step(
        p.float(), scale * g.float(), m.float(), h.float(), *constants
    )
    write(p, new_p, ok)
    write(m, new_m if seed is None else round_stochastic(new_m, seed, first), ok)
    return unclipped.sum(dtype=torch.int32)  # on a CPU int64 and float32 are slower


def hessian_torch(p, g, m, h, seed, first, ok, scale, beta2) -> None:
    """`sophia_hessian` in place on flat tensors of any dtype."""
    new_h = sophia_hessian(scale * g.float(), h.float(), beta2)
    write(h, new_h if seed is None else round_stochastic(new_h, seed, first), ok)


if triton is not None:
    # A row of the table describes one parameter: the addresses of param, grad, exp_avg, hessian and
    # step, its element count, first block and number. `block_rows` gives the row of each block.
    # ALIGNED promises addresses and counts divisible by 16, so that an access is 128 bits wide.

    @triton.jit
    def locate(table_ptr, block_rows_ptr, scale, ALIGNED: tl.constexpr, BLOCK_SIZE: tl.constexpr):
        """The row of this block's parameter, its first element, how many remain (0 to skip)."""
        pid = tl.program_id(0)
        row_ptr = table_ptr + tl.load(block_rows_ptr + pid) * 8

        start = (pid - tl.load(row_ptr + 6)) * BLOCK_SIZE
        remaining = tl.where(scale - scale == 0, tl.load(row_ptr + 5) - start, 0)
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
    def mix_kernel(x):
        """`mix`, on uint32."""
        x = x + 0x1E3779B9
        x = (x ^ (x >> 16)) * 0x45D9F3B
        x = (x ^ (x >> 16)) * 0x45D9F3B
        return x ^ (x >> 16)

    @triton.jit
    def narrow(x, row_ptr, index, moment: tl.constexpr, DTYPE: tl.constexpr):
        """Float32 `x` in the moments' dtype: `round_stochastic` when that is bfloat16."""
        if DTYPE == tl.bfloat16:
            step = tl.load(tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32))).to(tl.uint32)
            stream = (tl.load(row_ptr + 7) * 2 + moment).to(tl.uint32)
            seed = mix_kernel(step ^ mix_kernel(stream))
            noise = (mix_kernel(index.to(tl.uint32) ^ seed) & 0xFFFF).to(tl.int32)
            rounded = (x.to(tl.int32, bitcast=True) + noise) & -0x10000
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
        return x.to(DTYPE)

    @triton.jit
    def step_kernel(
        table_ptr, block_rows_ptr, scale_ptr, unclipped_ptr,
        lr, weight_decay, beta1, rho_bs, eps,
        PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
        ALIGNED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ):  # fmt: skip
        """m = beta1 m + (1 - beta1) s g; p = p (1 - lr wd) - lr clip(m / max(rho bs h, eps), 1)."""
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

        m = beta1 * m + (1 - beta1) * (scale * g)
        bound = rho_bs * h  # bounds by comparison: unlike tl.maximum that lets a NaN through
        ratio = m / tl.where(bound < eps, eps, bound)
        update = tl.where(ratio > 1, 1.0, tl.where(ratio < -1, -1.0, ratio))
        p = p * (1 - lr * weight_decay) - lr * update
        unclipped = tl.sum(tl.where(mask, (tl.abs(ratio) < 1).to(tl.int32), 0))

        tl.store(p_ptrs, p.to(PARAM), mask=mask)
        tl.store(m_ptrs, narrow(m, row_ptr, start + offsets, 0, MOMENT), mask=mask)
        tl.store(unclipped_ptr + tl.program_id(0), unclipped)

    @triton.jit
    def hessian_kernel(
        table_ptr, block_rows_ptr, scale_ptr,
        beta2,
        GRAD: tl.constexpr, MOMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ):  # fmt: skip
        """h = beta2 h + (1 - beta2) (s g)^2."""
        scale = tl.load(scale_ptr)
        row_ptr, start, remaining = locate(table_ptr, block_rows_ptr, scale, ALIGNED, BLOCK_SIZE)
        offsets = tl.arange(0, BLOCK_SIZE)
        mask = offsets < remaining

        g_ptrs = pointers(row_ptr, 1, start, offsets, GRAD, ALIGNED)
        h_ptrs = pointers(row_ptr, 3, start, offsets, MOMENT, ALIGNED)
        g = scale * tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)

        h = beta2 * h + (1 - beta2) * g * g

        tl.store(h_ptrs, narrow(h, row_ptr, start + offsets, 1, MOMENT), mask=mask)

else:
    step_kernel = hessian_kernel = None


BLOCK_SIZE = 4096  # elements per Triton program
COMPILE_MODEL = 1 << 20  # elements from which "auto" compiles on a CPU; it costs seconds, once
COMPILE_TENSOR = 1 << 16  # smaller tensors are joined: a call costs more than their arithmetic
CHUNK = 1 << 15  # elements that eager PyTorch takes at a time on a CPU, to stay in its cache


@functools.cache
def compiled(function: Callable) -> Callable:
    """One graph per set of dtypes for all sizes; settings are tensors, so that none recompiles."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def flat(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as a vector (`.data`: no view metadata for the compiler)."""
    return tensor.as_strided((tensor.numel(),), (1,)).data


def as_scalar(value: float | Tensor | None, device: torch.device) -> Tensor:
    """A gradient scale as a float32 scalar on `device`, without waiting for the device."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, torch.float32, non_blocking=True)
    return torch.full((), 1.0 if value is None else value, dtype=torch.float32, device=device)


class Row(NamedTuple):
    """One parameter's tensors, dense and with equal strides, and its number in the optimizer."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    hessian: Tensor
    step: Tensor
    number: int


class Table(NamedTuple):
    """What the kernels read to find the parameters, and the list it was built from."""

    source: list[tuple[int, ...]]
    rows: Tensor  # (parameters, 8) int64
    block_rows: Tensor  # (blocks,) int32


class SophiaG(torch.optim.Optimizer):
    """Sophia with the Gauss-Newton-Bartlett estimator, arXiv 2305.14342, Algorithms 2 and 3.

    `bs` is the number of tokens whose mean loss `update_hessian`'s gradient averages (step's `bs`
    overrides it). `win_rate`, a scalar on the device, is the share of coordinates that the last
    step did not clip: NaN before the first, healthy at 0.1 to 0.5. With `state_dtype` bfloat16 the
    moments take half the memory and are rounded stochastically; rounding to nearest would stall,
    since a change under 0.2 to 0.4 % of a value is lost and `hessian` moves by 1 % of the gap.
    Parameters are rounded to nearest: keep them in float32. `backend` "auto" takes the fastest;
    "triton", "compile" (CPU) and "eager" force one. ValueError for impossible settings.
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
        state_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ):
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype = {state_dtype}: use torch.float32 or torch.bfloat16")
        if backend not in ("auto", "triton", "compile", "eager"):
            raise ValueError(f"backend = {backend!r}: use auto, triton, compile or eager")
        if backend == "triton" and triton is None:
            raise ValueError("backend = 'triton': install the package triton, or use 'auto'")
        self.state_dtype, self.backend = state_dtype, backend
        self.win_rate = torch.tensor(float("nan"))
        self._tables: dict[tuple, Table] = {}
        defaults = dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay)
        super().__init__(params, defaults | dict(eps=eps, maximize=maximize, bs=bs))

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

        counts, total = [], 0
        for group, key, rows in self._buckets():
            constants = dict(
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                beta1=float(group["betas"][0]),
                rho_bs=float(group["rho"] * (group["bs"] if bs is None else bs)),
                eps=float(group["eps"]),
            )
            scale = as_scalar(grad_scale, rows[0].param.device)
            scale = -scale if group["maximize"] else scale
            ok = scale.isfinite()
            torch._foreach_add_([row.step for row in rows], ok.float())
            unclipped = self._try_triton(step_kernel, key, rows, scale, constants)
            if unclipped is not None:
                counts.append(unclipped.sum())
            else:
                counts += self._run_torch(step_torch, rows, scale, ok, constants)
            torch.autograd.graph.increment_version([row.param for row in rows])
            total += sum(row.param.numel() for row in rows)
        if counts:
            rate = sum(count.to(counts[0].device) for count in counts) / total
            ok = as_scalar(grad_scale, rate.device).isfinite()
            self.win_rate = torch.where(ok, rate, self.win_rate.to(rate.device))
        return loss

    @torch.no_grad()
    def update_hessian(self, grad_scale: float | Tensor | None = None) -> None:
        """Averages the squared gradients, now those of the sampled-label loss, into the Hessian.

        `grad_scale` multiplies the gradients; if it is NaN or infinite nothing changes.
        """
        for group, key, rows in self._buckets():
            scale = as_scalar(grad_scale, rows[0].param.device)
            constants = dict(beta2=float(group["betas"][1]))
            if self._try_triton(hessian_kernel, key, rows, scale, constants) is None:
                self._run_torch(hessian_torch, rows, scale, scale.isfinite(), constants)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads `state_dict`, the moments in `state_dtype` (torch.optim takes the parameters')."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(numbers, params, strict=True):
            saved = state_dict["state"].get(number, {})
            for name in saved.keys() & {"exp_avg", "hessian"}:
                if saved[name].shape != p.shape:
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
        self._tables = {}
        for group in self.param_groups:
            for name in ("eps", "maximize", "bs"):  # the authors' groups lack some of them
                group.setdefault(name, self.defaults[name])
        for p, values in self.state.items():
            if "step" in values:  # in old states a number, of shape (1,), or on another device
                step = torch.full((), float(values["step"]), dtype=torch.float32, device=p.device)
                values["step"] = step

    def _row(self, p: Tensor, number: int) -> Row:
        """The tensors of one parameter; its state is created when missing."""
        grad, state = p.grad, self.state[p]
        floats = (torch.float32, torch.bfloat16, torch.float16)
        if p.dtype not in floats or grad.layout != torch.strided:
            raise ValueError(
                f"parameter {number} is {p.dtype}, its gradient {grad.layout}: SophiaG takes dense "
                "float32, bfloat16 and float16; convert it or give it to another optimizer"
            )
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in ("exp_avg", "hessian"):
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=self.state_dtype, requires_grad=False)
        m, h = state["exp_avg"], state["hessian"]
        # The moments are dense, in the parameter's order if it is dense too. Whatever has another
        # order is copied into theirs; `_buckets` brings the parameter back.
        if p.stride() != m.stride():
            p = torch.empty_like(m, dtype=p.dtype).copy_(p)
        if grad.stride() != m.stride():
            grad = torch.empty_like(m, dtype=grad.dtype).copy_(grad)
        return Row(p, grad, m, h, state["step"], number)

    def _buckets(self) -> Iterator[tuple[dict[str, Any], tuple, list[Row]]]:
        """Yields (group, key, rows): parameters of one group that can share a launch."""
        numbers = count()
        for index, group in enumerate(self.param_groups):
            buckets, copies = defaultdict(list), []
            for p in group["params"]:
                number = next(numbers)
                if p.grad is None or p.numel() == 0:
                    continue
                row = self._row(p, number)
                if row.param is not p:
                    copies.append((p, row.param))
                bits = p.numel()
                for tensor in row[:4]:
                    bits |= tensor.data_ptr()
                aligned = bits % 16 == 0
                buckets[index, p.device, p.dtype, row.grad.dtype, aligned].append(row)
            for key, rows in buckets.items():
                yield group, key, rows
            for p, copy in copies:
                p.copy_(copy)

    def _try_triton(self, kernel, key: tuple, rows: list[Row], *settings) -> Tensor | None:
        """`_run_triton` where it is wanted; None, and PyTorch from now on, if it cannot compile."""
        if self.backend == "triton":
            return self._run_triton(kernel, key, rows, *settings)
        if self.backend != "auto" or triton is None or not rows[0].param.is_cuda:
            return None
        try:
            return self._run_triton(kernel, key, rows, *settings)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, say: nothing has been launched or written
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            warnings.warn(f"SophiaG runs without Triton, slower: {reason}", stacklevel=4)
            self.backend = "eager"
            return None

    def _table(self, key: tuple, rows: list[Row]) -> Table:
        """The kernels' list of `rows`, sent to the device again only if an address has changed."""
        source = [(*(t.data_ptr() for t in row[:5]), row.param.numel(), row.number) for row in rows]
        old = self._tables.get(key)
        if old is not None and old.source == source:
            return old
        device = rows[0].param.device

        def send(values, dtype):  # from a new pinned buffer: the last one may still be in flight
            host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
            return host.to(device, non_blocking=True)

        blocks = [triton.cdiv(row.param.numel(), BLOCK_SIZE) for row in rows]
        firsts = accumulate(blocks, initial=0)
        table = [(*row[:6], first, row[6]) for row, first in zip(source, firsts, strict=False)]
        if old is not None and [row[5] for row in old.source] == [row[5] for row in source]:
            block_rows = old.block_rows
        else:
            block_rows = send(np.repeat(np.arange(len(rows)), blocks), torch.int32)
        self._tables[key] = Table(source, send(table, torch.int64), block_rows)
        return self._tables[key]

    def _run_triton(self, kernel, key: tuple, rows: list[Row], scale, constants: dict) -> Tensor:
        """Launches `kernel` once for all rows; what its blocks counted, if it is the step's."""
        table = self._table(key, rows)
        unclipped = torch.empty_like(table.block_rows)
        dtypes = dict(GRAD=rows[0].grad.dtype, MOMENT=rows[0].exp_avg.dtype)
        if kernel is step_kernel:
            constants = dict(unclipped_ptr=unclipped, **constants)
            dtypes["PARAM"] = rows[0].param.dtype
        with torch.cuda.device_of(rows[0].param):
            kernel[(unclipped.numel(),)](
                table_ptr=table.rows,
                block_rows_ptr=table.block_rows,
                scale_ptr=scale,
                **constants,
                **{name: getattr(tl, str(t).removeprefix("torch.")) for name, t in dtypes.items()},
                ALIGNED=key[-1],
                BLOCK_SIZE=BLOCK_SIZE,
                num_warps=8,
            )
        return unclipped

    def _run_torch(self, function, rows: list[Row], scale, ok, constants: dict) -> list[Tensor]:
        """Runs `function` over all rows, compiled where that pays; returns its results."""
        settings = (scale, *constants.values())
        on_cpu = scale.device.type == "cpu"
        if on_cpu:  # a check on the host costs nothing here
            if not ok:
                return []
            ok, settings = None, [float(value) for value in settings]
        total = sum(row.param.numel() for row in rows)
        wanted = self.backend == "compile" or self.backend == "auto" and total >= COMPILE_MODEL
        compiles = on_cpu and wanted
        scalars = [torch.tensor(value, dtype=torch.float64) for value in settings if compiles]

        def run(tensors: list[Tensor], seed: Tensor | None = None) -> list[Tensor]:
            size = tensors[0].numel()
            if compiles and size >= COMPILE_TENSOR and self.backend != "eager":
                try:
                    return [compiled(function)(*tensors, seed, 0, ok, *scalars)]
                except Exception as error:  # whatever the compiler raises, training goes on
                    reason = str(error).strip().partition("\n")[0]
                    warnings.warn(f"SophiaG runs uncompiled, slower: {reason}", stacklevel=4)
                    self.backend = "eager"
            chunk = CHUNK if on_cpu else size
            return [
                function(*(t[first : first + chunk] for t in tensors), seed, first, ok, *settings)
                for first in range(0, size, chunk)
            ]

        results, small = [], []
        for row in rows:
            tensors = [flat(t) for t in row[:4]]
            if row.exp_avg.dtype == torch.bfloat16:
                stream = 2 * row.number + (function is hessian_torch)
                results += run(tensors, rounding_seed(row.step, stream))
            elif tensors[0].numel() < COMPILE_TENSOR:
                small.append(tensors)
            else:
                results += run(tensors)
        if small:
            columns = list(zip(*small, strict=True))
            joined = [torch.cat(column) for column in columns]
            results += run(joined)
            for column, whole in zip(columns, joined, strict=True):
                torch._foreach_copy_(column, whole.split([t.numel() for t in column]))
        return results
