"""benchmark.py: the clock and its table, the sections at tiny sizes, the record, the README."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmark
from benchmarks import report, timing, tokenizing
from benchmarks.packing import use_of_slots
from common.errors import UserError
from training.packing import PackedRows

ROOT = Path(__file__).resolve().parents[1]
TINY = "--n_layers=2 --n_embd=64 --n_heads=2 --n_kv_heads=1 --block_size=64 --new_tokens=6".split()
TINY += "--rounds=1 --repeats=1 --n_documents=300 --n_planned=3000 --device=cpu".split()


@pytest.fixture(autouse=True)
def fresh():
    timing.begin()


class Clock:
    """A clock for benchmarks/timing.py that only contestants move on."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def takes(self, name: str, *seconds: float):
        """A contestant whose calls take these times in turn, the last of them from then on."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def broken() -> None:
    raise RuntimeError("no compiler\nand more")


def test_contestants_run_in_turn_and_ratios_say_how_many_times_as_fast(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    contestants = {
        "slow": clock.takes("slow", 9.0, 2.0, 6.0, 4.0),  # the first call compiles
        "broken": broken,
        "ours": clock.takes("ours", 5.0, 1.0, 2.0, 0.5),
    }
    work = ("naps/s", {"slow": 8, "ours": 3})
    medians = timing.compare("decode", "naps", contestants, 3, work=work, bound={"ours": 0.25})
    assert clock.calls == ["slow", "ours"] * 4 and medians == {"slow": 4, "ours": 1}
    (table,) = timing.tables
    assert table["baseline"] == "slow"
    assert table["left_out"] == {"broken": "RuntimeError: no compiler"}
    assert table["rows"] == {
        "slow": dict(median_s=4, min_s=2, max_s=6, n=3, ratio=1, min_ratio=1, max_ratio=1, rate=2),
        "ours": dict(median_s=1, min_s=0.5, max_s=2, n=3, ratio=4, min_ratio=2, max_ratio=8)
        | dict(rate=3, share=0.25),
    }
    printed = capsys.readouterr().out
    assert "broken: left out, RuntimeError: no compiler\n" in printed
    assert re.search(r"ours +1 0\.5-2 +3 +4\.00 \[2\.00-8\.00\] +25%\n", printed)


def test_short_calls_are_repeated_and_a_late_failure_ends_one_contestant(monkeypatch):
    clock = Clock(monkeypatch)

    def fails_later() -> None:
        clock.now += 1
        if len(clock.calls) > 20:
            raise MemoryError

    contestants = {"short": clock.takes("short", 3.0, 0.001), "late": fails_later}
    medians = timing.compare("decode", "short", contestants, 4, baseline="late")
    assert medians == {"short": pytest.approx(0.001)}
    assert len(clock.calls) == 1 + 1 + 4 * 20  # the first, one to see how short, 20 ms a sample
    (table,) = timing.tables
    assert table["left_out"] == {"late": "MemoryError"} and table["baseline"] == "short"


def test_limits_are_this_machines():
    limits = timing.limits()
    assert limits is timing.limits(torch.device("cpu"))
    assert 5e8 < limits.read_bandwidth < 5e12 and 5e8 < limits.copy_bandwidth < 5e12
    assert 1e9 < limits.matmul_rate["float32"] < 1e15


def test_an_absent_peer_is_noted_once(capsys):
    for _ in range(2):
        assert timing.peer("no_such_package.model") is None
    assert timing.peer("json") is json
    note = "skipped: no_such_package.model is not installed (see requirements/bench.txt)\n"
    assert capsys.readouterr().out == note
    assert timing.skipped == {"no_such_package": "is not installed"}


def test_a_broken_peer_is_absent_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_peer.py").write_text("raise OSError('no shared library')")
    monkeypatch.syspath_prepend(tmp_path)
    assert timing.peer("broken_peer") is None
    assert "cannot be imported (OSError: no shared library)" in capsys.readouterr().out


def test_the_wait_is_the_time_until_an_item_is_there(monkeypatch):
    clock = Clock(monkeypatch)
    make, use = clock.takes("make", 7.0, 2.0, 3.0), clock.takes("use", 9.0, 5.0)
    items = (make() for _ in range(3))
    waited, whole = timing.waits(items, lambda item: use(), skipped=1)
    assert waited == [2, 3] and whole == [7, 8]


# Sections


def test_sections_are_measured_printed_and_recorded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tokenizing, "CHUNK_BYTES", 100_000)
    results = tmp_path / "kept" / "results.jsonl"
    tokenizing.make_source(tmp_path, Path(json.__file__).parents[1] / "asyncio")
    arguments = [*TINY, "--section=packing,decode,data", f"--source={tmp_path}/*.parquet"]
    for _ in range(2):
        assert benchmark.main([*arguments, f"--results={results}"]) == 0
        arguments[-2] = "--section=decode"
    assert benchmark.main([*arguments, "--save=False", f"--results={results}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"added to {results}") == 2

    first, second = report.read(results)
    assert list(first["seconds"]) == ["data", "decode", "packing"]
    assert [*second["seconds"]] == ["decode"] and "--section=decode --source" in second["command"]
    assert first["versions"]["torch"] == torch.__version__ and first["hardware"]["threads"] >= 1
    assert first["limits"]["copy_bandwidth"] > 0
    assert first["commit"] == report.git("rev-parse", "HEAD")
    tables = {table["title"].partition(",")[0]: table for table in first["tables"]}
    for title, table in tables.items():
        assert title in printed and not table.get("left_out")

    decode = next(table for table in first["tables"] if table["section"] == "decode")
    assert decode["baseline"] == "transformers generate"
    assert {"ours, plain PyTorch"} < decode["rows"].keys()
    for row in decode["rows"].values():
        assert row["rate"] == pytest.approx(6 / row["median_s"], rel=1e-3) and row["share"] > 0
    logits = next(t for title, t in tables.items() if title.startswith("logits"))["facts"]
    assert logits["ours, plain PyTorch"]["largest error"] < 1e-5
    for row in logits.values():
        assert row["largest error"] < 0.1 * row["largest logit"]

    prepared = next(t for title, t in tables.items() if title.startswith("prepare 4 files"))
    assert list(prepared["rows"]) == ["tiktoken, one thread, lists", "ours"]
    tokenized = next(t for title, t in tables.items() if title.startswith("tokenize"))
    assert len(tokenized["rows"]) == 4
    wait = next(t for title, t in tables.items() if title.startswith("wait"))["facts"]["ours"]
    assert 0 <= wait["share"] < 1 and 0 < wait["wait ms"] <= wait["longest wait ms"]

    benchmark.main(["--plot=True", f"--results={results}"])
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path, monkeypatch):
    def interrupted(config, device) -> None:
        timing.report("decode", "answers", {"ours": [1.0]})
        raise KeyboardInterrupt

    monkeypatch.setitem(benchmark.SECTIONS, "decode", interrupted)
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*TINY, "--section=decode", f"--results={path}"])
    (line,) = report.read(path)
    assert line["tables"][0]["title"] == "answers" and line["seconds"] == {}


def test_a_section_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def answers(config, device) -> None:
        timing.report("decode", "answers", {"ours": [1.0]})

    def no_data(config, device) -> None:
        raise UserError("there is no data")

    for name, section in {"train": lambda *_: broken(), "data": no_data, "decode": answers}.items():
        monkeypatch.setitem(benchmark.SECTIONS, name, section)
    path = tmp_path / "r.jsonl"
    assert benchmark.main([*TINY, "--section=data, train,decode", f"--results={path}"]) == 1
    (line,) = report.read(path)
    assert line["tables"][0]["title"] == "answers"
    told = capsys.readouterr().err
    assert "RuntimeError: no compiler" in told and "data: there is no data\n" in told
    assert told.endswith("not finished, see above: train, data\n")


class Shard:
    """Documents of these lengths."""

    def __init__(self, *lengths: int):
        self.offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.uint64)
        self.tokens = np.zeros(int(self.offsets[-1]), dtype=np.uint16)

    def __len__(self) -> int:
        return len(self.offsets) - 1


def test_use_of_slots_against_sums_by_hand():
    shards = [Shard(1), Shard(*[10] * 3)]  # rows of 4: 1; three times 4 + 4 + 2: packed in 8 rows
    rows = PackedRows(shards, 4, pad_id=9)
    assert rows.rows_per_epoch == 8
    found = use_of_slots(shards, rows, 4)
    ours, theirs = found["ours"], found["first tokens, padded, drawn"]
    assert (ours["filled"], ours["labels"]) == (31 / 32, (31 - 10) / 32)
    assert ours["lost"] == ours["unseen"] == 0
    assert theirs["lost"] == pytest.approx(1 - 13 / 31)
    drawn = np.random.default_rng(1).integers(4, size=8)
    ones = int((drawn == 0).sum())
    assert 0 < ones < 8 and theirs["filled"] == (ones + 4 * (8 - ones)) / 32
    assert theirs["labels"] == 3 * (8 - ones) / 32 and theirs["unseen"] >= theirs["lost"] - 1e-9


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="section='speed': expected all, or some of train,"):
        benchmark.main(["--section=speed"])
    with pytest.raises(UserError, match="new_tokens=60 after a prompt of 16 do not fit"):
        benchmark.main(["--block_size=64", "--new_tokens=60"])
    with pytest.raises(UserError, match="rounds=0 must be at least 1"):
        benchmark.main(["--rounds=0"])
    for setting in ("batch_size=-1", "repeats=x", "repeats=0", "device=tpu", "block_size=1"):
        with pytest.raises(UserError, match=setting.replace("=", "='?")):
            benchmark.main([f"--{setting}", "--section=train"])
    with pytest.raises(UserError, match="cannot make the folder"):
        benchmark.main([*TINY, f"--results={__file__}/results.jsonl"])
    with pytest.raises(UserError, match="n_embd=63 must be n_heads=10 times"):
        benchmark.main(["--n_embd=63"])
    with pytest.raises(UserError, match="none.jsonl does not exist: run python benchmark.py first"):
        benchmark.main(["--results=none.jsonl", "--plot=True"])
    command = [sys.executable, "-m", "benchmarks.tokenizing_worker"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and "run python benchmark.py --section=data" in result.stderr
    assert result.stderr.count("\n") == 1


# The record and what is made of it


def saved(path: Path, **changes) -> dict:
    environment = report.environment(["--section=decode"], torch.device("cpu"))
    report.record(path, environment | changes, {"decode": 1.0}, torch.device("cpu"))
    return report.read(path)[-1]


def test_the_table_has_the_newest_of_each_on_each_machine(tmp_path):
    path = tmp_path / "r.jsonl"
    for seconds, gpu in ((0.5, None), (0.25, None), (0.125, "H|100")):
        timing.begin()
        times = {"theirs": [1.0, 1.0], "ours": [seconds] * 2, "ours, int8": [0.1, 0.1]}
        work, bound = ("tokens/s", 100.0), {"ours": 0.2 * seconds}
        timing.report("decode", "answers", times, work=work, bound=bound)
        timing.facts("packing", "rows", {"ours": {"filled": 0.5, "none": float("nan")}})
        hardware = {"cpu": "a CPU", "cores": 4, "threads": 2, "gpu": gpu}
        saved(path, hardware=hardware, commit="0123456789", changed=True, load=None)
    timing.begin()
    saved(path)  # without tables
    table = report.readme_table(report.read(path))
    date = report.read(path)[0]["date"][:10]
    assert table.count("decode: answers") == 2 and " 2.00 ×" not in table
    assert (
        "| decode: answers | 4.00 × (400 tokens/s)<br>int8 10.00 × (1000 tokens/s) | "
        "theirs 1.00 × (100 tokens/s) | 20%<br>– |"
    ) in table
    run = f"`python benchmark.py --section=decode`, {date}, commit 0123456 with changes"
    assert f"**a CPU, 2 of 4 cores**: {run}\n" in table
    assert f"**H|100**: {run}\n" in table and "8.00 ×" in table
    assert "| packing: rows | filled 0.5; none - |  |  |" in table

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    report.write_readme(path, readme)
    text = readme.read_text()
    assert table in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("-->\nafter\n")
    report.write_readme(path, readme)
    assert readme.read_text() == text
    readme.write_text("no place")
    with pytest.raises(UserError, match="README.md has no place for the table"):
        report.write_readme(path, readme)


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    saved(path)
    good = path.read_bytes()
    for damaged in (b'{"date": ', b'{"tables": []}\n', b"[]\n", b"\xff\n"):
        path.write_bytes(good + damaged)
        with pytest.raises(UserError, match="r.jsonl, line 2 is no record: delete that line"):
            report.read(path)
    path.write_bytes(good + good[:-1])  # whole, but for the end of its line
    saved(path)
    assert len(report.read(path)) == 3


def test_the_readmes_table_is_what_the_command_writes():
    readme = (ROOT / "README.md").read_text("utf-8")
    table = report.readme_table(report.read(report.RESULTS))
    assert report.with_table(readme, table) == readme, "run python benchmark.py --readme=True"
