"""Result tables, their records in results.jsonl, and benchmarks/README.md made from the records.

A line of benchmarks/results.jsonl is one run: date, commit, command, hardware, versions, load,
measured limits and tables. The rows of a table are times (`record_times`) or values of any other
kind (`record_values`).
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import atomic_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.jsonl"
SECTIONS = ("train", "optimizer", "data", "decode")  # in the order of benchmarks/README.md
PACKAGES = (
    "torch triton numpy transformers tokenizers gigatoken tiktoken simpleai-sdk sophia-opt litgpt "
    "liger-kernel onnxruntime llama-cpp-python"
).split()
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
TIME_COLUMNS = ("median_s", "min_s", "max_s", "n", "ratio", "rate", "share")
HEAD = """# Benchmark results

Written by `python benchmark.py --readme` from [results.jsonl](results.jsonl), the newest record of
each table on each machine, and [learning.jsonl](learning.jsonl). Implementations of a table are
timed in turn in one process: median and range of the samples after a warm-up, speed relative to
the row with 1.00, and the share of this machine's limit, measured in the same run: FLOPs at the
rate of a large matrix product (the MFU), bytes at the bandwidth of a large copy (updates) or sum
(decoding). Above 100 %: several streams read faster than one copy, or the CPU's clock rose.
"""

tables: list[dict[str, Any]] = []  # of the current run, in order


def reset() -> None:
    """Forgets the tables of an earlier run."""
    tables.clear()


# Tables


def record_times(
    section: str,
    title: str,
    times: dict[str, list[float]],
    *,
    baseline: str | None = None,
    work: tuple[str, float | dict[str, float]] | None = None,
    bound: dict[str, float] | None = None,
    extra: dict[str, dict[str, float]] | None = None,
    left_out: dict[str, str] | None = None,
) -> None:
    """Prints and keeps a table of timings, seconds by name.

    `work` is a unit such as "tokens/s" and the amount of one call, of all or by name; `bound` the
    seconds below which a call cannot be on this machine, by name; `extra` more columns, by name;
    `baseline` the row that the others are compared with, by default the first; `left_out` the
    error of each implementation that has failed.
    """
    if baseline not in times:
        baseline = next(iter(times), None)
    unit, amount = work or ("", None)
    rows: dict[str, dict[str, float]] = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        row = {"median_s": median, "min_s": min(seconds), "max_s": max(seconds)}
        row |= {"n": len(seconds), "ratio": statistics.median(times[baseline]) / median}
        size = amount.get(name) if isinstance(amount, dict) else amount
        if size is not None:
            row["rate"] = size / median
        if bound and name in bound:
            row["share"] = bound[name] / median
        rows[name] = row | (extra or {}).get(name, {})
    table = {"section": section, "title": title, "baseline": baseline, "unit": unit, "rows": rows}
    keep(table | {"left_out": left_out or {}})


def record_values(section: str, title: str, values: dict[str, dict[str, float | str]]) -> None:
    """Prints and keeps a table of values that are no timings: name -> {column: value}."""
    keep({"section": section, "title": title, "values": values})


def keep(table: dict[str, Any]) -> None:
    tables.append(table)
    print(f"\n{table['section']}: {table['title']}\n{text_table(table_cells(table))}", flush=True)


def number_text(value: float | str | None) -> str:
    """Four digits, but all of those before the point; "-" for None and NaN."""
    if value is None or value != value:
        return "-"
    return value if isinstance(value, str) else f"{value:,.{4 if abs(value) < 1e4 else 15}g}"


def table_cells(table: dict[str, Any]) -> list[list[str]]:
    """The cells of a table, its header first, one number in each cell."""
    rows = table.get("rows") or table.get("values") or {}
    slowest = max((row.get("median_s", 1.0) for row in rows.values()), default=1.0)
    scale, unit = next((unit for unit in UNITS if slowest >= unit[0]), UNITS[-1])

    def cells(row: dict[str, Any]) -> dict[str, str]:
        texts = {}
        if "median_s" in row:
            texts[f"median {unit}"] = f"{row['median_s'] / scale:.4g}"
            texts["range"] = f"{row['min_s'] / scale:.4g}-{row['max_s'] / scale:.4g}"
            if table["unit"]:
                texts[table["unit"]] = number_text(row.get("rate"))
            texts["x as fast"] = f"{row['ratio']:.2f}"
            if "share" in row:
                texts["of limit"] = f"{row['share']:.0%}"
            row = {key: value for key, value in row.items() if key not in TIME_COLUMNS}
        return texts | {key: number_text(value) for key, value in row.items()}

    texts = {name: cells(row) for name, row in rows.items()}
    columns = list(dict.fromkeys(column for row in texts.values() for column in row))
    lines = [[name, *(row.get(column, "") for column in columns)] for name, row in texts.items()]
    return [["", *columns], *lines]


def text_table(cells: list[list[str]]) -> str:
    """Cells for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def markdown_table(cells: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" + "|---:" * (len(cells[0]) - 1) + "|", *lines[1:]])


# Records


def git(*arguments: str) -> str | None:
    """The output of a git command in this repository; None if it fails."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The CPU's name as reported by the system."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(argv: list[str], device: torch.device) -> dict[str, Any]:
    """The part of a record that is known before the first measurement."""
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
    # The files that a run or its write-up changes do not change what is measured.
    changes = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/*.jsonl", ":!*.md")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "changed": None if changes is None else bool(changes),
        "command": " ".join(["python benchmark.py", *argv]),
        "system": f"{platform.system()} {platform.machine()}",
        "hardware": hardware,
        "versions": versions,
        "variables": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_"))},
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line to a file of records, which is complete or as it was whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    with atomic_file(path) as file:
        file.write(before + json.dumps(record, allow_nan=False).encode() + b"\n")


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Floats with five digits, which is more than a measurement is worth; None for NaN."""
    return json.loads(
        json.dumps(record),
        parse_float=lambda text: float(f"{float(text):.5g}"),
        parse_constant=lambda name: None,
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, oldest first, none without the file; UserError for a damaged line."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(f"{path}, line {number} is no record: delete that line") from None
    return records


# benchmarks/README.md


def hardware_name(record: dict[str, Any]) -> str:
    """The hardware of a record in one line."""
    hardware = record["hardware"]
    return hardware["gpu"] or (
        f"{hardware['cpu']}, {hardware['threads']} of {hardware['cores']} cores"
    )


def newest_tables(records: list[dict[str, Any]]) -> dict[str, list[tuple[dict, dict]]]:
    """The newest (record, table) of each title, by hardware, in the order of SECTIONS."""
    newest: dict[str, dict[tuple[str, str], tuple[dict, dict]]] = {}
    for record in records:
        for table in record["tables"]:
            if table.get("rows") or table.get("values"):
                key = table["section"], table["title"]
                newest.setdefault(hardware_name(record), {})[key] = record, table
    return {
        hardware: sorted(by_key.values(), key=lambda pair: SECTIONS.index(pair[1]["section"]))
        for hardware, by_key in newest.items()
    }


def readme_text(records: list[dict[str, Any]], study: list[list[str]]) -> str:
    """benchmarks/README.md: the newest tables, and the cells of the learning study's table."""
    parts = [HEAD]
    for hardware, pairs in newest_tables(records).items():
        parts.append(f"## Speed: {hardware}\n")
        for record, table in pairs:
            commit = (record["commit"] or "none")[:7] + " with changes" * bool(record["changed"])
            parts += [
                f"**{table['section']}: {table['title']}**\n",
                markdown_table(table_cells(table)) + "\n",
                f"`{record['command']}`, {record['date'][:10]}, commit {commit}, torch "
                f"{record['versions']['torch']}, load before it {number_text(record['load'])}\n",
            ]
    if len(study) > 1:
        parts += [
            "## Learning per token\n",
            "`python -m benchmarks.learning`: nats per token of the same held-out text.\n",
            markdown_table(study) + "\n",
            "![curves](learning.png)\n",
        ]
    return "\n".join(parts)
