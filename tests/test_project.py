"""The project as a whole: layout, imports, README links, pinned requirements."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    *("train", "model", "sophia_triton", "prepare_dataset", "prepare_dataset_fineweb", "inference"),
    *("export", "benchmark", "demo", "checkpoint", "tokenizer", "dataset"),
}
# Each line imports only from the lines above it; modules of one folder may import each other.
ORDER = (
    ("common",),
    ("ops",),
    ("model", "tokenizer", "dataset", "sophia_triton"),
    ("hastings", "preparation", "formats"),
    ("checkpoint", "prepare_dataset", "prepare_dataset_fineweb"),
    ("training", "generation", "export"),
    ("train", "inference"),
    ("demo",),
    ("benchmarks",),
    ("benchmark",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def tracked(pattern: str) -> list[Path]:
    """Relative paths of tracked files and of new ones that are not ignored; without git, of all."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        paths = [path.relative_to(ROOT) for path in ROOT.rglob(pattern)]
        return [path for path in paths if not path.parts[0].startswith(".")]
    return [Path(line) for line in result.stdout.splitlines() if (ROOT / line).exists()]


FILES = [path for path in tracked("*.py") if path.parts[0] != "tests"]
MODULES = [".".join(path.with_suffix("").parts) for path in FILES if path.name != "__init__.py"]


def imports(path: Path) -> set[str]:
    """The modules of this project that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names & set(MODULES)


def upward_imports(importer: str, imported: set[str]) -> list[str]:
    """Imports that go against ORDER, each as "importer -> imported"."""
    top = importer.split(".")[0]
    return [
        f"{importer} -> {name}"
        for name in sorted(imported)
        if name.split(".")[0] != top and LEVEL[name.split(".")[0]] >= LEVEL[top]
    ]


def test_the_root_shows_only_what_people_run_or_import():
    assert {path.stem for path in FILES if len(path.parts) == 1} == SCRIPTS
    assert {path.parts[0].removesuffix(".py") for path in FILES} == set(LEVEL)


def test_folders_import_only_what_stands_below_them():
    graph = {name: imports(ROOT / f"{name.replace('.', '/')}.py") for name in MODULES}
    assert [line for name in MODULES for line in upward_imports(name, graph[name])] == []
    assert upward_imports("model", {"checkpoint"}) == ["model -> checkpoint"]
    assert upward_imports("training.trainer", {"generation.backends"}) != []
    while graph:  # modules whose imports are all done, until none is left: then there is no circle
        done = {name for name, needed in graph.items() if not needed & graph.keys()}
        assert done, f"import circle among {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in done}


@pytest.mark.parametrize("hidden", ["", "triton"])
def test_importing_does_nothing(hidden, tmp_path):
    """Every file imports in a fresh process, without CUDA and with or without Triton, silently."""
    assert len(MODULES) > 50 and "formats.modeling_lille" in MODULES
    code = f"""
import importlib, os, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
for name in {hidden.split()!r}:
    sys.modules[name] = None
handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
for name in {MODULES!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized() and threading.active_count() == 1
assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
assert os.listdir() == []
"""
    command = [sys.executable, "-B", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_links_lead_somewhere():
    for page in tracked("*.md"):
        text = (ROOT / page).read_text("utf-8")
        targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not t.startswith("http")]
        missing = [target for target in targets if not (ROOT / page.parent / target).exists()]
        assert missing == [], page


def test_requirements_are_pinned():
    paths = [ROOT / "requirements.txt", *(ROOT / "requirements").glob("*.txt")]
    assert len(paths) == 5
    for path in paths:
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert re.match(r"[\w-]+==[\w.]+($|[; ])", line), line
