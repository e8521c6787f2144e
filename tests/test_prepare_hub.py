"""prepare_dataset.py reading datasets of the hub, from a server that acts as one on 127.0.0.1."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetGenerationError
from fake_hub import COMMIT, FakeHub

import prepare_dataset
from common.manifest import read_manifest
from preparation.hub_dataset import one_line_errors

ROOT = Path(prepare_dataset.__file__).parent
SCRIPT = ROOT / "prepare_dataset.py"
KYOTO = "Nikity/Kyoto-Corpus"
TRAIN = "data/train-00000-of-00001.parquet"
NO_NETWORK = "http://127.0.0.1:9"  # nothing listens there
NEWER = "d" * 40


def chat(i: int, user: str = "user") -> dict:
    answer = {"role": "assistant", "content": f"answer {i}"}
    return {"messages": [{"role": user, "content": f"question {i}"}, answer], "id": i}


def parquet(rows: list) -> bytes:
    output = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), output, row_group_size=30)
    return output.getvalue()


ROWS = [chat(i) for i in range(100)]
CONTENT = parquet(ROWS)


@pytest.fixture(autouse=True)
def in_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub():
    with FakeHub() as hub:
        hub.add("datasets", KYOTO, {TRAIN: CONTENT, "README.md": b"---\nlicense: mit\n---\n"})
        yield hub


def environment(url: str, **variables: str) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = str(Path("hf_home").resolve())
    return others | {"HF_ENDPOINT": url, "HF_HOME": home, "PYTHONPATH": str(ROOT)} | variables


def run(url: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=environment(url, **variables),
    )


# Runs the script for each row of arguments, but imports and loads things once and waits less.
SEVERAL = """
import contextlib, io, json, sys, time

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))

import prepare_dataset
from common.errors import UserError

tokenizer = prepare_dataset.load_tokenizer()
prepare_dataset.load_tokenizer = lambda path: tokenizer
results = []
for arguments in json.load(sys.stdin):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            prepare_dataset.main(arguments)
        results.append(printed.getvalue())
    except UserError as error:
        results.append("error: " + str(error))
