"""Table and picture of the learning study, from the lines of its results."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.learning_recipes import OPTIMIZERS, ORIGINAL, OURS, RECIPES
from common.files import atomic_file
from training.learning_rates import EMBEDDING, HIDDEN

SIZE = ("n_embd", "n_layers", "batch_size", "gradient_accumulation_steps", "block_size", "steps")


def of_one_size(lines: list[dict[str, Any]], size: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of runs whose settings have the values of `size`."""
    return [line for line in lines if size.items() <= line["settings"].items()]


def tables(lines: list[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """All tables of the study by their titles: the recipes at each size, the rates by size."""
    found = {}
    for size in dict.fromkeys(tuple(line["settings"][name] for name in SIZE) for line in lines):
        runs = of_one_size(lines, dict(zip(SIZE, size, strict=True)))
        if {run["settings"]["name"] for run in runs} - set(OPTIMIZERS):
            width, layers, batch, accumulation, block, steps = size
            title = f"{layers} layers of {width}, {steps} steps of {batch * accumulation * block:,}"
            found[f"{title} positions"] = study_table(runs)
    by_size = sizes_table(lines)
    return found | ({"Best rates of each optimizer by size": by_size} if len(by_size) > 1 else {})


def best_runs(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The seeds of each recipe at the settings that have most of them, then the lowest loss.

    Recipes in the order of their mean losses, the highest first.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        if None not in [loss for _, loss in line["curve"]]:
            settings = json.dumps(line["settings"] | {"seed": None}, sort_keys=True)
            groups.setdefault(line["settings"]["name"], {}).setdefault(settings, []).append(line)
    best = {
        name: min(by_settings.values(), key=lambda runs: (-len(runs), mean(runs, "loss")))
        for name, by_settings in groups.items()
    }
    return dict(sorted(best.items(), key=lambda item: -mean(item[1], "loss")))


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def study_table(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of the study's table, its header first; see report.py."""
    columns = ["", "rate", "embedding's", "rho", "seeds", "loss", "std", "bits per byte"]
    columns += ["loss of document starts", "labels/positions", "win rate"]
    rows, best = [columns + ["positions to the original's loss"]], best_runs(lines)
    goal = mean(best[ORIGINAL], "loss") if ORIGINAL in best else -math.inf
    for name, runs in best.items():
        settings, losses = runs[0]["settings"], [run["loss"] for run in runs]
        bits = [run["bits_per_byte"] for run in runs if "bits_per_byte" in run]
        rows.append(
            [
                name,
                f"{settings['learning_rate']:g}",
                f"{settings.get('embedding_learning_rate', 0) or settings['learning_rate']:g}",
                str(settings.get("rho", "")),
                str(len(runs)),
                f"{statistics.fmean(losses):.4f}",
                f"{statistics.stdev(losses):.4f}" if len(runs) > 1 else "",
                f"{statistics.fmean(bits):.4f}" if bits else "",
                f"{mean(runs, 'loss_of_document_starts'):.4f}",
                f"{mean(runs, 'labels') / runs[0]['curve'][-1][0]:.3f}",
                str(runs[0].get("win_rate", "")),
                positions_to(goal, runs),
            ]
        )
    return rows


def positions_to(goal: float, runs: list[dict[str, Any]]) -> str:
    """Positions at the first evaluation at which the mean loss of `runs` is at most `goal`."""
    points = zip(*(run["curve"] for run in runs), strict=True)
    reached = (
        f"{point[0][0]:,}"
        for point in points
        if statistics.fmean(loss for _, loss in point) <= goal
    )
    return next(reached, "")


def sizes_table(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of a table of the best rates by optimizer and size, beside those of the rule."""
    rows = [["", "width", "tokens a step", "steps", "runs", "best rates", "loss", "rule's", "loss"]]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for line in lines:
        settings = line["settings"]
        if settings["name"] in OPTIMIZERS and settings["seed"] == 0 and line["loss"] is not None:
            size = tuple(settings[name] for name in SIZE)
            groups.setdefault((settings["name"], *size), []).append(line)
    for (name, width, _, batch, accumulation, block, steps), runs in sorted(
        groups.items(), key=lambda item: item[0][1:]
    ):
        tokens = batch * accumulation * block
        optimizer = RECIPES[name].get("optimizer", "sophiag")
        rates = HIDDEN[optimizer], EMBEDDING
        rule = tuple(float(f"{rate.at(width, tokens):.3g}") for rate in rates)
        losses = {rates_of(run): run["loss"] for run in runs}
        runs = [run for run in runs if rates_of(run) != rule]  # those of the tuning
        if not runs:
            continue
        best = min(runs, key=lambda run: run["loss"])
        size = [f"{width}", f"{tokens:,}", f"{steps}", f"{len(runs)}"]
        at_rule = f"{losses[rule]:.3f}" if rule in losses else ""
        cells = ["{:g}, {:g}".format(*rates_of(best)), f"{best['loss']:.3f}"]
        rows.append([name, *size, *cells, "{:.3g}, {:.3g}".format(*rule), at_rule])
    return rows


def rates_of(run: dict[str, Any]) -> tuple[float, float]:
    return run["settings"]["learning_rate"], run["settings"]["embedding_learning_rate"]


def draw(lines: list[dict[str, Any]], picture: Path) -> None:
    """The learning curves: the mean over seeds in a band from lowest to highest.

    Recipes of one seed are left out where others have several.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, colors, best = figure.subplots(), colormaps["tab20"].colors, best_runs(lines)
    several = {name: runs for name, runs in best.items() if len(runs) > 1} or best
    for number, (name, runs) in enumerate(several.items()):
        tokens = [n / 1e6 for n, _ in runs[0]["curve"]]
        losses = list(zip(*([loss for _, loss in run["curve"]] for run in runs), strict=True))
        lows, highs = list(map(min, losses)), list(map(max, losses))
        label = f"{statistics.fmean(run['loss'] for run in runs):.2f} {name}"
        style = {"color": colors[2 * number % 20 + number // 10], "label": label}
        style |= {"color": "black", "lw": 2} if name == OURS else {}
        axes.plot(tokens, list(map(statistics.fmean, losses)), **style)
        axes.fill_between(tokens, lows, highs, color=style["color"], alpha=0.2, linewidth=0)
    axes.set(ylabel="validation loss (nats per token)")
    axes.set(xlabel="million token positions, padding included")
    axes.grid(alpha=0.3)
    n_seeds = max((len(runs) for runs in several.values()), default=0)
    title = f"last loss, {n_seeds} seed{'s' * (n_seeds > 1)}"
    figure.legend(title=title, fontsize=8, title_fontsize=8, loc="outside right upper")
    with atomic_file(picture) as file:
        figure.savefig(file, dpi=110, format="png")
