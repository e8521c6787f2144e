"""The project as a whole: layout, imports, README links, pinned requirements."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.settings import read_comments, settings_of
from common.threads import limit_spinning

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    *("train", "model", "sophia_triton", "prepare_dataset", "prepare_dataset_fineweb", "inference"),
    *("export", "benchmark", "demo", "checkpoint", "tokenizer", "dataset"),
    *("evaluate", "prepare_evaluation"),
}
# Each line imports only from the lines above it; modules of one folder may import each other.
ORDER = (
    ("common",),
    ("ops",),
    ("model", "tokenizer", "dataset", "sophia_triton"),
    ("preparation", "formats"),
    ("hastings", "checkpoint", "prepare_dataset", "prepare_dataset_fineweb"),
    ("training", "generation", "export", "evaluation"),
    ("train", "inference", "evaluate", "prepare_evaluation"),
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


def test_no_large_file_is_tracked():
    """Data, downloads and weights are not committed."""
    assert [path for path in tracked("*") if (ROOT / path).stat().st_size > 2_000_000] == []


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


def run_python(code: str, cwd: Path, **variables: str) -> str:
    """Output of a fresh Python process in `cwd`, with the project on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment.pop(name, None)
    command = [sys.executable, "-B", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("hidden", ["", "triton"])
def test_importing_does_nothing(hidden, tmp_path):
    """Every file imports in a fresh process, without CUDA and with or without Triton, silently.

    The one effect is GOMP_SPINCOUNT, which is of use only if it is set before torch is loaded.
    """
    assert len(MODULES) > 50 and "formats.modeling_lille" in MODULES
    code = f"""
import importlib, os, signal, sys, threading
for name in {hidden.split()!r}:
    sys.modules[name] = None
handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
environment = dict(os.environ)
for name in {MODULES!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized() and threading.active_count() == 1
assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
assert os.listdir() == []
changes = dict(os.environ.items() ^ environment.items())
changes.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch's own
assert list(changes) == (["GOMP_SPINCOUNT"] if sys.platform == "linux" else []), changes
"""
    assert run_python(code, tmp_path) == ""


def test_scripts_that_load_torch_limit_its_spinning_first():
    files = {name: ROOT / f"{name.replace('.', '/')}.py" for name in MODULES}
    first, loads, scripts = {}, {}, set()
    for name, path in files.items():
        tree = ast.parse(path.read_text("utf-8"))
        nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        first[name] = ast.unparse(nodes[0]) if nodes else ""
        text = "\n".join(map(ast.unparse, nodes))
        loads[name] = bool(re.search(r"^(import|from) torch\b", text, re.MULTILINE))
        if "__main__" in ast.unparse(tree.body[-1]):
            scripts.add(name)

    def loads_torch(name: str) -> bool:
        return loads[name] or any(map(loads_torch, imports(files[name])))

    with_torch = {name for name in scripts if loads_torch(name)}
    assert {"train", "inference", "export", "benchmark", "demo"} <= with_torch < scripts
    assert {name: first[name] for name in with_torch} == dict.fromkeys(
        with_torch, "import common.threads"
    )


@pytest.mark.parametrize(
    ("platform", "before", "after"),
    [
        ("linux", {}, {"GOMP_SPINCOUNT": "20000"}),
        ("linux", {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ("linux", {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ("darwin", {}, {}),
        ("win32", {}, {}),
    ],
)
def test_spinning_is_limited_where_the_user_has_not_chosen(platform, before, after):
    environment = dict(before)
    limit_spinning(environment, platform)
    assert environment == after


# Packages that a GPU box may lack. What runs there imports them only where they are used.
OPTIONAL = [
    *("datasets", "gigatoken", "awkward", "matplotlib", "pyarrow", "gradio", "onnx", "onnxscript"),
    *("onnxruntime", "gguf", "accelerate", "wandb", "tiktoken", "nbclient", "nbformat"),
    *("starlette", "uvicorn"),
]
# httpx or httpx2 is there for huggingface_hub, depending on its version: not for this project.
WITHOUT_OPTIONAL = f"""
import builtins, importlib, sys
sys.modules |= dict.fromkeys({OPTIONAL!r})
real = builtins.__import__
def refuse_httpx(name, globals=None, *args, **kwargs):
    if name.startswith("httpx") and (globals or {{}}).get("__file__", "").startswith({str(ROOT)!r}):
        if "site-packages" not in globals["__file__"]:
            raise ModuleNotFoundError(f"{{globals['__file__']}} imports {{name}}")
    return real(name, globals, *args, **kwargs)
builtins.__import__ = refuse_httpx
"""


def test_what_a_gpu_box_runs_imports_without_optional_packages(tmp_path):
    folders = ("training", "ops", "generation", "formats", "common")
    names = "train inference export benchmark model checkpoint dataset tokenizer prepare_dataset"
    names = [*names.split(), *(name for name in MODULES if name.split(".")[0] in folders)]
    code = f"{WITHOUT_OPTIONAL}\nfor name in {names!r}:\n    importlib.import_module(name)"
    assert len(names) > 30
    assert run_python(code, tmp_path) == ""


def test_gpu_tests_are_collected_without_optional_packages():
    code = f"{WITHOUT_OPTIONAL}\nimport pytest\nsys.exit(pytest.main(['-m', 'gpu', '--co', '-q']))"
    printed = run_python(code, ROOT)
    files = {line.partition("::")[0] for line in printed.splitlines() if "::" in line}
    pages = {path.as_posix(): (ROOT / path).read_text("utf-8") for path in tracked("*test_*.py")}
    marked = {path for path, page in pages.items() if re.search("^@pytest.mark.gpu", page, re.M)}
    assert files == marked and len(marked) >= 4, printed


def test_every_setting_is_explained():
    """--help shows the comment behind a constant: each has one, which reads by itself."""
    scripts = "train prepare_dataset prepare_dataset_fineweb inference export benchmark demo"
    scripts += " evaluate prepare_evaluation"
    for name in scripts.split():
        module = importlib.import_module(name)
        _, descriptions = read_comments(ROOT / f"{name}.py")
        for setting in settings_of(vars(module)):
            text = descriptions.get(setting, "")
            assert text and not text.startswith(("or ", "of ")), f"{name}.{setting}: {text!r}"


def test_links_lead_somewhere():
    for page in tracked("*.md"):
        text = (ROOT / page).read_text("utf-8")
        targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not t.startswith("http")]
        missing = [target for target in targets if not (ROOT / page.parent / target).exists()]
        assert missing == [], page


def test_readme_names_every_script_and_folder():
    text = (ROOT / "README.md").read_text("utf-8")
    names = sorted({path.parts[0] for path in FILES})
    assert [name for name in names if f"]({name})" not in text] == []


def test_requirements_are_pinned():
    paths = [ROOT / "requirements.txt", *(ROOT / "requirements").glob("*.txt")]
    assert len(paths) == 7
    for path in paths:
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert re.match(r"[\w-]+==[\w.]+($|[; ])", line), line