print(json.dumps(results))
"""


def run_several(url: str, rows: list[list[str]], **variables: str) -> list[str]:
    """What each run of the script printed, or "error: ..."."""
    result = subprocess.run(
        [sys.executable, "-c", SEVERAL],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        env=environment(url, **variables),
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_errors(printed: list[str], errors: list[str]) -> None:
    for line, error in zip(printed, errors, strict=True):
        assert line.startswith("error: ") and error in line, (line, error)
        assert "\n" not in line and len(line) < 600


def contents(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def shards(directory: str) -> list[bytes]:
    return [contents(directory)[name] for name in ("train.npz", "val.npz")]


def expected_shards(content: bytes = CONTENT) -> list[bytes]:
    """Those of the same Parquet file, read from the disk."""
    Path("local.parquet").write_bytes(content)
    prepare_dataset.main(["--input_file_path=local.parquet", "--output_dir=local"])
    return shards("local")


def test_a_dataset_of_the_hub_then_offline_and_pinned(hub):
    result = run(hub.url, f"--hf_dataset={KYOTO}", "--output_dir=out")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("100 chat examples, ")
    assert f"GET /datasets/{KYOTO}/resolve/{COMMIT}/{TRAIN}" in hub.requests
    assert shards("out") == expected_shards()
    source = {"name": KYOTO, "config": "default", "split": "train", "commit": COMMIT, "rows": 100}
    assert read_manifest("out")["sources"] == [source]
    assert read_manifest("out")["kind"] == "chat"

    first, n_requests = contents("out"), len(hub.requests)
    arguments = [f"--hf_dataset={KYOTO}", "--output_dir=out"]
    result = run(hub.url, *arguments, HF_HUB_OFFLINE="1")
    assert (result.returncode, result.stderr, len(hub.requests)) == (0, "", n_requests)
    assert result.stdout.startswith(
        f"note: cannot ask the hub for {KYOTO}, reading commit {COMMIT} of the cache\n"
    )
    assert contents("out") == first

    pinned = [*arguments, f"--hf_revision={COMMIT}"]
    other = [*arguments, f"--hf_revision={NEWER}"]
    printed = run_several(
        hub.url,
        [pinned, other, [*arguments, "--hf_split=test"], ["--hf_dataset=o/other"]],
        HF_HUB_OFFLINE="1",
    )
    assert "100 chat examples" in printed[0]
    check_errors(
        printed[1:],
        [
            f"the newest in the cache is commit {COMMIT}, not {NEWER}",
            """Unknown split "test". Should be one of ['train']""",
            "cannot read o/other: Couldn't reach 'o/other' on the Hub (OfflineModeIsEnabled)",
        ],
    )
    assert contents("out") == first


def test_no_network(hub):
    arguments = [f"--hf_dataset={KYOTO}", "--output_dir=out"]
    down = "cannot read {0}: Couldn't reach '{0}' on the Hub"
    check_errors(run_several(NO_NETWORK, [arguments]), [down.format(KYOTO)])
    assert not Path("out").exists()
    run_several(hub.url, [arguments])
    first = contents("out")
    printed = run_several(NO_NETWORK, [arguments, ["--hf_dataset=o/other"]])
    assert printed[0].startswith(f"note: cannot ask the hub for {KYOTO}, reading commit {COMMIT}")
    check_errors(printed[1:], [down.format("o/other")])
    assert contents("out") == first


def test_a_new_commit_is_fetched(hub):
    arguments = [f"--hf_dataset={KYOTO}", "--output_dir=out"]
    run_several(hub.url, [arguments])
    content = parquet([chat(i) for i in range(50, 150)])
    hub.add("datasets", KYOTO, {TRAIN: content})
    hub.repositories["datasets", KYOTO].commit = NEWER
    run_several(hub.url, [arguments])
    assert read_manifest("out")["sources"][0]["commit"] == NEWER
    assert shards("out") == expected_shards(content) != expected_shards()


def test_faults_of_the_network_change_nothing(hub):
    faults = {
        "drop": [("drop", 1000)],
        "truncate": [("truncate", 1000)] * 2,
        "busy": [("status", 503), ("status", 429)],
        "corrupt": [("corrupt", 500)] * 2,
        "gone": [("status", 404)],
        "changed": [("corrupt", 500)] * 5,
    }
    for name in faults:
        hub.add("datasets", f"o/{name}", {f"train-{name}.parquet": CONTENT})
        hub.faults[f"train-{name}.parquet"] = faults[name]
    rows = [[f"--hf_dataset=o/{name}", f"--output_dir={name}"] for name in faults]
    printed = run_several(hub.url, [*rows, rows[-1]])
    assert not any(hub.faults.values())  # all of them were met
    for name in ("drop", "truncate", "busy", "corrupt", "changed"):
        assert shards(name) == expected_shards()
    check_errors(
        printed[4:6],
        [
            "the hub has no o/gone/train-gone.parquet, or not for you",
            f"from {hub.url} (it does not have the sha256 that the hub publishes): check the netw",
        ],
    )
    assert "100 chat examples" in printed[6]


def test_mistakes_are_one_line_and_leave_nothing(hub):
    two = b"---\nconfigs:\n- config_name: a\n  data_files: a.parquet\n"
    two += b"- config_name: b\n  data_files: b.parquet\n---\n"
    parts = [parquet([{"text": "a"}]), parquet(ROWS[:1])]
    mixed = {f"data/train-{i:05d}-of-00002.parquet": part for i, part in enumerate(parts)}
    repositories = {
        "ok": {TRAIN: CONTENT},
        "two": {"README.md": two, "a.parquet": CONTENT, "b.parquet": parquet(ROWS[:2])},
        "empty": {"README.md": b"# nothing\n"},
        "script": {"script.py": b"", TRAIN: CONTENT},
        "prompts": {TRAIN: parquet([{"prompt": "a", "id": 1}])},
        "both": {TRAIN: parquet([{"text": "a", "messages": []}])},
        "damaged": {TRAIN: CONTENT[:-50]},
        "broken": {TRAIN: CONTENT[:100] + bytes(100) + CONTENT[200:]},
        "mixed": mixed,
        "yaml": {"README.md": b"---\nconfigs: [\n---\n", TRAIN: CONTENT},
        "system": {TRAIN: parquet([*ROWS[:70], chat(70, user="system")])},
        "number": {TRAIN: parquet([{"text": 5}])},
        "blank": {TRAIN: parquet([{"text": None}, {"text": " "}])},
        "kinds": {TRAIN: CONTENT},
    }
    for name, files in repositories.items():
        hub.add("datasets", f"o/{name}", files)
    refusals = {"login": (401, "GatedRepo"), "gated": (403, "GatedRepo")}
    refusals |= {"busy": (503, ""), "often": (429, "")}
    for name, refusal in refusals.items():
        hub.add("datasets", f"o/{name}", {TRAIN: CONTENT})
        hub.repositories["datasets", f"o/{name}"].refusal = refusal
    Path("val.jsonl").write_text('{"text": "a"}\n')
    Path("saved").mkdir()
    Path("saved/state.json").write_text("{}")
    cases = {
        "o/none": "cannot read o/none: Dataset 'o/none' doesn't exist on the Hub or cannot be acc",
        "o/login": "gated dataset on the Hub. You must be authenticated to access it",
        "o/gated": "to ask for access",
        "o/busy": "Couldn't find 'o/busy' on the Hugging Face Hub either",
        "o/often": "Couldn't find 'o/often' on the Hugging Face Hub either",
        "o/ok --hf_revision=v1": "Revision 'v1' doesn't exist for dataset 'o/ok'",
        "o/ok --hf_split=test": """Unknown split "test". Should be one of ['train']""",
        "o/ok --hf_split=train[:x]": "o/ok: Unrecognized instruction format",
        "o/ok --hf_config=none": "BuilderConfig 'none' not found. Available: ['default']",
        "o/two": "among the available configs: ['a', 'b']",
        "o/two --hf_config=b": "val_split=0.01 of 2 examples leaves 0 for validation",
        "o/empty": "doesn't contain any data files",
        "o/script": "Dataset scripts are no longer supported",
        "o/prompts": "o/prompts, split train has the columns 'prompt', 'id', not exactly one of ",
        "o/both": "o/both, split train has the columns 'text', 'messages', not exactly one of ",
        "o/damaged": "cannot read o/damaged: Parquet magic bytes not found",
        "o/broken": f"{COMMIT}/{TRAIN}, row group 0 is damaged or not Parquet",
        "o/mixed": "column names don't match",
        "o/yaml": "cannot read o/yaml: while parsing",
        "o/system": "o/system, split train, row 70: message 1 has role 'system', expected 'user'",
        "o/number": 'o/number, split train, row 0: "text" is not a string but int',
        "o/blank": "o/blank, split train holds no examples",
        "o/kinds --val_file_path=val.jsonl": "holds chat examples but val.jsonl text examples",
        "o/kinds --val_file_path=none.txt": "none.txt does not exist",
        "o/kinds --input_file_path=a.txt": "both hf_dataset=o/kinds and input_file_path=a.txt are",
        "o/kinds --trust_control_tokens=True": "trust_control_tokens is for .txt files only",
        "csv": "hf_dataset=csv is neither a folder nor owner/name",
        "a/b/c": "cannot read a/b/c: ",
        "o/-": "cannot read o/-: ",
        "saved --hf_revision=main": "hf_revision is for datasets of the hub, saved is a folder",
        " --hf_split=test": "hf_split is given without hf_dataset",
        " --hf_config=a --hf_revision=b": "hf_config is given without hf_dataset",
    }
    before = sorted(os.listdir())
    rows = [f"--hf_dataset={case} --output_dir=out".split() for case in cases]
    printed = run_several(hub.url, rows)
    check_errors(printed, list(cases.values()))
    assert sorted(os.listdir()) == sorted([*before, "hf_home"])


def test_local_folder_and_parts_of_splits():
    for name, rows in {"train": ROWS, "test": ROWS[:10]}.items():
        Path("folder/data").mkdir(parents=True, exist_ok=True)
        Path(f"folder/data/{name}-00000-of-00001.parquet").write_bytes(parquet(rows))
    Path("lines").mkdir()
    lines = [json.dumps({"question": f"q{i}", "answer": "" if i % 2 else "a"}) for i in range(20)]
    Path("lines/train.jsonl").write_text("\n".join(lines))
    printed = run_several(
        NO_NETWORK,
        [
            ["--hf_dataset=folder", "--output_dir=all"],
            [
                "--hf_dataset=folder",
                "--output_dir=two",
                "--hf_split=train[90:]+test",
                "--val_split=0.5",
            ],
            ["--hf_dataset=lines", "--output_dir=lines_out", "--val_split=0.5"],
        ],
    )
    assert [line for line in printed if line.startswith("error")] == []
    assert shards("all") == expected_shards()
    names = [f"data/{name}-00000-of-00001.parquet" for name in ("test", "train")]
    assert [source["name"] for source in read_manifest("all")["sources"]] == names[1:]
    assert read_manifest("two")["documents"] == 20
    assert [source["name"] for source in read_manifest("two")["sources"]] == names
    manifest = read_manifest("lines_out")
    assert manifest["dropped"] == {"empty": {"documents": 10, "tokens": 0}}
    assert manifest["documents"] == 10 and manifest["kind"] == "chat"


def test_a_full_disk_is_not_a_mistake_in_the_dataset():
    with pytest.raises(OSError) as caught, one_line_errors("o/name"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise DatasetGenerationError("An error occurred") from error
    assert caught.value.errno == errno.ENOSPC and "huggingface" in caught.value.filename.lower()


def test_interrupted_download(hub):
    hub.faults[TRAIN] = [("slow", 20)]
    child = subprocess.Popen(
        [sys.executable, SCRIPT, f"--hf_dataset={KYOTO}", "--output_dir=out"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(hub.url),
    )
    while hub.faults[TRAIN]:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=15)
    assert (child.returncode, stderr) == (130, "interrupted\n")
    assert not Path("out").exists()
    run_several(hub.url, [[f"--hf_dataset={KYOTO}", "--output_dir=out"]])
    assert shards("out") == expected_shards()


# The mapped pages of the Arrow files are not counted: the system takes them back when it needs to.
PEAK = """
import pathlib, sys, threading
import prepare_dataset

def watch():
    while not done.wait(0.01):
        status = pathlib.Path("/proc/self/status").read_text()
        peaks.append(int(status.partition("RssAnon:")[2].split()[0]))

done, peaks = threading.Event(), []
thread = threading.Thread(target=watch)
thread.start()
try:
    prepare_dataset.main(sys.argv[1:])
finally:
    done.set()
    thread.join()
print("peak KiB", max(peaks))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_does_not_grow_with_the_dataset():
    """60 MB in one row group take at most 30 MB more than 6 MB do."""
    peaks = {}
    for times in (1, 10):
        texts = [f"{i} {'a cat sat on the mat, ' * 40}" for i in range(6500 * times)]
        Path(f"folder{times}").mkdir()
        pq.write_table(
            pa.table({"text": texts}),
            f"folder{times}/train.parquet",
            compression="none",
            use_dictionary=False,
        )
        result = subprocess.run(
            [sys.executable, "-c", PEAK, f"--hf_dataset=folder{times}", "--output_dir=out"],
            env=environment(NO_NETWORK),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        peaks[times] = int(result.stdout.split()[-1]) * 1024
    assert os.path.getsize("folder10/train.parquet") > 55e6
    assert peaks[10] - peaks[1] < 30e6, peaks
