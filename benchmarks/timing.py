"""Interleaved timing, hardware limits and optional packages for benchmark.py.

Implementations run in turn (A B A B ...), so that a machine that slows down slows all of them.
"""

import ctypes
import gc
import importlib
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from benchmarks.report import record_times

CPU = torch.device("cpu")
SHORTEST_SAMPLE = 0.02  # seconds: a shorter call is repeated within a sample


def free_memory(device: torch.device) -> None:
    """Releases unused memory: models and optimizers hold reference cycles.

    Back to the system too, where the C library can (glibc). A table that begins with the free
    memory of a larger one before it would not show the page faults that a training run pays for.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Limits:
    """Best measured rates of plain operations, each on data larger than the device's caches."""

    copy_bandwidth: float  # bytes/s, read and written, of a large Tensor.copy_
    read_bandwidth: float  # bytes/s of a large float32 sum
    matmul_rate: dict[str, float]  # FLOP/s by dtype: "float32" on a CPU, "bfloat16" on CUDA


@cache
def limits(device: torch.device) -> Limits:
    """The device's limits, measured at the first call; half a gigabyte, some seconds."""
    gpu = device.type == "cuda"
    n, width, dtype = (1 << 28, 8192, torch.bfloat16) if gpu else (1 << 26, 1536, torch.float32)
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)

    def best(function: Callable[[], object], rounds: int) -> float:
        function()
        return min(seconds_of(function, 4 if gpu else 1, device) for _ in range(rounds))

    return Limits(
        copy_bandwidth=2 * 4 * n / best(lambda: target.copy_(source), 20),
        read_bandwidth=4 * n / best(source.sum, 20),
        matmul_rate={str(dtype)[6:]: 2 * width**3 / best(lambda: torch.mm(a, b, out=product), 12)},
    )


def seconds_of(function: Callable[[], object], calls: int, device: torch.device = CPU) -> float:
    """Seconds of one call, the mean of `calls` in a row.

    On CUDA by events, from an idle device to the end of the last kernel, so the host's launch time
    counts where the device waits for it. Calls in a row find data that fits into the cache (50 MB
    of L2 on an H100) warm: functions that are meant to read memory need more than that.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - started) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / calls


def error_line(error: BaseException) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150]}" if lines else type(error).__name__


def compare(
    section: str,
    title: str,
    functions: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device = CPU,
    **columns: Any,
) -> dict[str, float]:
    """Times functions in turn and records their table; returns the median seconds of each.

    A first call of each, which may compile, is not counted. A function that raises is left out of
    the other rounds and of the table, with a line that says why. `columns`: see `record_times`.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls: dict[str, int] = {}
    left_out: dict[str, str] = {}

    def sample(name: str, turn: int) -> None:
        seconds = seconds_of(functions[name], calls.get(name, 1), device)
        if turn > 0 and name not in calls:  # the first counted call tells how many make a sample
            calls[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-9)))
            if calls[name] > 1:
                seconds = seconds_of(functions[name], calls[name], device)
        if turn > 0:
            times[name].append(seconds)

    for turn in range(rounds + 1):
        for name in list(times):
            try:
                sample(name, turn)
            except Exception as error:  # out of memory, no compiler, ...: the others go on
                left_out[name] = error_line(error)
                print(f"{name}: left out, {left_out[name]}", flush=True)
                del times[name]
            if name in left_out:  # after the except clause, which holds the frames and their memory
                free_memory(device)
    record_times(section, title, times, left_out=left_out, **columns)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


@cache
def peer(name: str) -> ModuleType | None:
    """An optional package, or None after one line that says how to install it."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken package may raise any kind, such as OSError
        missing = getattr(error, "name", None) in (name, name.partition(".")[0])
        reason = "is not installed" if missing else f"cannot be imported ({error_line(error)})"
        print(f"skipped: {name} {reason} (see requirements/bench.txt)", flush=True)
        return None
