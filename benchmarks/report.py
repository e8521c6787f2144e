"""Result tables, their records in results.jsonl, and benchmarks/README.md made from the records.

A line of benchmarks/results.jsonl is one run: date, commit, command, hardware, versions, load,
measured limits and tables. `rows` of a table has the columns of each implementation by name; those
of `timing.compare` are median_s, min_s, max_s, n, ratio, rate (in `unit`) and share (of the limit).
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import atomic_file

ROOT = Path(__file__).parents[1]
SECTIONS = ("train", "optimizer", "data", "decode")  # in the order of benchmarks/README.md
PACKAGES = (
    "torch triton numpy transformers tokenizers gigatoken tiktoken simpleai-sdk sophia-opt litgpt "
    "liger-kernel onnxruntime llama-cpp-python"
).split()
HEAD = """# Benchmark results

Written by `python benchmark.py --readme` from [results.jsonl](results.jsonl), the newest record of
each table on each machine, and [learning.jsonl](learning.jsonl). Implementations of a table are
timed in turn in one process: median and range of the samples after a warm-up, speed relative to
the row with 1.00, and the share of this machine's limit, measured in the same run: FLOPs at the
rate of a large matrix product (the MFU), bytes at the bandwidth of a large copy (updates) or sum
(decoding). Above 100 %: several streams read faster than one copy, or the CPU's clock rose.
"""


def number_text(value: float | None) -> str:
    """Four digits, but all of those before the point."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"


def table_cells(table: dict[str, Any]) -> list[list[str]]:
    """The cells of a table, its header first."""
    rows = table["rows"]
    slowest = max(row.get("median_s", 1.0) for row in rows.values())
    scale, unit = (1.0, "s") if slowest >= 1 else (1e-3, "ms")
    texts = {}
    for name, row in rows.items():
        others = dict(row)
        cells = texts[name] = {}
        if "median_s" in row:
            median, low, high = (others.pop(key) / scale for key in ("median_s", "min_s", "max_s"))
            cells[f"median {unit}"], cells["range"] = f"{median:.4g}", f"{low:.4g}-{high:.4g}"
            if "rate" in row:
                cells[table["unit"]] = number_text(others.pop("rate"))
            cells["x as fast"] = f"{others.pop('ratio'):.2f}"
            if "share" in row:
                cells["of limit"] = f"{others.pop('share'):.0%}"
            del others["n"]
        cells |= {column: number_text(value) for column, value in others.items()}
    columns = list(dict.fromkeys(column for cells in texts.values() for column in cells))
    lines = [[name, *(cells.get(c, "") for c in columns)] for name, cells in texts.items()]
    return [["", *columns], *lines]


def markdown_table(cells: list[list[str]]) -> str:
    """Cells as Markdown, with aligned columns so that it is also readable in a terminal."""
    first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *values in cells:
        numbers = [value.rjust(width) for value, width in zip(values, others, strict=True)]
        lines.append("| " + " | ".join([name.ljust(first), *numbers]) + " |")
    rule = "|".join(["", "-" * (first + 2), *("-" * (width + 1) + ":" for width in others), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def git(*arguments: str) -> str | None:
    """The output of a git command in this repository; None if it fails."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The CPU's name as reported by the system."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(argv: list[str], device: torch.device) -> dict[str, Any]:
    """The part of a record that is known before the first measurement."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
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
        "changed": bool(changes),
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
    content = path.read_bytes() if path.exists() else b""
    with atomic_file(path) as file:
        file.write(content + json.dumps(record).encode() + b"\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, oldest first; none without the file. UserError for a damaged line."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number} is no record: delete that line") from None
    return records


def hardware_name(record: dict[str, Any]) -> str:
    """The hardware of a record in one line."""
    hardware = record["hardware"]
    cpu = f"{hardware['cpu']}, {hardware['threads']} of {hardware['cores']} cores"
    return hardware["gpu"] or cpu


def readme_text(records: list[dict[str, Any]], study: dict[str, list[list[str]]]) -> str:
    """benchmarks/README.md: the newest tables, and the learning study's cells by title."""
    newest: dict[str, dict[tuple[int, str], tuple[dict, dict]]] = {}
    for record in records:
        tables = newest.setdefault(hardware_name(record), {})
        for table in record["tables"]:
            tables[SECTIONS.index(table["section"]), table["title"]] = record, table
    parts = [HEAD]
    for hardware, tables in newest.items():
        parts.append(f"## Speed: {hardware}\n")
        for _, (record, table) in sorted(tables.items()):
            commit = (record["commit"] or "none")[:7] + " with changes" * record["changed"]
            parts += [
                f"**{table['section']}: {table['title']}**\n",
                markdown_table(table_cells(table)) + "\n",
                f"`{record['command']}`, {record['date'][:10]}, commit {commit}, torch "
                f"{record['versions']['torch']}, load before it {number_text(record['load'])}\n",
            ]
    if study:
        parts += [
            "## Learning per token\n",
            "`python -m benchmarks.learning`: nats per token of the same held-out text. Rates are "
            "those of the hidden matrices, then of the embedding.\n",
            "![curves](learning.png)\n",
        ]
    for title, cells in study.items():
        parts += [f"**{title}**\n", markdown_table(cells) + "\n"]
    return "\n".join(parts)
