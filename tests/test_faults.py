"""A sample of tests/faults.py, and that it finds what is lost."""

import re

import faults
import pytest

from common.errors import UserError

# A worker whose files are written in place.
IN_PLACE = """
import contextlib, faults, common.files
from common.settings import run_script

@contextlib.contextmanager
def atomic_file(path):
    with open(path, "wb") as file:
        yield file

common.files.atomic_file = atomic_file
run_script(faults.main)
"""


@pytest.fixture(autouse=True)
def hook(tmp_path):
    try:
        faults.build_hook(tmp_path)
    except UserError as error:
        pytest.skip(str(error))


def table(output: str) -> dict[str, list[int]]:
    """[calls, runs, losses] of each case."""
    rows = re.findall(r"^([\w-]+) +(\d+) +(\d+) +(\d+) +\d+s", output, re.MULTILINE)
    return {name: [int(n) for n in numbers] for name, *numbers in rows}


def test_a_sample_loses_nothing(capsys):
    cases = ["train", "fineweb", "prepare", "kill-adamw", "kill-fineweb-by-3"]
    code = faults.main([f"--case={','.join(cases)}", "--sample=3", "--kills=3", "--workers=1"])
    output = capsys.readouterr().out
    assert code == 0, output
    rows = table(output)
    assert list(rows) == cases
    assert all(calls > 30 and runs >= 1 for calls, runs, _ in rows.values()), output


def test_files_written_in_place_are_losses(capsys, monkeypatch):
    monkeypatch.setattr(faults, "WORKER", [*faults.WORKER[:1], "-c", IN_PLACE])
    monkeypatch.setenv("PYTHONPATH", f"{faults.ROOT}:{faults.ROOT / 'tests'}")
    settings = ["--case=train", "--fault=torn", "--sample=5", "--kills=0", "--workers=1"]
    code = faults.main(settings)
    output = capsys.readouterr().out
    assert code == 1 and re.search(r"LOST .*\.pt is not a checkpoint, or only half of one", output)
    (numbers,) = table(output).values()
    assert 0 < numbers[2] < numbers[1]  # not every fault is a loss
