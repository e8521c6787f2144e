"""The config helper: typed overrides, refusals of one line, nothing written back."""

import dataclasses

import pytest

from common.errors import UserError
from common.settings import config_from_constants, run_script

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


def config(*argv: str):
    return config_from_constants(CONSTANTS, list(argv))


def test_constants_become_a_frozen_config():
    found = config()
    assert dataclasses.asdict(found) == {
        "batch_size": 16,
        "learning_rate": 1e-3,
        "finetune": False,
        "out_dir": "checkpoints",
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.batch_size = 1


def test_overrides_take_the_type_of_the_default():
    before = dict(CONSTANTS)
    found = config("--batch_size=1_024", "--learning_rate=3", "--finetune=true", "--out_dir=a=b c")
    assert (found.batch_size, found.learning_rate, found.finetune) == (1024, 3.0, True)
    assert found.out_dir == "a=b c" and type(found.learning_rate) is float
    assert CONSTANTS == before


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batch_sise=4", "did you mean --batch_size"),
        ("--zzz=4", "known: batch_size, learning_rate"),
        ("--LIMIT=4", "unknown setting --LIMIT"),
        ("--batch_size=4.5", "expected a whole number"),
        ("--learning_rate=fast", "expected a number"),
        ("--finetune=maybe", "expected True or False"),
        ("--finetune", "write --finetune=False"),
        ("batch_size=4", "given as --name=value"),
        ("--", "given as --name=value"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(argument, message):
    with pytest.raises(UserError, match=message) as refusal:
        config(argument)
    assert "\n" not in str(refusal.value)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        config("--help")
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "What it does." in printed
    assert "--learning_rate=0.001" in printed and "LIMIT" not in printed


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("say --this"), 2, "error: say --this\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
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


def test_run_script_does_not_hide_a_bug():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)

    def nameless():
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        run_script(nameless)
