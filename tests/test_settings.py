"""common/settings.py: typed overrides, one-line refusals, the help text, exit codes."""

import dataclasses
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from common import settings
from common.errors import UserError
from common.settings import chosen_names, config_from_constants, run_script
from common.signals import Interrupted

CONSTANTS = {
    "__name__": "script",
    "__doc__": "What it does.",
    "batch_size": 16,
    "learning_rate": 1e-3,
    "finetune": False,
    "out_dir": "checkpoints",
    "LIMIT": 5,
    "helper": len,
    "_hidden": 1,
}


RENAMED = {"input": "out_dir"}


def config(*argv: str):
    return config_from_constants(CONSTANTS, list(argv), renamed=RENAMED)


def test_constants_become_a_frozen_config():
    default = config()
    assert dataclasses.asdict(default) == {
        "batch_size": 16,
        "learning_rate": 1e-3,
        "finetune": False,
        "out_dir": "checkpoints",
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.batch_size = 1


def test_overrides_take_the_type_of_the_default():
    before = dict(CONSTANTS)
    changed = config(
        "--batch_size=1_024", "--learning_rate", "3", "--finetune=true", "--out_dir=a=b c"
    )
    assert (changed.batch_size, changed.learning_rate, changed.finetune) == (1024, 3.0, True)
    assert changed.out_dir == "a=b c" and type(changed.learning_rate) is float
    assert CONSTANTS == before


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--finetune"], "finetune", True),
        (["--finetune", "--batch_size=4"], "finetune", True),
        (["--finetune=True"], "finetune", True),
        (["--finetune", "no"], "finetune", False),
        (["--out_dir="], "out_dir", ""),
        (["--out_dir=-x"], "out_dir", "-x"),
        (["--out_dir=--help"], "out_dir", "--help"),
        (["--out_dir", "-5"], "out_dir", "-5"),
        (["--batch_size", "-1"], "batch_size", -1),
        (["--batch_size=1", "--batch_size=2"], "batch_size", 2),
    ],
)
def test_switches_and_values_that_begin_with_a_dash(argv, name, value):
    assert getattr(config(*argv), name) == value


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batch_sise=4", "did you mean --batch_size"),
        ("--batch=4", "unknown setting --batch: did you mean"),  # no abbreviations
        ("--zzz=4", "unknown setting --zzz: --help lists all of them"),
        ("--LIMIT=4", "unknown setting --LIMIT"),
        ("--batch_size=4.5", "expected a whole number"),
        ("--learning_rate=fast", "expected a number"),
        ("--learning_rate=nan", "expected a number"),
        ("--learning_rate=inf", "expected a number"),
        ("--finetune=maybe", "expected True or False"),
        ("--finetune=", "expected True or False"),
        ("--batch_size", "--batch_size needs a value: write --batch_size=16"),
        ("--input=a", "--input is now called --out_dir: write --out_dir=a"),
        ("--input", "--input is now called --out_dir"),
        ("batch_size=4", "given as --name=value"),
        ("-batch_size=4", "given as --name=value"),
        ("--", "given as --name=value"),
    ],
)
def test_unusable_arguments_are_refused_in_one_line(argument, message):
    with pytest.raises(UserError, match=message) as refusal:
        config(argument)
    assert "\n" not in str(refusal.value)


SCRIPT = '''"""What it does.

    python script.py    # 100 % of it
How it does it.
"""

import math

# A comment of nothing: no setting follows

# Model (tensors of
# any size)
n_layers = 24
n_embd = 640  # 50 % of 1280
# Where things are
out_dir = (
    "#checkpoints"  # not this
)  # a folder: "" for none

# Not a setting
LIMIT = 5  # hidden
'''


def test_help_prints_groups_comments_and_defaults(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    module = types.ModuleType("script")
    exec(compile(SCRIPT, path, "exec"), vars(module))
    module.__file__ = str(path)
    with pytest.raises(SystemExit) as end:
        config_from_constants(vars(module), ["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out == (
        "What it does.\n\n    python script.py    # 100 % of it\nHow it does it.\n\n"
        "Model (tensors of\nany size):\n"
        "  --n_layers INT  (default: 24)\n"
        "  --n_embd INT    50 % of 1280 (default: 640)\n\n"
        "Where things are:\n"
        "  --out_dir TEXT  a folder: \"\" for none (default: '#checkpoints')\n"
    )


def test_help_without_a_source_file(capsys):
    with pytest.raises(SystemExit):
        config("-h")
    assert "--finetune [True|False]  (default: False)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("say --this"), 2, "error: say --this\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Interrupted(signal.SIGTERM, ""), 143, "interrupted\n"),
        (OSError(28, "No space left", "a.npz"), 1, "error: the disk is full while writing a.npz"),
        (OSError(27, "File too large"), 1, "error: a file is larger than this disk or `ulimit -f`"),
        (PermissionError(13, "Permission denied", "a"), 1, "error: a: Permission denied: check"),
        (OSError(30, "Read-only file system", "a"), 1, "error: a: Read-only file system: check"),
        (FileNotFoundError(2, "None", "\udcff東"), 1, "error: \\udcff東: None: check"),
    ],
)
def test_run_script_turns_mistakes_into_a_line_and_a_code(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    printed = capsys.readouterr().err
    assert end.value.code == code and printed.startswith(line) and printed.count("\n") == 1


STREAMS = """
import os, sys
sys.path.insert(0, sys.argv[2])
from common.settings import run_script

def main():
    with open(sys.argv[1], "w") as file:
        print("out"), print("err", file=sys.stderr), os.write(2, b"2"), sys.stderr.isatty()
        os.system("echo child; echo child >&2")
        file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")

run_script(main)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2</dev/null"])
def test_run_script_opens_missing_streams(closed, tmp_path):
    path, root = tmp_path / "data", Path(settings.__file__).parents[1]
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", STREAMS, path, root]
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    assert path.read_text() == "True ''"  # nothing was printed into it
    assert (result.stdout == b"") == (">&-" in closed.split()) and b"rror" not in result.stderr


def test_run_script_does_not_hide_a_bug(capsys):
    with pytest.raises(SystemExit) as end:
        run_script(lambda: 1 // 0)
    captured = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" in captured and "ZeroDivisionError" in captured

    def nameless():
        raise OSError(5, "Input/output error")

    with pytest.raises(SystemExit):
        run_script(nameless)
    assert "Traceback" in capsys.readouterr().err


def test_names_are_chosen_from_a_list():
    known = ("train", "data", "decode")
    assert chosen_names("section", " data, train,data", known) == ["data", "train"]
    for text in ("all", "data,all"):
        assert chosen_names("section", text, known) == list(known)
    for text, message in (
        ("trian", "there is no trian here: did you mean train?"),
        ("x,data", "there is no x here: there are train, data, decode"),
        (" , ", "--section is empty: there are all, train, data, decode"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            chosen_names("section", text, known)
