"""benchmark.py: the clock and its tables, sections at tiny sizes, records, the generated README."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmark
from benchmarks import decoding, report, runtimes, timing, tokenizing
from benchmarks.learning_plot import tables
from common import records
from common.errors import UserError
from formats import write_hf
from generation.fast_decode import LIBRARY
from model import GPT, GPTConfig
from ops.cpp_build import native_library
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = "--n_layers=2 --n_embd=64 --n_heads=2 --n_kv_heads=1 --block_size=64 --new_tokens=6".split()
TINY += "--rounds=1 --device=cpu --decode_rows=3 --long_prompt=40".split()
# Absent where only the core packages are, of which transformers is one.
OPTIONAL = (
    "datasets gigatoken pyarrow matplotlib onnx onnxscript onnxruntime gguf gradio "
    "litgpt lm_eval simple_ai sophia_opt liger_kernel tiktoken llama_cpp"
)
needs_compiler = pytest.mark.skipif(native_library(*LIBRARY) is None, reason="needs a C++ compiler")
ROW = dict(median_s=1.0, min_s=1.0, max_s=1.0, n=1, ratio=1.0)
ANSWERS = {"title": "answers", "unit": "", "rows": {"ours": ROW}}


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
    columns = dict(unit="naps/s", amounts={"slow": 8, "broken": 1, "ours": 3})
    table = timing.compare("naps", functions, 3, **columns, bounds={"ours": 0.25})
    assert clock.calls == ["slow", "ours"] * 4
    assert table["rows"] == {
        "slow": dict(median_s=4, min_s=2, max_s=6, n=3, ratio=1, rate=2),
        "ours": dict(median_s=1, min_s=0.5, max_s=2, n=3, ratio=4, rate=3, share=0.25),
    }
    assert "broken: left out, RuntimeError: no compiler\n" in capsys.readouterr().out


def test_short_calls_are_repeated_and_a_late_failure_ends_one_function(monkeypatch, capsys):
    clock = Clock(monkeypatch)

    def fails_later() -> None:
        clock.now += 1
        if len(clock.calls) > 20:
            raise MemoryError

    functions = {"late": fails_later, "short": clock.takes("short", 3.0, 0.001)}
    rows = timing.compare("short", functions, 4)["rows"]
    assert list(rows) == ["short"]
    assert rows["short"]["median_s"] == pytest.approx(0.001) and rows["short"]["ratio"] == 1
    assert len(clock.calls) == 1 + 1 + 4 * 20  # the first, one to see how short, 20 ms a sample
    assert "late: left out, MemoryError" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="short: no implementation could be timed"):
        timing.compare("short", {"broken": broken}, 4)


def test_limits_are_this_machines():
    limits = timing.limits(timing.CPU)
    assert limits is timing.limits(torch.device("cpu"))
    assert 5e8 < limits["read_bandwidth"] < 5e12 and 5e8 < limits["copy_bandwidth"] < 5e12
    assert 1e9 < limits["matmul_rate"] < 1e15


def test_an_absent_or_broken_peer_is_noted_once(tmp_path, monkeypatch, capsys):
    timing.peer.cache_clear()
    for _ in range(2):
        assert timing.peer("no_such_package.model") is None
    assert timing.peer("json") is json
    note = "skipped: ModuleNotFoundError: No module named 'no_such_package' (see requirements/"
    assert capsys.readouterr().out == f"{note}bench.txt)\n"
    (tmp_path / "broken_peer.py").write_text("raise OSError('no shared library')")
    monkeypatch.syspath_prepend(tmp_path)
    assert timing.peer("broken_peer") is None
    assert "skipped: OSError: no shared library (" in capsys.readouterr().out


# Sections


def test_sections_are_measured_printed_and_recorded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tokenizing, "LIBRARY", Path(json.__file__).parents[1] / "asyncio")
    monkeypatch.setattr(tokenizing, "CHUNK_BYTES", 100_000)
    results = tmp_path / "new" / "results.jsonl"
    for section, path in (("decode,data", results), ("decode", results), ("data", "")):
        assert benchmark.main([*TINY, f"--section={section}", f"--results={path}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"added to {results}") == 2

    first, second = records.read_records(results)
    assert list(first["seconds"]) == ["data", "decode"]
    assert [*second["seconds"]] == ["decode"] and "--section=decode --results" in second["command"]
    assert (
        torch.__version__.startswith(first["versions"]["torch"])
        and first["hardware"]["threads"] >= 1
    )
    assert first["limits"]["copy_bandwidth"] > 0
    assert first["commit"] == records.git("rev-parse", "HEAD")
    assert all(table["title"] in printed for table in first["tables"])
    assert "left out" not in printed

    tokenized, decode, batch, first_token = first["tables"]
    assert len(tokenized["rows"]) == 2 + 2 * (timing.peer("tiktoken") is not None)
    assert list(decode["rows"])[0] == "transformers generate"
    for row in decode["rows"].values():
        assert row["rate"] == pytest.approx(6 / row["median_s"], rel=1e-3) and row["share"] > 0
    for name, row in batch["rows"].items():
        assert row["rate"] == pytest.approx(18 / row["median_s"], rel=1e-3)
        assert name in first_token["rows"] and name in decode["rows"]
    errors = {name: row["logit error"] for name, row in decode["rows"].items() if "ours" in name}
    assert errors.pop("ours, plain PyTorch") < 1e-5 and max(errors.values(), default=0) < 0.3


@needs_compiler
def test_decoding_shows_the_divergence_and_the_memory_of_each_runtime(
    tmp_path, monkeypatch, capsys
):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_embd=64, n_layers=2, n_heads=2, n_kv_heads=1, block_size=64)).eval()
    with torch.no_grad():  # so that probabilities differ much
        gpt.tok_embeddings.weight.mul_(8)
    folder, text = tmp_path / "named", tmp_path / "text.txt"
    folder.mkdir()
    write_hf.write_folder(gpt, load_tokenizer(), folder, "float32")
    text.write_text("The cat sat on the mat, and the dog ran after it. " * 9)
    monkeypatch.setattr(runtimes, "peer", lambda name: None)
    names, makers = ("ours, float32 weights", "ours, int8 weights"), runtimes.makers

    def two_and_a_broken_one(*arguments):
        found = makers(*arguments)
        return {name: found[name] for name in names} | {"broken": None}

    monkeypatch.setattr(decoding, "makers", two_and_a_broken_one)
    arguments = ["--section=decode", "--exports", f"--model={folder}", f"--text={text}"]
    results = tmp_path / "r.jsonl"
    assert benchmark.main([*TINY, *arguments, f"--results={results}"]) == 0
    assert "broken: left out, a process of its own ended with: KeyError: 'broken'" in (
        capsys.readouterr().out
    )
    (record,) = records.read_records(results)
    rows = record["tables"][0]["rows"]
    assert "parameters of named" in record["tables"][0]["title"]
    assert 0 <= rows["ours, float32 weights"]["KL, nats"] < 1e-9
    assert 1e-7 < rows["ours, int8 weights"]["KL, nats"] < 1e-2
    assert all(10 < row["peak MB"] < 2000 for row in rows.values())


def test_divergence_is_that_of_the_distributions():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert decoding.divergence(p.log(), q.log() + 7) == pytest.approx(expected)


def test_sections_run_where_only_the_core_packages_are(tmp_path):
    arguments = [*TINY, "--exports", f"--results={tmp_path}/r.jsonl"]
    code = f"""
