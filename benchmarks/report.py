"""What benchmark.py measured, kept: one JSON line a run, the README's table and a picture of it.

A line of benchmarks/results.jsonl says what was run (date, commit, command), where (hardware,
versions, load, measured limits) and every table: see `timing.report` and `timing.facts`.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from common.errors import UserError
from common.files import atomic_file, locked

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.jsonl"
PACKAGES = (
    "torch triton numpy transformers tokenizers gigatoken tiktoken simpleai-sdk sophia-opt litgpt "
    "liger-kernel onnxruntime llama-cpp-python"
).split()
KEYS = {"date", "commit", "changed", "command", "hardware", "load", "tables"}  # that are shown
START, END = "<!-- python benchmark.py --readme=True writes this -->", "<!-- end -->"

# A record


def git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def processor() -> str:
    """The CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load() -> float | None:
    """How many programs ran in the last minute, on average."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def environment(argv: list[str], device: torch.device) -> dict[str, Any]:
    """All of a record that is known before the first measurement."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware: dict[str, Any] = {"cpu": processor(), "cores": os.cpu_count()}
    hardware |= {"threads": torch.get_num_threads(), "gpu": None}
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
        versions["cuda"] = torch.version.cuda
    told = [argument for argument in argv if not argument.startswith(("--results=", "--save="))]
    # What a run or its write-up itself changes is no change of the code.
    changes = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks", ":!README.md")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "changed": None if changes is None else bool(changes),
        "command": " ".join(["python benchmark.py", *told]),
        "system": f"{platform.system()} {platform.machine()}",
        "hardware": hardware,
        "versions": versions,
        "load": load(),
    }


def record(
    path: Path, environment: dict[str, Any], seconds: dict[str, float], device: torch.device
) -> None:
    """Appends the run's tables as one line; the file is complete or as it was."""
    line = environment | {
        "limits": dataclasses.asdict(timing.limits(device)),
        "seconds": {section: round(taken, 1) for section, taken in seconds.items()},
        "absent": timing.skipped,
        "tables": timing.tables,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent, "benchmark", wait=True):
        before = path.read_bytes() if path.exists() else b""
        with atomic_file(path) as file:
            before += b"" if before.endswith(b"\n") or not before else b"\n"  # a line cut short
            file.write(before + json.dumps(rounded(line), allow_nan=False).encode() + b"\n")
    print(f"\nadded to {path}")


