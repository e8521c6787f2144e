"""Result tables, their records in results.jsonl, and benchmarks/README.md made from the records.

A line of benchmarks/results.jsonl is one run: date, commit, command, hardware, versions, load,
measured limits and tables. `rows` of a table has the columns of each implementation by name; those
of `timing.compare` are median_s, min_s, max_s, n, ratio, rate (in `unit`) and share (of the limit).
"""

from typing import Any

from common.records import markdown_table

SECTIONS = ("train", "optimizer", "data", "decode", "evaluate")  # in this order
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
