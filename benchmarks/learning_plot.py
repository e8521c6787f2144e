"""The table and the picture of benchmarks/learning.py, from the lines of its results."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning_recipes import ADAMW, CHANGES, MUON, ORIGINAL, SOPHIAG, TWO_RATES
from common.files import atomic_file


def best_runs(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The seeds of each contestant at the settings that have most of them, then the lowest loss."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        if "settings" in line and line["loss"] is not None:
            chosen = json.dumps(line["settings"] | {"seed": None}, sort_keys=True)
            groups.setdefault(line["settings"]["name"], {}).setdefault(chosen, []).append(line)
    return {
        name: min(by_settings.values(), key=lambda runs: (-len(runs), mean(runs, "loss")))
        for name, by_settings in groups.items()
    }


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def print_table(lines: list[dict[str, Any]]) -> None:
    times = next((x["seconds_of_ten_steps"] for x in lines if "seconds_of_ten_steps" in x), {})
    print(f"{'':34} rate    rho   seeds  loss     std     of starts  labels/slots  win rate  time")
    for name, runs in best_runs(lines).items():
        settings, losses = runs[0]["settings"], [run["loss"] for run in runs]
        std = f"{statistics.stdev(losses):.4f}" if len(runs) > 1 else ""
        filled = mean(runs, "labels") / runs[0]["curve"][-1][0]
        print(
            f"{name:34} {settings['learning_rate']:<7g} {settings.get('rho', ''):<5} {len(runs):<6}"
            f" {statistics.fmean(losses):.4f}   {std:7} {mean(runs, 'loss_of_document_starts'):.4f}"
            f"     {filled:.3f}         {runs[0].get('win_rate', ''):<8}"
            + (f"  {relative_time(times, name):.3f}" if name in times else "")
        )
    if ORIGINAL in times and ORIGINAL in best_runs(lines):
        ratio, runs = relative_time(times, ORIGINAL), best_runs(lines)[ORIGINAL]
        slots = [point[0] for point in runs[0]["curve"]]
        means = [statistics.fmean(losses) for losses in zip(*map(losses_of, runs), strict=True)]
        loss = np.interp(slots[-1] / ratio, slots, means)
        print(f"{ORIGINAL} in the time of {SOPHIAG}: {loss:.4f}, read from its curve")


def losses_of(run: dict[str, Any]) -> list[float]:
    return [loss for _, loss in run["curve"]]


def relative_time(times: dict[str, list[float]], name: str) -> float:
    """Time per slot of a contestant, that of SOPHIAG being 1."""
    return statistics.median(times[name]) / statistics.median(times[SOPHIAG])


def draw(lines: list[dict[str, Any]], picture: Path) -> None:
    """Two panels, recipes and optimizers: the mean over seeds in a band from lowest to highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    runs_of = best_runs(lines)
    times = next((x["seconds_of_ten_steps"] for x in lines if "seconds_of_ten_steps" in x), {})

    def line(axes: Any, name: str, color: str, note: str = "", scale: float = 1.0, ls: str = "-"):
        runs = runs_of.get(name)
        if not runs:
            return
        slots = [scale * point[0] / 1e6 for point in runs[0]["curve"]]
        losses = list(zip(*map(losses_of, runs), strict=True))
        seeds = f" ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        means = [statistics.fmean(values) for values in losses]
        axes.plot(slots, means, label=name + (note or seeds), color=color, ls=ls)
        if scale == 1:
            lows, highs = [min(values) for values in losses], [max(values) for values in losses]
            axes.fill_between(slots, lows, highs, color=color, alpha=0.2, linewidth=0)

    line(left, ORIGINAL, "C3")
    if ORIGINAL in times:
        ratio = relative_time(times, ORIGINAL)
        line(left, ORIGINAL, "C3", f", × {ratio:.2f}: at our time", scale=ratio, ls=":")
    for base, color, others in ((SOPHIAG, "C0", "C9"), (ADAMW, "C1", "C5")):
        line(left, base, color)
        for name, style in zip(CHANGES, ("--", "-.", ":", (0, (1, 3)), (0, (5, 5))), strict=True):
            line(left, f"{base}, {name}", others, ls=style)
    for name, color in ((SOPHIAG, "C0"), (ADAMW, "C1"), (TWO_RATES, "C4"), (MUON, "C2")):
        line(right, name, color)
    left.set(title="The original's recipe and ours", ylabel="validation loss (nats per token)")
    right.set(title="Optimizers on our batches, each tuned")
    for axes in (left, right):
        axes.set(xlabel="million slots, padding included")
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=8)
    with atomic_file(picture) as file:
        figure.savefig(file, dpi=110, format="png")