import sys
for name in {OPTIONAL.split()!r}:
    sys.modules[name] = None
import benchmark, demo
from benchmarks import decoding, tokenizing, training_step
decoding.peak_megabytes = lambda *arguments: 1.0
demo.MODEL_SHAPE.update(n_layers=1, n_embd=64)
demo.PRETRAIN.update(batch_size=2)
training_step.N_DOCUMENTS = 200
tokenizing.CHUNK_BYTES = 100_000
sys.exit(benchmark.main({arguments!r}))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for name in ("sophia_opt", "simple_ai", "onnx"):
        assert len(re.findall(f"^skipped: .*{name}", result.stdout, re.MULTILINE)) == 1, name
    (record,) = records.read_records(tmp_path / "r.jsonl")
    sections = 3 * ["train"] + 2 * ["optimizer"] + ["data", *3 * ["decode"]]
    assert [table["section"] for table in record["tables"]] == sections
    assert all(any("ours" in name for name in table["rows"]) for table in record["tables"])
    assert "ours" not in re.findall("(.*): left out", result.stdout)


def replace_section(monkeypatch, name: str, *results) -> None:
    """A section that yields these tables, and raises what is an exception."""

    def run(config, device):
        for result in results:
            if isinstance(result, BaseException):
                raise result
            yield result

    monkeypatch.setitem(benchmark.SECTIONS, name, run)


def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path, monkeypatch):
    replace_section(monkeypatch, "decode", ANSWERS, KeyboardInterrupt())
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*TINY, "--section=decode", f"--results={path}"])
    (line,) = records.read_records(path)
    assert line["tables"] == [{"section": "decode"} | ANSWERS] and line["seconds"] == {}


