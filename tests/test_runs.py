"""Commands of runs/*.sh and of the documentation: their scripts exist and know their settings."""

import importlib
import math
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from common.errors import UserError
from common.settings import config_from_constants, settings_of
from training.checks import check_arguments, check_settings
from training.setup import settings_in_force

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "runs").glob("*.sh"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_of(path: Path) -> str:
    """A shell script, or the fenced and indented blocks of a Markdown page, lines joined at \\."""
    lines, code, fenced = path.read_text("utf-8").splitlines(), [], False
    for line in lines:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or path.suffix == ".sh" or line.startswith("    "):
            code.append(line)
    return "\n".join(code).replace("\\\n", " ")


def commands_of(path: Path) -> list[list[str]]:
    """Arguments of each `python` and `torchrun` in a file, without comments."""
    commands = []
    for line in re.split(r"\n| && | \| |; ", code_of(path)):
        match = re.search(r"(?:^|[\s/])((?:python|torchrun)\s.*)", line)
        if match and "#" not in line[: match.start(1)]:
            commands.append(shlex.split(match.group(1), comments=True))
    return commands


def script_of(command: list[str]) -> tuple[ModuleType | None, list[str]]:
    """The project's module that a command runs, and its arguments; None for another program's.

    Raises ImportError for a module or script that does not exist.
    """
    for i, word in enumerate(command[1:], start=1):
        if word == "-m" and (ROOT / command[i + 1].partition(".")[0]).is_dir():
            return importlib.import_module(command[i + 1]), command[i + 2 :]
        if word in ("-m", "-c"):
            return None, []
        if word.endswith(".py"):
            if not (ROOT / word).is_file():
                raise ImportError(f"there is no {word}")
            return importlib.import_module(word[:-3].replace("/", ".")), command[i + 1 :]
    return None, []


def check_command(command: list[str]) -> bool:
    """Whether a command runs one of the project's scripts; raises for one that it would refuse.

    A value with a shell variable is taken to be the default.
    """
    module, arguments = script_of(command)
    if module is None:
        return False
    defaults, argv = settings_of(vars(module)), []
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        argument = f"--{name}={defaults.get(name)}" if "$" in value else argument
        argv += [] if argument in ("$@", "...") else [argument]
    config = config_from_constants(vars(module), argv, getattr(module, "RENAMED", None))
    if module.__name__ == "train":
        check_arguments(argv, config.finetune)
        sizes = re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", " ".join(command))
        check_settings(settings_in_force(config), math.prod(map(int, sizes)))
    return True


@pytest.mark.parametrize("path", [*RECIPES, *PAGES], ids=lambda path: path.name)
def test_commands_name_scripts_and_settings_that_exist(path):
    counts = [check_command(command) for command in commands_of(path)]
    assert sum(counts) >= 2, "hardly a command was found in this file"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("python train.py --lerning_rate=1e-3", "did you mean --learning_rate"),
        ("OMP_NUM_THREADS=1 python train.py --max_steps=many  # a comment", "a whole number"),
        ("python train.py --finetune_checkpoint=a.pt", "is now called --model"),
        ("python train.py --finetune --learning_rate=1e-3", "has no effect with --finetune"),
        ("torchrun --nproc_per_node=3 train.py --device=cpu", "dealt to 3 ranks"),
        ("python -m preparation.demo_data --out=data", "unknown setting --out"),
        ('python train.py --max_step="$steps"', "did you mean --max_steps"),
        ("$ python learn.py", "there is no learn.py"),
        ("make demo && .venv/bin/python learn.py", "there is no learn.py"),
        ("python -m benchmarks.lerning --plot", "No module named 'benchmarks.lerning'"),
        ("python train.py \\\n        --batch_size=0", "batch_size=0 must be at least 1"),
    ],
)
def test_wrong_commands_are_found(tmp_path, line, error):
    """In a page as in a script, also where a line is continued."""
    for name, indent in (("page.md", "    "), ("recipe.sh", "")):
        path = tmp_path / name
        path.write_text(f"Text with python words.py\n\n{indent}{line}\n")
        (command,) = commands_of(path)[-1:]
        with pytest.raises((UserError, ImportError), match=error):
            check_command(command)


def test_recipes_are_short_and_valid_shell():
    assert len(RECIPES) >= 5
    for path in RECIPES:
        lines = path.read_text("utf-8").splitlines()
        assert len(lines) <= 40 and "set -eu" in lines and lines[0] == "#!/bin/sh", path
        subprocess.run(["sh", "-n", path], check=True)
