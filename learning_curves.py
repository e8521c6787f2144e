"""The table and the picture of compare_learning.py, from the lines of its results."""

import json
import statistics
from pathlib import Path
from typing import Any

from contestants import ADAMW, CHANGES, MUON, ORIGINAL, SOPHIAG
from files import atomic_file


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

    def line(axes: Any, name: str, scale: float = 1.0, label: str = "", **style: Any) -> None:
        runs = runs_of.get(name)
        if not runs:
            return
        slots = [scale * point[0] / 1e6 for point in runs[0]["curve"]]
        losses = list(zip(*([point[1] for point in run["curve"]] for run in runs), strict=True))
        means = [statistics.fmean(values) for values in losses]
        (drawn,) = axes.plot(slots, means, label=label or f"{name} ({len(runs)} seeds)", **style)
        lowest, highest = [min(values) for values in losses], [max(values) for values in losses]
        axes.fill_between(slots, lowest, highest, color=drawn.get_color(), alpha=0.2, linewidth=0)

    line(left, SOPHIAG, color="C0")
    line(left, ORIGINAL, color="C3", label="the original's recipe, rate tuned")
    if ORIGINAL in times:
        line(
            left, ORIGINAL, relative_time(times, ORIGINAL), "... at equal time", color="C3", ls=":"
        )
    for number, name in enumerate(CHANGES, start=4):
        line(left, f"{SOPHIAG}, {name}", label=f"ours, but {name}", color=f"C{number}", ls="--")
    for number, name in enumerate((SOPHIAG, ADAMW, MUON)):
        line(right, name, color=f"C{number}")
    left.set(title="Recipes", ylabel="validation loss (nats per token)")
    right.set(title="Optimizers on our batches, each tuned")
    for axes in (left, right):
        axes.set(xlabel="million slots, padding included")
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=8)
    with atomic_file(picture) as file:
        figure.savefig(file, dpi=110, format="png")
