"""Command-line settings: a script's constants as a frozen config, overridden by `--name=value`.

A script keeps its settings as lower-case constants at the top of the file and calls

    config = config_from_constants(globals(), argv)

which reads them and never writes them, so editing a constant and passing it on the command line
are the same thing. Only bool, int, float and str constants are settings; each keeps the type of its
default. The result is a frozen dataclass: derive a variant with `dataclasses.replace(config, ...)`.

A comment line directly above a constant titles the group that begins there, and a comment behind a
constant describes it: `--help` prints both.
"""

import argparse
import difflib
import errno
import math
import os
import signal
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterable
from dataclasses import field, make_dataclass
from functools import partial
from typing import Any

from common.errors import UserError, printable

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
METAVARS = {bool: "True|False", int: "INT", float: "FLOAT", str: "TEXT"}  # types of settings
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
        if name.islower() and not name.startswith("_") and type(value) in METAVARS
    }


def read_comments(path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Titles and descriptions of the constants in a Python file, by name.

    A title is the block of comment lines directly above an assignment at module level; a
    description is the comment behind it.
    """
    titles, descriptions = {}, {}
    name, block = "", []
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            comment, column = token.string.removeprefix("#").strip(), token.start[1]
            if token.type == tokenize.COMMENT and column:
                descriptions[name] = comment
            elif token.type == tokenize.COMMENT:
                block.append(comment)
            elif token.type == tokenize.NAME and not column:
                name = token.string
                titles.setdefault(name, "\n".join(block))
                block = []
            elif not token.line.strip():
                block = []
    return titles, descriptions


def make_parser(namespace: dict[str, Any]) -> argparse.ArgumentParser:
    """The parser of `--name=value`, `--name value` and, for a bool, `--name`."""
    path = namespace.get("__file__")  # absent in a notebook: help without comments
    titles, descriptions = read_comments(path) if path else ({}, {})
    parser = argparse.ArgumentParser(
        description=(namespace.get("__doc__") or "").strip(),
        usage=argparse.SUPPRESS,  # the docstring shows how to run the script
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 38, 100),
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    group = None
    for name, default in settings_of(namespace).items():
        if group is None or titles.get(name):
            group = parser.add_argument_group(titles.get(name) or "Settings")
        description = f"{descriptions.get(name, '')} (default: {default!r})".strip()
        switch = {"nargs": "?", "const": True} if type(default) is bool else {}
        group.add_argument(
            f"--{name}",
            type=partial(parse_value, name, default),
            default=default,
            metavar=METAVARS[type(default)],
            help=description.replace("%", "%%"),
            **switch,
        )
    return parser


def parse_value(name: str, default: Any, text: str) -> Any:
    """Converts the text of `--name=text` to the type of `default`."""
    kind = type(default)
    try:
        value = BOOLEANS[text.lower()] if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        expected = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        message = f"--{name}={text}: expected {expected} (the default is {default!r})"
        raise argparse.ArgumentTypeError(message) from None


def unknown_argument(argument: str, defaults: dict[str, Any], renamed: dict[str, str]) -> UserError:
    """The error for an argument that is no setting: its new name, or the most similar setting."""
    name = argument.removeprefix("--").partition("=")[0]
    if not argument.startswith("--") or not name:
        return UserError(f"cannot read '{argument}': settings are given as --name=value")
    if name in renamed:
        new, value = renamed[name], argument.partition("=")[2] or "value"
        if " " in new:
            return UserError(f"--{name} {new}")
        return UserError(f"--{name} is now called --{new}: write --{new}={value}")
    similar = difflib.get_close_matches(name, defaults, n=1)
    hint = f"did you mean --{similar[0]}?" if similar else "--help lists all of them"
    return UserError(f"unknown setting --{name}: {hint}")


def chosen_names(setting: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in the value of a setting, separated by commas, each once; "all" among them: all.

    UserError for one that is not known, with the most similar one.
    """
    known = list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*known, "all"):
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(known)}"
            raise UserError(f"--{setting}={text}: there is no {name} here: {hint}")
    if not names:
        raise UserError(f"--{setting} is empty: there are all, {', '.join(known)}")
    return known if "all" in names else list(dict.fromkeys(names))


def config_from_constants(
    namespace: dict[str, Any],
    argv: list[str] | None = None,
    renamed: dict[str, str] | None = None,
) -> Any:
    """Builds the frozen config of a script from its `globals()` and its arguments.

    `argv` defaults to `sys.argv[1:]`. `renamed` maps a former name to the present one, or to a
    sentence about it, for the error. `--help` prints the script's docstring and every setting with
    its description and default, then exits. Raises UserError for unknown names and wrong types.
    """
    defaults = settings_of(namespace)
    try:
        values, unknown = make_parser(namespace).parse_known_args(argv)
    except argparse.ArgumentError as error:
        name, message = error.argument_name, error.message
        if message == "expected one argument":
            message = f"{name} needs a value: write {name}={defaults[name.removeprefix('--')]!r}"
        raise UserError(message) from None
    if unknown:
        raise unknown_argument(unknown[0], defaults, renamed or {})
    fields = [(name, type(value), field(default=value)) for name, value in vars(values).items()]
    return make_dataclass("Config", fields, frozen=True)()


def report_error(error: BaseException) -> int:
    """Prints an exception that ends a script, and returns the exit code.

    A user's mistake (2) and a failed file operation (1) are one line on stderr, Ctrl-C is 130, a
    signal that `terminated_as_interrupted` turned into an exception 128 and its number, and a bug
    (1) keeps its traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    if isinstance(error, BrokenPipeError):  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, UserError):
        line = str(error)
    elif isinstance(error, OSError) and error.errno in NO_ROOM:
        where = f" while writing {error.filename}" if error.filename else ""
        line = f"{NO_ROOM[error.errno]}{where}: free some space or use another disk, run again"
    elif isinstance(error, OSError) and error.filename:
        reason = error.strerror or error.args[0]  # NumPy's, of a full disk, has no number
        line = f"{error.filename}: {reason}: check this path, its permissions and space"
    else:
        report = "".join(traceback.format_exception(error))
        print(printable(report, keep="\n\t"), end="", file=sys.stderr)
        return 1
    print(f"error: {printable(line)}", file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1


def is_read_only(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # on Windows
        return False
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def open_missing_streams() -> None:
    """Opens the null device for each of stdin, stdout and stderr that the process was not given.

    A file opened later would otherwise get the number 1 or 2, and be printed into.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
            if number and is_read_only(number):  # bash gives a script's own file this number
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with its exit code; see `report_error` for exceptions."""
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error)
    raise SystemExit(code)
