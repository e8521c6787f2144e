"""Table and picture of the learning study, from the lines of its results."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning_recipes import ADAMW, CHANGES, MUON, ORIGINAL, SOPHIAG, TWO_RATES
from common.files import atomic_file


def best_runs(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The seeds of each recipe at the settings that have most of them, then the lowest loss."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        if "settings" in line and line["loss"] is not None:
            settings = json.dumps(line["settings"] | {"seed": None}, sort_keys=True)
            groups.setdefault(line["settings"]["name"], {}).setdefault(settings, []).append(line)
    return {
        name: min(by_settings.values(), key=lambda runs: (-len(runs), mean(runs, "loss")))
        for name, by_settings in groups.items()
    }


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def curve_losses(run: dict[str, Any]) -> list[float]:
    return [loss for _, loss in run["curve"]]


def relative_times(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Time per token of each timed recipe, that of SOPHIAG being 1."""
    times = next((x["seconds_of_ten_steps"] for x in lines if "seconds_of_ten_steps" in x), {})
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {name: seconds / medians[SOPHIAG] for name, seconds in medians.items()}


def study_table(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of the study's table, its header first; see report.py."""
    runs_of, times = best_runs(lines), relative_times(lines)
    columns = ["", "rate", "rho", "seeds", "loss", "std", "loss of document starts"]
    rows = [columns + ["labels/positions", "win rate", "time"]]
    for name, runs in runs_of.items():
        settings, losses = runs[0]["settings"], [run["loss"] for run in runs]
        rows.append([name, f"{settings['learning_rate']:g}", str(settings.get("rho", ""))])
        rows[-1] += [str(len(runs)), f"{statistics.fmean(losses):.4f}"]
        rows[-1] += [f"{statistics.stdev(losses):.4f}" if len(runs) > 1 else ""]
        rows[-1] += [f"{mean(runs, 'loss_of_document_starts'):.4f}"]
        rows[-1] += [f"{mean(runs, 'labels') / runs[0]['curve'][-1][0]:.3f}"]
        rows[-1] += [str(runs[0].get("win_rate", ""))]
        rows[-1] += [f"{times[name]:.3f}" if name in times else ""]
    if ORIGINAL in times and ORIGINAL in runs_of:  # read from its curve
        tokens = [point[0] for point in runs_of[ORIGINAL][0]["curve"]]
        curves = zip(*map(curve_losses, runs_of[ORIGINAL]), strict=True)
        loss = np.interp(tokens[-1] / times[ORIGINAL], tokens, list(map(statistics.fmean, curves)))
        row = [f"{ORIGINAL}, in the time of {SOPHIAG}", "", "", "", f"{loss:.4f}"]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


def draw(lines: list[dict[str, Any]], picture: Path) -> None:
    """Two panels, recipes and optimizers: the mean over seeds in a band from lowest to highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    runs_of, times = best_runs(lines), relative_times(lines)

    def line(axes: Any, name: str, color: str, note: str = "", scale: float = 1.0, ls: str = "-"):
        runs = runs_of.get(name)
        if not runs:
            return
        tokens = [scale * point[0] / 1e6 for point in runs[0]["curve"]]
        losses = list(zip(*map(curve_losses, runs), strict=True))
        seeds = f" ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        means = [statistics.fmean(values) for values in losses]
        axes.plot(tokens, means, label=name + (note or seeds), color=color, ls=ls)
        if scale == 1:
            lows, highs = [min(values) for values in losses], [max(values) for values in losses]
            axes.fill_between(tokens, lows, highs, color=color, alpha=0.2, linewidth=0)

    line(left, ORIGINAL, "C3")
    if ratio := times.get(ORIGINAL):
        line(left, ORIGINAL, "C3", f", × {ratio:.2f}: at our time", scale=ratio, ls=":")
    for base, color, light in ((SOPHIAG, "C0", "C9"), (ADAMW, "C1", "C5")):
        line(left, base, color)
        for name, style in zip(CHANGES, ("--", "-.", ":", (0, (1, 3)), (0, (5, 5))), strict=True):
            line(left, f"{base}, {name}", light, ls=style)
    for name, color in ((SOPHIAG, "C0"), (ADAMW, "C1"), (TWO_RATES, "C4"), (MUON, "C2")):
        line(right, name, color)
    left.set(title="The original's recipe and ours", ylabel="validation loss (nats per token)")
    right.set(title="Optimizers on our batches, each tuned")
    for axes in (left, right):
        axes.set(xlabel="million token positions, padding included")
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=8)
    with atomic_file(picture) as file:
        figure.savefig(file, dpi=110, format="png")
