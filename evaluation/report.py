"""Tables, comparisons, records and pictures of evaluations."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_file
from evaluation import contamination, intervals
from evaluation.intervals import Difference, Estimate
from evaluation.runner import chance, estimate_of, item_values, metrics
from evaluation.tasks import Item, Task, bare

# Tasks of the mean; OpenBookQA's 500 items are too noisy for it.
CORE = (
    "arc_easy arc_challenge hellaswag piqa commonsense_qa social_iqa winogrande mmlu lambada"
).split()
CONTAMINATION_PARTS = ("all", "clean only", "dirty only", "all - clean")
LOWER_IS_BETTER = ("bits_per_byte", "gold_bits_per_byte")


@dataclass
class TaskResult:
    """The results of one model on one task."""

    task: Task
    results: list[Item]
    counts: dict[str, int]  # items with shots dropped, contexts cut, and left out
    metrics: dict[str, Estimate] = field(init=False)
    chance: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = metrics(self.task, self.results) if self.results else {}
        ids = {result["id"] for result in self.results}
        items = [item for item in self.task.items if item["id"] in ids]
        self.chance = chance(self.task, items) if items else None

    @property
    def primary(self) -> str:
        return next(iter(self.metrics), "")

    def record(self) -> dict[str, Any]:
        """As it stands in results.jsonl."""
        return {
            "kind": self.task.kind,
            "sha256": self.task.sha256,
            "items": len(self.results),
            **self.counts,
            "chance": self.chance,
            "metrics": {name: finite(estimate) for name, estimate in self.metrics.items()},
        }


def finite(estimate: Estimate) -> dict[str, Any]:
    """The fields of an estimate; an infinite one, which JSON does not have, is None."""
    fields = dataclasses.asdict(estimate).items()
    return {name: None if math.isinf(value) else value for name, value in fields}


def core_tasks(results: dict[str, TaskResult]) -> list[str]:
    return [name for name in CORE if name in results and results[name].metrics]


def core_mean(results: dict[str, TaskResult]) -> Estimate | None:
    """The unweighted mean of the primary metrics of the CORE tasks, where there are several."""
    found = [results[name].metrics[results[name].primary] for name in core_tasks(results)]
    return intervals.macro_mean(found) if len(found) > 1 else None


def number(value: float) -> str:
    return f"{value:.4f}"


def results_table(results: dict[str, TaskResult]) -> list[list[str]]:
    """Cells of the table of one model, its header first."""
    rows = [["", "metric", "value", "95 % interval", "chance", "items", "gold bits/byte", "cut"]]
    for name, result in results.items():
        if not result.metrics:
            n = f"{len(result.results):,}"
            rows.append([name, "", "", "", "", n, "", counts_text(result.counts)])
        for metric, e in result.metrics.items():
            if metric not in (result.primary, "acc", "acc_pmi", "strict", "flexible", "loose"):
                continue
            gold = result.metrics.get("gold_bits_per_byte")
            chance = result.chance if metric.startswith("acc") else None
            rows.append(
                [
                    name,
                    metric,
                    number(e.value),
                    f"{number(e.low)} to {number(e.high)}",
                    "" if chance is None else number(chance),
                    f"{e.n:,}",
                    f"{gold.value:.3f} ± {gold.high - gold.value:.3f}" if gold else "",
                    counts_text(result.counts),
                ]
            )
    if e := core_mean(results):
        interval = f"{number(e.low)} to {number(e.high)}"
        name = f"mean of {len(core_tasks(results))} of {len(CORE)} core tasks"
        rows.append([name, "", number(e.value), interval, "", f"{e.n:,}", "", ""])
    return rows


def counts_text(counts: dict[str, int]) -> str:
    """The counts of what did not fit the context, in words."""
    texts = [f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n]
    return ", ".join(texts)


def compare(
    first: dict[str, TaskResult], second: dict[str, TaskResult], names: tuple[str, str]
) -> dict[str, tuple[Difference, float, str]]:
    """Of each task that both have: the difference on their common items, Holm's p, a sentence.

    The metric is the primary one.
    """
    differences = {}
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        common = {r["id"] for r in a.results} & {r["id"] for r in b.results}
        if common and a.metrics:
            values = [
                item_values(x.task, [r for r in x.results if r["id"] in common]) for x in (a, b)
            ]
            (ours, clusters), (theirs, _) = values
            metric = a.primary
            pair = intervals.paired_ratios if isinstance(ours[metric], tuple) else intervals.paired
            differences[name] = pair(ours[metric], theirs[metric], clusters)
    names_in_order = [name for name in first if name in differences]
    adjusted = intervals.holm([differences[name].p_value for name in names_in_order] or [1.0])
    found = {}
    for name, p in zip(names_in_order, adjusted, strict=False):
        metric = first[name].primary
        sentence = intervals.verdict(
            differences[name], p, *names, lower_is_better=metric in LOWER_IS_BETTER
        )
        found[name] = differences[name], p, f"{name} ({metric}): {sentence}"
    return found


def contamination_items(task: Task, ids: set[str | int]) -> list[contamination.Item]:
    """Items of a task as they may stand in other text, without its template."""
    found = []
    for item in task.items:
        if item["id"] not in ids:
            continue
        gold = item.get("continuation", "")
        if task.kind == "choice":
            question, gold = item["context"], item["choices"][item["answer"]]
        elif task.kind == "schema":
            question = item["contexts"][item["answer"]]
        elif task.kind == "generated":
            question, gold = item["question"], item["answer"]
        else:
            question = item.get("context") or item.get("prompt") or item["text"]
        found.append(contamination.Item(str(item["id"]), bare(question), gold))
    return found


def contamination_table(
    results: dict[str, TaskResult], scans: dict[str, contamination.Report]
) -> list[list[str]]:
    """Cells of a table: how many items stand in the shards, and the scores with and without."""
    columns = ["items", "clean", "partly", "dirty", "too short", "with gold"]
    rows = [["", *columns, *CONTAMINATION_PARTS]]
    for name, scan in scans.items():
        held = [match.held for match in scan.matches].count("question and gold")
        counts = [len(scan.matches), *scan.counts().values(), held]
        parts = contamination_parts(results[name], scan)
        *texts, change = (parts.get(part) for part in CONTAMINATION_PARTS)
        texts = [
            f"{number(e.value)} ({number(e.low)} to {number(e.high)})" if e else "" for e in texts
        ]
        texts.append(f"{change.value:+.4f}" if change else "")
        if change:
            few = math.isinf(change.standard_error)
            texts[-1] += (
                " (too few items)" if few else f" ({change.low:+.4f} to {change.high:+.4f})"
            )
        rows.append([name, *(f"{count:,}" for count in counts), *texts])
    return rows


def contamination_parts(result: TaskResult, scan: contamination.Report) -> dict[str, Estimate]:
    """The primary metric of all items, of clean and dirty ones, and its change without the others.

    By CONTAMINATION_PARTS; what has no item is left out.
    """
    if not result.metrics:
        return {}
    status = {match.id: match.status for match in scan.matches}
    statuses = np.array([status.get(str(r["id"])) for r in result.results])
    values, clusters = item_values(result.task, result.results)
    value, parts = values[result.primary], [result.metrics[result.primary], None, None, None]
    for n, name in enumerate((contamination.CLEAN, contamination.DIRTY), 1):
        if (chosen := statuses == name).any():
            parts[n] = estimate_of(value, clusters, chosen)
    if parts[1]:
        pair = value if isinstance(value, tuple) else (value, np.ones(len(value)))
        parts[3] = intervals.without(*pair, statuses == contamination.CLEAN, clusters)
    return {name: e for name, e in zip(CONTAMINATION_PARTS, parts, strict=True) if e}


def contamination_record(
    results: dict[str, TaskResult], scans: dict[str, contamination.Report], data_dir: str
) -> dict[str, Any]:
    """The record of a scan: counts and scores of each task, and the matches of its items."""
    tokens = next(iter(scans.values())).tokens
    tasks = {}
    for name, scan in scans.items():
        found = [match for match in scan.matches if match.longest]
        parts = contamination_parts(results[name], scan).items()
        scores = {"scores": {part: finite(estimate) for part, estimate in parts}}
        found = {"found": [dataclasses.asdict(match) for match in found]}
        tasks[name] = scan.counts() | scores | found
    return {"data_dir": data_dir, "tokens": tokens, "tasks": tasks}


def draw(models: Sequence[tuple[str, int | None, dict[str, TaskResult]]], path: Path) -> None:
    """A picture: each task's primary metric with its interval and chance line, a mark a model.

    `models` are (name, step, results). Checkpoints of one folder are drawn over their steps, with a
    line for a model without one.
    """
    from matplotlib.figure import Figure

    tasks = [name for name, result in models[0][2].items() if result.metrics]
    stepped = {(Path(name).parent, step) for name, step, _ in models if step is not None}
    over_steps = len(stepped) > 1 and len({folder for folder, _ in stepped}) == 1
    n_columns = min(4, len(tasks)) or 1
    n_rows = math.ceil(len(tasks) / n_columns) or 1
    figure = Figure(figsize=(3.2 * n_columns, 2.6 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axes, task in zip(panels, tasks, strict=False):
        for number_, (name, step, results) in enumerate(models):
            if task not in results or not results[task].metrics:
                continue
            e = results[task].metrics[results[task].primary]
            error = np.array([[e.value - e.low], [e.high - e.value]])
            if over_steps and step is None:  # the baseline
                axes.axhline(e.value, color="C1", lw=1, label=name)
                continue
            at = step if over_steps else number_
            color = "C0" if over_steps else f"C{number_}"
            axes.errorbar(
                [at], [e.value], yerr=error, fmt="o", ms=4, capsize=3, color=color, label=name
            )
        result = models[0][2][task]
        if result.chance is not None and result.primary.startswith("acc"):
            axes.axhline(result.chance, color="0.5", ls="--", lw=1)
        axes.set_title(f"{task} ({result.primary})", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if over_steps:
            axes.set_xlabel("step", fontsize=8)
        else:
            axes.set_xticks([])
            axes.set_xlim(-0.6, len(models) - 0.4)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    if not over_steps:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=8)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=110, format="png")
