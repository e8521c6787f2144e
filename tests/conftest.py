"""Small datasets that the training tests share; test files left out for lack of a package."""

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest

import prepare_dataset

# Test files that cannot be imported without a package that a GPU box may lack.
FILES_OF = {
    "pyarrow": [
        *("test_prepare_dataset.py", "test_prepare_dataset_fineweb.py", "test_prepare_hub.py")
    ],
    "nbclient": ["test_notebook.py"],
}
MISSING = [package for package in FILES_OF if find_spec(package) is None]
collect_ignore = [name for package in MISSING for name in FILES_OF[package]]

WORDS = "the cat sat on a mat and saw two dogs run over old green hills while rain fell".split()


def pytest_report_header() -> list[str]:
    return [f"without {package}: no {', '.join(FILES_OF[package])}" for package in MISSING]


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


def prepare(path: Path) -> Path:
    """Shards of an input file, in a folder beside it."""
    output = path.parent / "shards"
    arguments = [f"--input_file_path={path}", f"--output_dir={output}", "--val_split=0.1"]
    assert prepare_dataset.main(arguments) == 0
    return output
