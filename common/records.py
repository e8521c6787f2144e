"""Records of measurements: lines of JSON with their date, commit, hardware and versions; tables."""

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
PACKAGES = (
    "torch triton numpy transformers tokenizers gigatoken tiktoken gguf lm_eval openai "
    "simpleai-sdk sophia-opt litgpt liger-kernel onnxruntime llama-cpp-python"
).split()


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


def environment(command: list[str], device: torch.device) -> dict[str, Any]:
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
        "command": " ".join(["python", *command]),
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
