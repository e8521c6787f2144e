"""benchmark.py: the clock and its tables, sections at tiny sizes, records, the generated README."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmark
from benchmarks import report, timing
from benchmarks.learning_plot import study_table
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TINY = "--n_layers=2 --n_embd=64 --n_heads=2 --n_kv_heads=1 --block_size=64 --new_tokens=6".split()
TINY += "--rounds=1 --repeats=1 --device=cpu".split()
# Absent where only the core packages are; and all peers but transformers.
OPTIONAL = (
    "datasets gigatoken httpx2 httpx pyarrow matplotlib onnx onnxscript onnxruntime gguf gradio"
)
OPTIONAL += " litgpt simple_ai sophia_opt liger_kernel tiktoken llama_cpp"


@pytest.fixture(autouse=True)
def fresh():
    report.reset()
    timing.peer.cache_clear()


class Clock:
    """A clock for benchmarks/timing.py that only measured functions move on."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def takes(self, name: str, *seconds: float):
        """A function whose calls take these times in turn, the last of them from then on."""
        times = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += times.pop(0) if len(times) > 1 else times[0]

        return run


def broken() -> None:
    raise RuntimeError("no compiler\nand more")


def test_functions_run_in_turn_and_ratios_say_how_many_times_as_fast(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    functions = {
        "slow": clock.takes("slow", 9.0, 2.0, 6.0, 4.0),  # the first call compiles
        "broken": broken,
        "ours": clock.takes("ours", 5.0, 1.0, 2.0, 0.5),
    }
    columns = dict(work=("naps/s", {"slow": 8, "ours": 3}), bound={"ours": 0.25})
    columns["extra"] = {"ours": {"peak MB": 1e5}}
    medians = timing.compare("decode", "naps", functions, 3, **columns)
    assert clock.calls == ["slow", "ours"] * 4 and medians == {"slow": 4, "ours": 1}
    (table,) = report.tables
    assert table["baseline"] == "slow"
    assert table["left_out"] == {"broken": "RuntimeError: no compiler"}
    ours = {"rate": 3, "share": 0.25, "peak MB": 1e5}
    assert table["rows"] == {
        "slow": dict(median_s=4, min_s=2, max_s=6, n=3, ratio=1, rate=2),
        "ours": dict(median_s=1, min_s=0.5, max_s=2, n=3, ratio=4) | ours,
    }
    printed = capsys.readouterr().out
    assert "broken: left out, RuntimeError: no compiler\n" in printed
    assert re.search(r"ours +1 +0\.5-2 +3 +4\.00 +25% +100,000\n", printed)


def test_short_calls_are_repeated_and_a_late_failure_ends_one_function(monkeypatch):
    clock = Clock(monkeypatch)

    def fails_later() -> None:
        clock.now += 1
        if len(clock.calls) > 20:
            raise MemoryError

    functions = {"short": clock.takes("short", 3.0, 0.001), "late": fails_later}
    medians = timing.compare("decode", "short", functions, 4, baseline="late")
    assert medians == {"short": pytest.approx(0.001)}
    assert len(clock.calls) == 1 + 1 + 4 * 20  # the first, one to see how short, 20 ms a sample
    (table,) = report.tables
    assert table["left_out"] == {"late": "MemoryError"} and table["baseline"] == "short"


def test_limits_are_this_machines():
    limits = timing.limits(timing.CPU)
    assert limits is timing.limits(torch.device("cpu"))
    assert 5e8 < limits.read_bandwidth < 5e12 and 5e8 < limits.copy_bandwidth < 5e12
    assert 1e9 < limits.matmul_rate["float32"] < 1e15


def test_an_absent_or_broken_peer_is_noted_once(tmp_path, monkeypatch, capsys):
    for _ in range(2):
        assert timing.peer("no_such_package.model") is None
    assert timing.peer("json") is json
    note = "skipped: no_such_package.model is not installed (see requirements/bench.txt)\n"
    assert capsys.readouterr().out == note
    (tmp_path / "broken_peer.py").write_text("raise OSError('no shared library')")
    monkeypatch.syspath_prepend(tmp_path)
    assert timing.peer("broken_peer") is None
    assert "cannot be imported (OSError: no shared library)" in capsys.readouterr().out


# Sections


def test_sections_are_measured_printed_and_recorded(tmp_path, capsys, monkeypatch):
    tokenizing = pytest.importorskip("benchmarks.tokenizing")
    monkeypatch.setattr(tokenizing, "CHUNK_BYTES", 100_000)
    results = tmp_path / "kept" / "results.jsonl"
    tokenizing.make_source(tmp_path, Path(json.__file__).parents[1] / "asyncio")
    arguments = [*TINY, "--section=decode,data", f"--source={tmp_path}/*.parquet"]
    for _ in range(2):
        assert benchmark.main([*arguments, f"--results={results}"]) == 0
        arguments[-2] = "--section=decode"
    assert benchmark.main([*arguments, "--save=False", f"--results={results}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"added to {results}") == 2

    first, second = report.read_records(results)
    assert list(first["seconds"]) == ["data", "decode"]
    assert [*second["seconds"]] == ["decode"] and "--section=decode --source" in second["command"]
    assert first["versions"]["torch"] == torch.__version__ and first["hardware"]["threads"] >= 1
    assert first["limits"]["copy_bandwidth"] > 0
    assert first["commit"] == report.git("rev-parse", "HEAD")
    assert all(table["title"] in printed and not table["left_out"] for table in first["tables"])

    tokenized, prepared, decode = first["tables"]
    assert decode["baseline"] == "transformers generate"
    assert {"ours, plain PyTorch"} < decode["rows"].keys()
    for row in decode["rows"].values():
        assert row["rate"] == pytest.approx(6 / row["median_s"], rel=1e-3) and row["share"] > 0
    errors = {name: row["logit error"] for name, row in decode["rows"].items() if "ours" in name}
    assert errors.pop("ours, plain PyTorch") < 1e-5 and max(errors.values(), default=0) < 0.3
    tiktoken = timing.peer("tiktoken") is not None
    assert len(tokenized["rows"]) == 2 + 2 * tiktoken
    assert list(prepared["rows"]) == ["tiktoken, one thread, lists"] * tiktoken + ["ours"]
    assert prepared["rows"]["ours"]["peak MB"] > 10


def test_sections_run_where_only_the_core_packages_are(tmp_path):
    arguments = [*TINY, "--section=train,optimizer,decode,data", "--exports"]
    arguments += [f"--results={tmp_path}/r.jsonl"]
    code = f"""
import sys
for name in {OPTIONAL.split()!r}:
    sys.modules[name] = None
import benchmark, demo
from benchmarks import training_step
demo.MODEL_SHAPE.update(n_layers=1, n_embd=64)
training_step.N_DOCUMENTS = 200
sys.exit(benchmark.main({arguments!r}))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("skipped: sophia_opt is not installed") == 1
    assert "skipped: simple_ai.model is not installed" in result.stdout
    assert "data: import of pyarrow halted" in result.stderr
    assert result.stderr.endswith("not finished, see above: data\n")
    (record,) = report.read_records(tmp_path / "r.jsonl")
    assert [t["section"] for t in record["tables"]] == 3 * ["train"] + 2 * ["optimizer"] + [
        "decode"
    ]
    for table in record["tables"]:
        assert not table.get("left_out")
        assert "values" in table or any("ours" in name for name in table["rows"])


def replace_section(monkeypatch, name: str, run) -> None:
    monkeypatch.setitem(benchmark.SECTIONS, name, f"fake_{name}")
    monkeypatch.setitem(sys.modules, f"fake_{name}", SimpleNamespace(run=run))


def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path, monkeypatch):
    def interrupted(config, device) -> None:
        report.record_times("decode", "answers", {"ours": [1.0]})
        raise KeyboardInterrupt

    replace_section(monkeypatch, "decode", interrupted)
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*TINY, "--section=decode", f"--results={path}"])
    (line,) = report.read_records(path)
    assert line["tables"][0]["title"] == "answers" and line["seconds"] == {}


def test_a_section_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def answers(config, device) -> None:
        report.record_times("decode", "answers", {"ours": [1.0]})

    def no_data(config, device) -> None:
        raise UserError("there is no data")

    for name, run in {"train": lambda *_: broken(), "data": no_data, "decode": answers}.items():
        replace_section(monkeypatch, name, run)
    path = tmp_path / "r.jsonl"
    assert benchmark.main([*TINY, "--section=data, train,decode", f"--results={path}"]) == 1
    (line,) = report.read_records(path)
    assert line["tables"][0]["title"] == "answers"
    errors = capsys.readouterr().err
    assert "RuntimeError: no compiler" in errors and "data: there is no data\n" in errors
    assert errors.endswith("not finished, see above: train, data\n")


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="section='speed': expected all, or some of train,"):
        benchmark.main(["--section=speed"])
    with pytest.raises(UserError, match="new_tokens=60 after a prompt of 16 do not fit"):
        benchmark.main(["--block_size=64", "--new_tokens=60"])
    for setting in ("rounds=0", "batch_size=-1", "repeats=0", "device=tpu", "block_size=1"):
        with pytest.raises(UserError, match=setting.replace("=", "='?")):
            benchmark.main([f"--{setting}", "--section=train"])
    with pytest.raises(UserError, match="cannot make the folder"):
        benchmark.main([*TINY, f"--results={__file__}/results.jsonl"])
    with pytest.raises(UserError, match="n_embd=63 must be n_heads=10 times"):
        benchmark.main(["--n_embd=63"])
    command = [sys.executable, "-m", "benchmarks.tokenizing_worker"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and "run python benchmark.py --section=data" in result.stderr
    assert result.stderr.count("\n") == 1


# Records and benchmarks/README.md


def save(path: Path, **changes) -> dict:
    environment = report.environment(["--section=decode"], torch.device("cpu"))
    record = environment | changes | {"tables": report.tables}
    report.append_record(path, report.rounded(record))
    return report.read_records(path)[-1]


def test_the_readme_has_the_newest_of_each_table_on_each_machine(tmp_path):
    path = tmp_path / "r.jsonl"
    for seconds, gpu in ((0.5, None), (0.25, None), (0.125, "H|100")):
        report.reset()
        report.record_values("train", "rows", {"ours": {"filled": 0.5, "none": float("nan")}})
        times = {"theirs": [1.0, 1.0], "ours": [seconds] * 2}
        work, bound = ("tokens/s", 100.0), {"ours": 0.2 * seconds}
        report.record_times("decode", "answers", times, work=work, bound=bound)
        hardware = {"cpu": "a CPU", "cores": 4, "threads": 2, "gpu": gpu}
        save(path, hardware=hardware, commit="0123456789", changed=True, load=None)
    report.reset()
    record = save(path)  # without tables
    text = report.readme_text(report.read_records(path), [["", "loss"], ["ours", "1.5"]])
    assert text.count("**decode: answers**") == 2 and "| 2.00 |" not in text
    assert (
        "|  | median s | range | tokens/s | x as fast | of limit |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| theirs | 1 | 1-1 | 100 | 1.00 |  |\n"
        "| ours | 0.25 | 0.25-0.25 | 400 | 4.00 | 20% |\n"
    ) in text
    assert "|  | filled | none |\n|---|---:|---:|\n| ours | 0.5 | - |" in text
    run = f"`python benchmark.py --section=decode`, {record['date'][:10]}, commit 0123456 with"
    assert text.count(run) == 4
    assert text.index("## Speed: a CPU, 2 of 4 cores") < text.index("## Speed: H|100")
    assert "| ours | 1.5 |\n" in text
    assert report.markdown_table([["a|b"]]).startswith("| a\\|b |")


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    assert report.read_records(path) == []
    save(path)
    good = path.read_bytes()
    for damaged in (b'{"date": ', b"3\n", b"\xff\n"):
        path.write_bytes(good + damaged)
        with pytest.raises(UserError, match="r.jsonl, line 2 is no record: delete that line"):
            report.read_records(path)


def test_the_committed_readme_is_what_the_command_writes(tmp_path):
    for name in ("results.jsonl", "learning.jsonl"):
        (tmp_path / name).write_bytes((ROOT / "benchmarks" / name).read_bytes())
    assert benchmark.main(["--readme", f"--results={tmp_path}/results.jsonl"]) == 0
    committed = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    hint = "run python benchmark.py --readme"
    assert (tmp_path / "README.md").read_text("utf-8") == committed, hint
    assert len(study_table(report.read_records(tmp_path / "learning.jsonl"))) > 5
