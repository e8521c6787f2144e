"""Table and picture of the learning study, from the lines of its results."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.learning_recipes import ADAMW, MUON, SOPHIAG, SOPHIAG_TWO_RATES, TWO_RATES
from common.files import atomic_file


def best_runs(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The seeds of each recipe at the settings that have most of them, then the lowest loss."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        if line["loss"] is not None:
            settings = json.dumps(line["settings"] | {"seed": None}, sort_keys=True)
            groups.setdefault(line["settings"]["name"], {}).setdefault(settings, []).append(line)
    return {
        name: min(by_settings.values(), key=lambda runs: (-len(runs), mean(runs, "loss")))
        for name, by_settings in groups.items()
    }


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def study_table(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of the study's table, its header first; see report.py."""
    columns = ["", "rate", "rho", "seeds", "loss", "std", "loss of document starts"]
    rows = [columns + ["labels/positions", "win rate"]]
    for name, runs in best_runs(lines).items():
        settings, losses = runs[0]["settings"], [run["loss"] for run in runs]
        rows.append(
            [
                name,
                f"{settings['learning_rate']:g}",
                str(settings.get("rho", "")),
                str(len(runs)),
                f"{statistics.fmean(losses):.4f}",
                f"{statistics.stdev(losses):.4f}" if len(runs) > 1 else "",
                f"{mean(runs, 'loss_of_document_starts'):.4f}",
                f"{mean(runs, 'labels') / runs[0]['curve'][-1][0]:.3f}",
                str(runs[0].get("win_rate", "")),
            ]
        )
    return rows


def draw(lines: list[dict[str, Any]], picture: Path) -> None:
    """Two panels, recipes and optimizers: the mean over seeds in a band from lowest to highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, runs) in enumerate(best_runs(lines).items()):
        panels = [left, right] if name in (SOPHIAG, ADAMW) else [left]
        panels = [right] if name in (MUON, TWO_RATES, SOPHIAG_TWO_RATES) else panels
        tokens = [n / 1e6 for n, _ in runs[0]["curve"]]
        losses = list(zip(*([loss for _, loss in run["curve"]] for run in runs), strict=True))
        lows, highs = list(map(min, losses)), list(map(max, losses))
        label = f"{name} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        style = {"color": f"C{number}", "ls": "-" if len(runs) > 1 else "--", "label": label}
        for axes in panels:
            axes.plot(tokens, list(map(statistics.fmean, losses)), **style)
            axes.fill_between(tokens, lows, highs, color=style["color"], alpha=0.2, linewidth=0)
    left.set(title="The original's recipe and ours", ylabel="validation loss (nats per token)")
    right.set(title="Optimizers on our batches")
    for axes in (left, right):
        axes.set(xlabel="million token positions, padding included")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with atomic_file(picture) as file:
        figure.savefig(file, dpi=110, format="png")
