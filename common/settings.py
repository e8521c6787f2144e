"""Turns a script's constants into a frozen config object and applies `--name=value` overrides.

A script keeps its settings as lower-case constants at the top of the file and calls

    config = config_from_constants(globals(), argv)

which reads them (and never writes them), so editing a constant and passing it on the command line
are the same thing. Only bool, int, float and str constants are settings; each keeps the type of its
default. The result is a frozen dataclass: derive a variant with `dataclasses.replace(config, ...)`.
"""

import difflib
import errno
import math
import os
import sys
from collections.abc import Callable
from dataclasses import field, make_dataclass
from typing import Any

from common.errors import UserError

SETTING_TYPES = (bool, int, float, str)
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than this disk or `ulimit -f` allows",
}


def settings_of(namespace: dict[str, Any]) -> dict[str, Any]:
    """The lower-case constants of a module (its `globals()`) that are settings, in file order."""
    return {
        name: value
        for name, value in namespace.items()
        if name.islower() and not name.startswith("_") and type(value) in SETTING_TYPES
    }


def parse_value(name: str, text: str, default: Any) -> Any:
    """Converts the text of `--name=text` to the type of `default`; UserError when it cannot be."""
    kind = type(default)
    try:
        value = BOOLEANS[text.lower()] if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        expected = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        message = f"--{name}={text}: expected {expected} (the default is {default!r})"
        raise UserError(message) from None


def parse_overrides(argv: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """The overrides in `argv`, typed; UserError for anything that is not a known `--name=value`."""
    overrides = {}
    for argument in argv:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            raise UserError(f"cannot read '{argument}': settings are given as --name=value")
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean --{close[0]}?" if close else f"known: {', '.join(defaults)}"
            raise UserError(f"unknown setting --{name}: {hint}")
        if not equals:
            raise UserError(f"--{name} needs a value: write --{name}={defaults[name]!r}")
        overrides[name] = parse_value(name, text, defaults[name])
    return overrides


def config_from_constants(namespace: dict[str, Any], argv: list[str] | None = None) -> Any:
    """Builds the frozen config of a script from its `globals()` and its arguments.

    `argv` defaults to `sys.argv[1:]`. `--help` prints the script's docstring and every setting
    with its default, then exits. Raises UserError for unknown names and wrong types.
    """
    argv = sys.argv[1:] if argv is None else argv
    defaults = settings_of(namespace)
    if "--help" in argv or "-h" in argv:
        settings = "\n".join(f"  --{name}={value!r}" for name, value in defaults.items())
        print(f"{namespace['__doc__'].strip()}\n\nSettings and their defaults:\n{settings}")
        raise SystemExit(0)
    values = defaults | parse_overrides(argv, defaults)
    fields = [(name, type(value), field(default=value)) for name, value in values.items()]
    return make_dataclass("Config", fields, frozen=True)()


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits: a user's mistake is one line on stderr and exit code 2.

    A failed file operation is one line too, exit code 1; a bug keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        raise SystemExit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno in NO_ROOM:
            where = f" while writing {error.filename}" if error.filename else ""
            line = f"{NO_ROOM[error.errno]}{where}: free some space or use another disk, run again"
        elif error.filename:
            reason = error.strerror or error.args[0]  # NumPy's, of a full disk, has no number
            line = f"{error.filename}: {reason}: check this path, its permissions and space"
        else:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(1) from None
