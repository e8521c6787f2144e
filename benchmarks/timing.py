"""Timing of things side by side: the one clock, table and set of physical limits of benchmark.py.

Contestants run in turn (A B A B ...), so that a machine that slows down slows all of them. Each
table that is printed is kept in `tables`, from which benchmarks/report.py writes its record.
"""

import ctypes
import gc
import importlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

CPU = torch.device("cpu")
SHORTEST_SAMPLE = 0.02  # seconds: a shorter call is repeated within a sample
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))

tables: list[dict[str, Any]] = []  # what has been measured since begin(), in order
skipped: dict[str, str] = {}  # optional packages that were looked for in vain, and why


def free(device: torch.device) -> None:
    """Gives back the memory of what is no longer used: models and optimizers refer in circles.

    Back to the system too, where the C library can (glibc). A table that begins with the free
    memory of a larger one before it would not show the page faults that a training run pays for.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def begin() -> None:
    """Forgets the tables of an earlier run."""
    tables.clear()
    skipped.clear()


# Physical limits


@dataclass(frozen=True)
class Limits:
    """The best that this device showed in plain operations, each on data larger than its caches."""

    copy_bandwidth: float  # bytes/s, read and written, of a large Tensor.copy_
    read_bandwidth: float  # bytes/s of a large float32 sum
    matmul_rate: dict[str, float]  # FLOP/s by dtype: "float32" on a CPU, "bfloat16" on CUDA


def limits(device: torch.device = CPU) -> Limits:
    """Measures the device the first time it is asked about; half a gigabyte, some seconds."""
    return measured_limits(device)


@cache
def measured_limits(device: torch.device) -> Limits:
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


# Timing


def seconds_of(function: Callable[[], object], calls: int, device: torch.device = CPU) -> float:
    """Seconds of one call, the mean of `calls` in a row.

    On CUDA by events, from an idle device to the end of the last kernel, so what the host takes to
    launch counts where the device waits for it. Calls in a row find data that fits into the cache
    (50 MB of L2 on an H100) warm: contestants that are meant to read memory need more than that.
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


def waits(
    items: Iterator, use: Callable[[Any], object], device: torch.device = CPU, skipped: int = 0
) -> tuple[list[float], list[float]]:
    """Seconds until each item was there, and until it was used too, without the first `skipped`.

    The device has finished each use before the next item is asked for.
    """
    waited, whole = [], []
    while True:
        started = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return waited[skipped:], whole[skipped:]
        waited.append(time.perf_counter() - started)
        use(item)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        whole.append(time.perf_counter() - started)


def reason_of(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150]}" if lines else type(error).__name__


