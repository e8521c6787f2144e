"""Datasets and measurements that test files share; test files left out for lack of a package."""

import functools
import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import prepare_dataset
from tokenizer import HASTINGS, Tokenizer, load_tokenizer
from training import setup
from training.metrics import Metrics

# Test files that cannot be imported without a package that a GPU box may lack.
FILES_OF = {
    "pyarrow": [
        *("test_prepare_dataset.py", "test_prepare_dataset_fineweb.py", "test_prepare_hub.py")
    ],
    "nbclient": ["test_notebook.py"],
}
MISSING = [package for package in FILES_OF if find_spec(package) is None]
collect_ignore = [name for package in MISSING for name in FILES_OF[package]]

# They begin first, so that the workers of pytest-xdist end together.
LONGEST = (
    *("test_train.py", "test_faults.py", "test_distributed.py", "test_prepare_dataset_fineweb.py"),
    *("test_export_gguf.py", "test_export_onnx.py", "test_benchmark.py", "test_export_hf.py"),
    *("test_prepare_hub.py", "test_inference.py", "test_own_tokenizer.py", "test_sophia_triton.py"),
)

WORDS = "the cat sat on a mat and saw two dogs run over old green hills while rain fell".split()


def pytest_report_header() -> list[str]:
    return [f"without {package}: no {', '.join(FILES_OF[package])}" for package in MISSING]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def hastings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in one process share the tokenizer, which takes longer to load than their steps."""
    load = {HASTINGS.relative_to(HASTINGS.parents[1]): cached_hastings}
    monkeypatch.setattr(setup, "load_tokenizer", lambda p: load.get(Path(p), load_tokenizer)(p))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short runs: a third of their time goes into loss curves that nobody looks at."""
    monkeypatch.setattr(Metrics, "plot", lambda self: None)


@functools.cache
def cached_hastings(path: str) -> Tokenizer:
    return load_tokenizer(path)


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n)) + "."


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 120 short documents."""
    directory, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    documents = [sentence(rng, rng.randint(3, 60)) for _ in range(120)]
    (directory / "input.txt").write_text("<|endoftext|>".join(documents), "utf-8")
    return prepare(directory / "input.txt")


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 other documents, for mixtures with those of text_data."""
    directory, rng = tmp_path_factory.mktemp("mixed"), random.Random(2)
    documents = [sentence(rng, rng.randint(3, 60)).upper() for _ in range(40)]
    (directory / "input.txt").write_text("<|endoftext|>".join(documents), "utf-8")
    return prepare(directory / "input.txt", "others")


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 60 conversations of one or two turns."""
    directory, rng = tmp_path_factory.mktemp("chat"), random.Random(1)
    lines = []
    for _ in range(60):
        messages = []
        for _ in range(rng.randint(1, 2)):
            messages.append({"role": "user", "content": sentence(rng, rng.randint(2, 6))})
            messages.append({"role": "assistant", "content": sentence(rng, rng.randint(2, 6))})
        lines.append(json.dumps({"messages": messages}))
    (directory / "input.jsonl").write_text("\n".join(lines), "utf-8")
    return prepare(directory / "input.jsonl")


def prepare(path: Path, name: str = "shards") -> Path:
    """Shards of an input file, in a folder beside it."""
    output = path.parent / name
    arguments = [f"--input_file_path={path}", f"--output_dir={output}", "--val_split=0.1"]
    assert prepare_dataset.main(arguments) == 0
    return output


# Not ru_maxrss, which on Linux starts with that of the parent process.
PEAK = """
import importlib, pathlib, sys
script, inputs = importlib.import_module(sys.argv[1]), sys.argv[3:]
peaks = []
for path in inputs:
    script.main([*sys.argv[2].split(), "--" + path, f"--output_dir=out{len(peaks)}"])
    status = pathlib.Path("/proc/self/status").read_text()
    peaks.append(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
print(peaks[1] - peaks[0])
"""


def peak_growth(module: str, settings: str, small: str, large: str) -> int:
    """Bytes by which a script's peak memory exceeds, with a large input, that with a small one.

    The inputs are settings such as "source=in"; one process prepares both, the small one first.
    """
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, module, settings, small, large],
        env=os.environ | {"PYTHONPATH": str(Path(prepare_dataset.__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])