def rounded(value: Any) -> Any:
    """Five digits of every float, which is more than a measurement is worth; null for NaN."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def read(path: Path) -> list[dict[str, Any]]:
    """The records, oldest first; UserError that names a line which is none."""
    if not path.exists():
        raise UserError(f"{path} does not exist: run python benchmark.py first")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            assert KEYS <= record.keys() and isinstance(record["tables"], list)
        except (ValueError, AttributeError, AssertionError):
            raise UserError(f"{path}, line {number} is no record: delete that line") from None
        records.append(record)
    return records


# What is shown of them


def place(record: dict[str, Any]) -> str:
    """The hardware of a record in one line."""
    hardware = record["hardware"]
    if hardware["gpu"]:
        return hardware["gpu"]
    return f"{hardware['cpu']}, {hardware['threads']} of {hardware['cores']} cores"


def newest(records: Iterable[dict[str, Any]]) -> dict[str, list[tuple[dict, dict]]]:
    """Of every table, the newest (record, table) on each hardware, by hardware, in their order."""
    found: dict[str, dict[tuple[str, str], tuple[dict, dict]]] = {}
    for line in records:
        for table in line["tables"]:
            if table.get("rows") or table.get("facts"):
                key = table["section"], table["title"]
                found.setdefault(place(line), {})[key] = line, table
    sections = ("train", "optimizer", "data", "decode", "packing")

    def order(key: tuple[str, str]) -> tuple[int, str]:
        return sections.index(key[0]) if key[0] in sections else len(sections), key[0]

    return {
        where: [tables[key] for key in sorted(tables, key=order)] for where, tables in found.items()
    }


def is_ours(name: str) -> bool:
    return name.startswith("ours")


def cells(table: dict[str, Any]) -> tuple[str, str, str]:
    """Ours, the peers, and the share of the limit, each contestant on a line of its cell."""
    rows = table.get("rows") or table["facts"]

    def told(name: str, row: dict[str, Any]) -> str:
        name = name.removeprefix("ours").strip(", ") if is_ours(name) else name
        if "facts" in table:
            values = [f"{column} {timing.cell_text(value)}" for column, value in row.items()]
            return f"{name}: {'; '.join(values)}" if name else "; ".join(values)
        rate = f"{timing.rate_text(row['rate'])} {table['unit']}" if "rate" in row else ""
        text = f"{row['ratio']:.2f} ×" + (f" ({rate})" if rate else "")
        text = rate or f"{row['median_s']:.3g} s" if len(rows) == 1 else text
        return f"{name} {text}" if name else text

    alone = not any(map(is_ours, rows))  # facts of our own: there is nothing beside them
    ours = [told(name, row) for name, row in rows.items() if alone or is_ours(name)]
    peers = [told(name, row) for name, row in rows.items() if not (alone or is_ours(name))]
    shares = []
    if any("share" in row for row in table.get("rows", {}).values()):
        mine = [row for name, row in rows.items() if is_ours(name)]
        shares = [f"{row['share']:.0%}" if "share" in row else "–" for row in mine]
    return "<br>".join(ours), "<br>".join(peers), "<br>".join(shares)


def readme_table(records: list[dict[str, Any]]) -> str:
    """Markdown of the newest tables: a table for each run on each hardware."""
    parts = []
    for where, tables in newest(records).items():
        lines = [line for line, _ in tables]
        for line in sorted(records, key=lambda line: line["date"], reverse=True):
            if line not in lines:
                continue
            commit = (line["commit"] or "none")[:7] + (" with changes" if line["changed"] else "")
            run = f"**{where}**: `{line['command']}`, {line['date'][:10]}, commit {commit}"
            if line["load"] is not None:
                run += f", load of the machine before it {line['load']}"
            parts += [
                run,
                "",
                "| measured | ours | peers | ours, of the limit |",
                "|---|---|---|---|",
            ]
            for measured in (table for its, table in tables if its is line):
                row = (f"{measured['section']}: {measured['title']}", *cells(measured))
                parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
            parts.append("")
    return "\n".join(parts).rstrip() or "No run has been recorded yet."


def with_table(readme: str, table: str) -> str:
    """The README with what is between the two comments replaced."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"README.md has no place for the table: put in '{START}' and '{END}'")
    return f"{before}{START}\n\n{table}\n\n{END}{after}"


def write_readme(results: Path, readme: Path) -> None:
    text = with_table(readme.read_text("utf-8"), readme_table(read(results)))
    with atomic_file(readme) as file:
        file.write(text.encode())
    print(f"wrote {readme}")


def plot(results: Path, picture: Path) -> None:
    """Bars of every comparison's ratios, the newest of each, as `picture`."""
    from matplotlib.figure import Figure

    found = [
        (where, table)
        for where, tables in newest(read(results)).items()
        for _, table in tables
        if len(table.get("rows", ())) > 1
    ]
    if not found:
        raise UserError(f"{results} holds no comparison: run python benchmark.py first")
    heights = [len(table["rows"]) + 1.6 for _, table in found]
    figure = Figure(figsize=(10, 0.26 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(found), 1, height_ratios=heights)
    for (where, table), cell in zip(found, grid, strict=True):
        axes = figure.add_subplot(cell)
        names = list(table["rows"])[::-1]
        ratios = [table["rows"][name]["ratio"] for name in names]
        colors = ["tab:blue" if is_ours(name) else "0.72" for name in names]
        bars = axes.barh(names, ratios, color=colors)
        axes.bar_label(bars, [f"{ratio:.2f} ×" for ratio in ratios], padding=3, fontsize=8)
        axes.axvline(1, color="0.4", linewidth=0.8)
        axes.set_xlim(0, 1.12 * max(ratios))
        axes.set_title(f"{table['section']}: {table['title']}  ({where})", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("times as fast as the first of each", fontsize=9)
    with atomic_file(picture) as file:
        figure.savefig(file, format="png", dpi=110)
    print(f"wrote {picture}")