def test_a_section_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    replace_section(monkeypatch, "train", RuntimeError("no compiler"))
    replace_section(monkeypatch, "decode", ANSWERS)
    path = tmp_path / "r.jsonl"
    assert benchmark.main([*TINY, "--section=train, decode", f"--results={path}"]) == 1
    (line,) = records.read_records(path)
    assert line["tables"] == [{"section": "decode"} | ANSWERS]
    errors = capsys.readouterr().err
    assert "RuntimeError: no compiler" in errors
    assert errors.endswith("not finished, see above: train\n")


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="there is no speed here: there are train, opt"):
        benchmark.main(["--section=speed"])
    with pytest.raises(UserError, match="new_tokens=60 after a prompt of 16 do not fit"):
        benchmark.main(["--block_size=64", "--new_tokens=60"])
    with pytest.raises(UserError, match="long_prompt=400 does not fit into block_size=128"):
        benchmark.main(["--block_size=128"])
    with pytest.raises(UserError, match="--model and --text go together"):
        benchmark.main(["--model=x.pt"])
    for setting in ("rounds=0", "new_tokens=0", "device=tpu", "dtype=half"):
        with pytest.raises(UserError, match=setting.replace("=", "='?")):
            benchmark.main([f"--{setting}", "--section=train"])
    with pytest.raises(UserError, match="cannot make the folder"):
        benchmark.main([*TINY, f"--results={__file__}/results.jsonl"])
    with pytest.raises(UserError, match="n_embd=63 must be n_heads=10 times"):
        benchmark.main(["--n_embd=63"])


# Records and benchmarks/README.md


def test_the_readme_has_the_newest_of_each_table_on_each_machine(tmp_path):
    path = tmp_path / "r.jsonl"
    for seconds, gpu in ((0.5, None), (0.25, None), (0.125, "H100")):
        row = dict(median_s=1.0, min_s=1.0, max_s=1.5, n=2, ratio=1.0, rate=100.0)
        ours = dict(median_s=seconds, min_s=seconds, max_s=1, n=2, ratio=1 / seconds)
        rows = {"theirs": row, "ours": ours | {"rate": 1e5, "share": 0.2}}
        answers = dict(section="decode", title="answers", unit="tokens/s", rows=rows)
        use = dict(section="train", title="rows", rows={"ours": {"filled": 0.5}})
        record = records.environment(["benchmark.py", "--section=decode"], torch.device("cpu"))
        record["hardware"] = {"cpu": "a CPU", "cores": 4, "threads": 2, "gpu": gpu}
        record |= {"commit": "0123456789", "changed": True, "load": None, "tables": [answers, use]}
        records.append_record(path, record)
    text = report.readme_text(records.read_records(path), {"a": [["", "loss"], ["ours", "1.5"]]})
    assert text.count("**decode: answers**") == 2 and "| 2.00 |" not in text
    assert (
        "|        | median s |  range | tokens/s | x as fast | of limit |\n"
        "|--------|---------:|-------:|---------:|----------:|---------:|\n"
        "| theirs |        1 |  1-1.5 |      100 |      1.00 |          |\n"
        "| ours   |     0.25 | 0.25-1 |  100,000 |      4.00 |      20% |\n"
    ) in text
    assert "|      | filled |\n|------|-------:|\n| ours |    0.5 |" in text
    run = f"`python benchmark.py --section=decode`, {record['date'][:10]}, commit 0123456 with"
    assert text.count(run) == 4
    assert text.index("## Speed: a CPU, 2 of 4 cores") < text.index("## Speed: H100")
    assert text.index("**train: rows**") < text.index("**decode: answers**")
    assert "| ours |  1.5 |\n" in text


def test_the_committed_readme_is_what_the_command_writes(tmp_path):
    for name in ("results.jsonl", "learning.jsonl", "learning_unseen.jsonl"):
        (tmp_path / name).write_bytes((ROOT / "benchmarks" / name).read_bytes())
    assert benchmark.main(["--readme", f"--results={tmp_path}/results.jsonl"]) == 0
    committed = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    hint = "run python benchmark.py --readme"
    assert (tmp_path / "README.md").read_text("utf-8") == committed, hint
    assert len(tables(records.read_records(tmp_path / "learning.jsonl"))) > 1


def test_a_damaged_record_is_named_in_one_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"date": "2026"}\n{"date": "20\xff')
    with pytest.raises(UserError, match="r.jsonl, line 2 is no record: delete that line$"):
        records.read_records(path)