def compare(
    section: str,
    title: str,
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device = CPU,
    *,
    baseline: str | None = None,
    work: tuple[str, float | dict[str, float]] | None = None,
    bound: dict[str, float] | None = None,
) -> dict[str, float]:
    """Times the contestants in turn, prints their table, returns each one's median in seconds.

    A first call of each, which may compile, is not counted. One whose call raises is left out of
    the rest and of the table, with a line that says why. `baseline` (or else the first) is what the
    others are compared with. `work`: a unit such as "tokens/s" and the amount of one call, of all
    or by name. `bound`: seconds below which a call cannot be on this machine, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    calls: dict[str, int] = {}
    left_out: dict[str, str] = {}

    def sample(name: str, turn: int) -> None:
        seconds = seconds_of(contestants[name], calls.get(name, 1), device)
        if turn > 0 and name not in calls:  # the first counted call tells how many make a sample
            calls[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-9)))
            if calls[name] > 1:
                seconds = seconds_of(contestants[name], calls[name], device)
        if turn > 0:
            times[name].append(seconds)

    for turn in range(rounds + 1):
        for name in list(times):
            try:
                sample(name, turn)
            except Exception as error:  # out of memory, no compiler, ...: the others go on
                left_out[name] = reason_of(error)
                print(f"{name}: left out, {left_out[name]}", flush=True)
                del times[name]
            if name in left_out:  # and now that its frames are gone, so can be its memory
                free(device)
    report(section, title, times, baseline=baseline, work=work, bound=bound, left_out=left_out)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def report(
    section: str,
    title: str,
    times: dict[str, list[float]],
    *,
    baseline: str | None = None,
    work: tuple[str, float | dict[str, float]] | None = None,
    bound: dict[str, float] | None = None,
    left_out: dict[str, str] | None = None,
) -> None:
    """Prints and keeps the table of these samples, seconds by contestant; see `compare`.

    Of each: median, range, rate, how many times as fast as the baseline (the ratio of the medians,
    and the range of the ratios of one round each), share of the limit.
    """
    if baseline not in times:
        baseline = next(iter(times), None)
    unit, amount = work or ("", None)
    rows: dict[str, dict[str, float]] = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        row = {"median_s": median, "min_s": min(seconds), "max_s": max(seconds)}
        row["n"] = len(seconds)
        row["ratio"] = statistics.median(times[baseline]) / median
        by_round = [a / b for a, b in zip(times[baseline], seconds, strict=False)]
        row["min_ratio"], row["max_ratio"] = min(by_round), max(by_round)
        done = amount.get(name) if isinstance(amount, dict) else amount
        if done is not None:
            row["rate"] = done / median
        if bound and name in bound:
            row["share"] = bound[name] / median
        rows[name] = row
    table = {"section": section, "title": title, "baseline": baseline, "unit": unit, "rows": rows}
    tables.append(table | {"left_out": left_out or {}})
    print("\n" + table_text(table), flush=True)


def rate_text(rate: float) -> str:
    """Four digits, but all of those before the point."""
    return f"{rate:,.0f}" if rate >= 1e4 else f"{rate:.4g}"


def table_text(table: dict[str, Any]) -> str:
    """The table of one comparison, for people; at most 100 columns where names are short."""
    rows = table["rows"]
    if not rows:
        return f"{table['section']}: {table['title']}\nnothing could be measured"
    scale, unit = next(
        (u for u in UNITS if max(row["median_s"] for row in rows.values()) >= u[0]), UNITS[-1]
    )
    width = max(30, *map(len, rows))
    head = f"{'':{width}} median {unit:2} {'range':15}"
    head += f" {table['unit']:>10}" if table["unit"] else ""
    head += " x as fast [range]"
    head += "   of limit" if any("share" in row for row in rows.values()) else ""
    lines = [f"{table['section']}: {table['title']}", head]
    for name, row in rows.items():
        spread = f"{row['min_s'] / scale:.4g}-{row['max_s'] / scale:.4g}"
        line = f"{name:{width}} {row['median_s'] / scale:9.4g} {spread:15}"
        if table["unit"]:
            line += f" {rate_text(row['rate']) if 'rate' in row else '':>10}"
        if name == table["baseline"]:
            line += f" {1:9.2f} {'':12}"
        else:
            line += f" {row['ratio']:9.2f} [{row['min_ratio']:.2f}-{row['max_ratio']:.2f}]"
        line += f" {row['share']:7.0%}" if "share" in row else ""
        lines.append(line.rstrip())
    return "\n".join(lines)


def cell_text(value: float | str | None) -> str:
    if value is None or value != value:
        return "-"
    return value if isinstance(value, str) else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def facts(section: str, title: str, rows: dict[str, dict[str, float | str]]) -> None:
    """Prints and keeps what is not a time: name -> {column: value}."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(30, *map(len, rows))
    print(f"\n{section}: {title}\n{'':{width}} " + " ".join(f"{c:>16}" for c in columns))
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        print(f"{name:{width}} " + " ".join(f"{cell_text(cell):>16}" for cell in cells))
    tables.append({"section": section, "title": title, "facts": rows})


# Peers


def peer(name: str) -> ModuleType | None:
    """An optional package, or None and, once, a note how to install it."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken package may raise any kind, such as OSError
        if name.partition(".")[0] not in skipped:
            missing = getattr(error, "name", None) in (name, name.partition(".")[0])
            why = "is not installed" if missing else f"cannot be imported ({reason_of(error)})"
            skipped[name.partition(".")[0]] = why
            print(f"skipped: {name} {why} (see requirements/bench.txt)", flush=True)
        return None
