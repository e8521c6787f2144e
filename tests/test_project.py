"""The project as a whole: imports do nothing, the README names every file, the pins agree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("hidden", ["", "triton"])
def test_importing_does_nothing(hidden, tmp_path):
    """Every file imports in a fresh process, without CUDA and with or without Triton, silently."""
    code = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
for name in {hidden.split()!r}:
    sys.modules[name] = None
handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
for name in {MODULES!r}:
    __import__(name)
import torch
assert not torch.cuda.is_initialized() and threading.active_count() == 1
assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
assert os.listdir() == []
"""
    command = [sys.executable, "-B", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_readme_has_a_line_for_every_file():
    tree = (ROOT / "README.md").read_text("utf-8")
    missing = [name for name in MODULES if f"{name}.py" not in tree]
    assert missing == []


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not t.startswith("http")]
    assert targets and [t for t in targets if not (ROOT / t).exists()] == []


def test_requirements_are_pinned():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert re.match(r"[\w-]+==[\w.]+($|[; ])", line), line
