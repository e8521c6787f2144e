"""Where an optimizer's parameters lie, for kernels that update all of them in one launch.

    tables = ParameterTables()
    for group, bucket in tables.buckets(optimizer.param_groups, optimizer.state, prepare):
        kernel(bucket.table, bucket.block_rows, ...)

A row of a table describes one parameter in eight int64: the addresses of param, grad, exp_avg,
hessian and step, its element count, first block and number in the optimizer. `block_rows` gives the
row of each block of BLOCK_SIZE elements.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_SIZE = 2048  # elements of one Triton program, or of one turn of a CPU thread
STATE = ("exp_avg", "hessian", "step")


class Bucket:
    """Parameters of one group that a launch can take together, and the table of where they lie.

    `dtypes` are those of parameter, gradient and moments. `dense`: all four tensors of a parameter
    lie in memory without gaps and in the same order; without that there is no table. `aligned`:
    addresses and counts are divisible by 16, so that an access can be 128 bits wide.
    """

    def __init__(self, key: tuple, entries: list[tuple]):
        self.device, self.dtypes, self.dense, self.aligned = key
        self.params, self.states, self.numbers, rows = zip(*entries, strict=True)
        self.numel = sum(p.numel() for p in self.params)
        if self.dense:
            blocks = [-(-p.numel() // BLOCK_SIZE) for p in self.params]
            firsts = np.cumsum([0, *blocks[:-1]])
            self.rows = np.column_stack([np.array(rows), firsts, self.numbers])
            self.block_rows = self.send(np.repeat(np.arange(len(blocks), dtype=np.int32), blocks))
            self.table = self.send(self.rows)

    def send(self, values: np.ndarray) -> Tensor:
        """`values` on the device; in new memory there, since a kernel may still read the old."""
        host = torch.from_numpy(values)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def follow(self) -> bool:
        """Takes the addresses of new gradients; False if they are less aligned."""
        if self.dense:
            addresses = [p.grad.data_ptr() for p in self.params]
            if self.aligned and any(address % 16 for address in addresses):
                return False
            self.rows[:, 1] = addresses
            self.table = self.send(self.rows)
        return True


class ParameterTables:
    """The buckets of an optimizer's groups, made anew when something but a gradient has moved."""

    def __init__(self):
        self.plans: dict[int, tuple[tuple, list[int], list[Bucket]]] = {}

    def buckets(
        self, groups: list[dict[str, Any]], state: dict, prepare: Callable[[Tensor, int], dict]
    ) -> list[tuple[dict[str, Any], Bucket]]:
        """(group, bucket) for all parameters that have a gradient.

        `prepare` checks the parameter of a number and returns its state, complete.
        """
        found, first = [], 0
        for index, group in enumerate(groups):
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            layout = layout_of(params, grads, state)
            addresses = list(map(Tensor.data_ptr, grads)) if layout else []
            old_layout, old_addresses, buckets = self.plans.get(index, (None, [], []))
            kept = layout is not None and (first, *layout) == old_layout
            if kept and addresses != old_addresses:
                kept = all([bucket.follow() for bucket in buckets])
            if not kept:
                buckets = make_buckets(group["params"], first, prepare)
                layout = layout_of(params, grads, state)
                addresses = list(map(Tensor.data_ptr, grads))
            self.plans[index] = (first, *layout), addresses, buckets
            found += [(group, bucket) for bucket in buckets]
            first += len(group["params"])
        return found


def layout_of(params: list[Tensor], grads: list[Tensor], state: dict) -> tuple[list, ...] | None:
    """What buckets depend on, but for gradients' addresses; None if `prepare` has work to do.

    Every step looks at it: 0.15 ms for 170 parameters.
    """
    if [grad.layout for grad in grads] != [torch.strided] * len(grads):
        return None
    states = [state[p] for p in params]
    try:
        tensors = [state[name] for name in STATE for state in states]
    except KeyError:
        return None
    return (
        list(map(Tensor.data_ptr, params)),
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.numel, params)),
        list(map(Tensor.stride, params)),
        list(map(Tensor.stride, grads)),
        [p.dtype for p in params],
        [grad.dtype for grad in grads],
    )


def make_buckets(params: list[Tensor], first: int, prepare: Callable) -> list[Bucket]:
    """The parameters that have a gradient, in buckets; the number of params[0] is `first`."""
    buckets = defaultdict(list)
    for number, p in enumerate(params, first):
        if p.grad is None:
            continue
        state = prepare(p, number)
        if p.numel() == 0:
            continue
        m, h, step = (state[name] for name in STATE)
        tensors = [p, p.grad, m, h]
        dense = m.dtype == h.dtype
        dense &= all(t.stride() == m.stride() and t.shape == m.shape for t in tensors)
        row = [*(t.data_ptr() for t in (*tensors, step)), p.numel()]
        aligned = not any(row[i] % 16 for i in (0, 1, 2, 3, 5))
        key = p.device, (p.dtype, p.grad.dtype, m.dtype), dense, aligned
        buckets[key].append((p, state, number, row))
    return [Bucket(key, entries) for key, entries in buckets.items()]
