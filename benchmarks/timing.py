"""Interleaved timing, hardware limits and optional packages for benchmark.py.

Implementations run in turn (A B A B ...), so that a machine that slows down slows all of them.
"""

import ctypes
import gc
import importlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ops.cpp_build import native_library
from ops.huge_pages import use_huge_pages

CPU = torch.device("cpu")
SHORTEST_SAMPLE = 0.02  # seconds: a shorter call is repeated within a sample


def free_memory(device: torch.device) -> None:
    """Returns unused memory to the system: models and optimizers hold reference cycles.

    A table that begins with the free memory of a larger one before it would not show the page
    faults that a training run pays for.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@cache
def limits(device: torch.device) -> dict[str, float]:
    """Best rates of plain operations on data larger than the caches, measured at the first call.

    "copy_bandwidth" of Tensor.copy_ and "read_bandwidth" of the fastest of `reads`, in bytes/s;
    "matmul_rate" in FLOP/s, float32 on a CPU, bfloat16 on CUDA. One gigabyte, some seconds.
    """
    gpu = device.type == "cuda"
    n, width, dtype = (1 << 28, 8192, torch.bfloat16) if gpu else (1 << 27, 1536, torch.float32)
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)

    def best(function: Callable[[], object]) -> float:
        return min(seconds_of(function, 4 if gpu else 1, device) for _ in range(10))

    copy_bandwidth = 2 * 4 * n / best(lambda: target.copy_(source))
    return {
        "copy_bandwidth": copy_bandwidth,
        "read_bandwidth": 4 * n / min(map(best, reads(source))),
        "matmul_rate": 2 * width**3 / best(lambda: torch.mm(a, b, out=product)),
    }


def reads(source: torch.Tensor) -> list[Callable[[], object]]:
    """Ways to read a float32 tensor from end to end.

    Its sum; on a CPU with a C++ compiler also loops of several streams a thread, with and without
    prefetching, after its memory has moved to huge pages.
    """
    ways: list[Callable[[], object]] = [source.sum]
    flags = ("-fassociative-math", "-fno-signed-zeros")
    library = native_library(Path(__file__).with_name("read_memory.cpp"), *flags)
    if source.is_cpu and library:
        use_huge_pages([source])
        read, address = library.read_memory, ctypes.c_void_p(source.data_ptr())
        read.restype = ctypes.c_float
        for streams, ahead in itertools.product((1, 2, 4), (0, 2048)):
            numbers = (source.numel(), streams, ahead, torch.get_num_threads())
            ways.append(partial(read, address, *map(ctypes.c_int64, numbers)))
    return ways


def seconds_of(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of one call, the mean of `calls` in a row, from an idle device to its last kernel.

    Calls in a row find data that fits into the cache (50 MB of L2 on an H100) warm: functions that
    are meant to read memory need more than that.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - started) / calls


def error_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def compare(
    title: str,
    functions: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device = CPU,
    *,
    unit: str = "",
    amounts: dict[str, float] | None = None,
    bounds: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Times functions in turn; returns their table, in which the first row is the baseline.

    A first call of each, which may compile, is not counted. A function that raises is left out of
    the other rounds and of the table, with a line that says why. `amounts` is the work of a call,
    such as tokens for the unit "tokens/s", and `bounds` the least seconds that this machine's
    limits allow for a call, both by name.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls: dict[str, int] = {}
    for turn in range(rounds + 1):
        for name in list(times):
            function = functions[name]
            try:
                seconds = seconds_of(function, calls.get(name, 1), device)
                if turn == 1 and seconds < SHORTEST_SAMPLE:  # more calls, in later rounds too
                    calls[name] = math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-9))
                    seconds = seconds_of(function, calls[name], device)
                if turn > 0:
                    times[name].append(seconds)
            except Exception as error:  # out of memory, no compiler, ...: the others go on
                print(f"{name}: left out, {error_line(error)}", flush=True)
                del times[name]
            if name not in times:  # after the except clause, which holds the frames' memory
                free_memory(device)
    if not times:
        raise RuntimeError(f"{title}: no implementation could be timed")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = {}
    for name, seconds in times.items():
        row = {"median_s": medians[name], "min_s": min(seconds), "max_s": max(seconds)}
        row |= {"n": len(seconds), "ratio": next(iter(medians.values())) / medians[name]}
        if amounts:
            row["rate"] = amounts[name] / medians[name]
        if name in (bounds or {}):
            row["share"] = bounds[name] / medians[name]
        rows[name] = row
    return {"title": title, "unit": unit, "rows": rows}


@cache
def peer(name: str) -> ModuleType | None:
    """An optional package, or None after one line that says why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken package may raise any kind, such as OSError
        print(f"skipped: {error_line(error)} (see requirements/bench.txt)", flush=True)
        return None
