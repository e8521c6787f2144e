"""Terminal interface of inference.py: one answer, or a conversation with commands."""

import json
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.files import atomic_file
from generation.conversation import Lille, Message

HELP = """\
/reset         forget the conversation
/save [file]   write the turns in the context to a .jsonl file, as prepare_dataset.py reads it
/help          this text
/quit          leave, as Ctrl-D does
Ctrl-C         stop the answer; at the prompt, leave
A message may begin with a slash if a space comes first."""

# Control characters, with which a model could move the cursor or change the terminal.
UNPRINTABLE = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def show(text: str) -> None:
    is_terminal = sys.stdout and sys.stdout.isatty()
    print(text.translate(UNPRINTABLE) if is_terminal else text, end="", flush=True)


def speed_line(model: Lille) -> str:
    """Speed and context use of the latest answer."""
    report = model.report
    context = report.prompt_tokens + report.new_tokens
    return (
        f"[{report.new_tokens} tokens, {report.tokens_per_second:.1f} tokens/s, the first after "
        f"{report.first_token:.2f} s; {context} of {model.backend.block_size} tokens of context]"
    )


def answer(model: Lille, prompt: str, options: dict[str, Any], completion: bool) -> None:
    """Prints the answer to a prompt, or the prompt and its continuation, as it is generated."""
    pieces = model.stream(prompt, not completion, **options)
    if completion:
        show(prompt)
    for piece in pieces:
        show(piece)
    show("\n")


def answer_once(
    model: Lille, prompt: str, options: dict[str, Any], completion: bool, speed: bool
) -> None:
    """Prints the answer to one prompt, and everything else on stderr."""
    model.notify = lambda line: print(f"[{line}]", file=sys.stderr)
    answer(model, prompt, options, completion)
    if speed:
        print(speed_line(model), file=sys.stderr)


def converse(model: Lille, options: dict[str, Any], completion: bool, speed: bool) -> None:
    """Runs a chat, or one continuation after another with `completion`, until the user leaves."""
    with suppress(ImportError):  # Windows
        import readline  # noqa: F401  arrow keys and earlier lines at the prompt
    model.notify = lambda line: print(f"[{line}]")
    welcome = "Lille continues what you write" if completion else "A chat with Lille"
    print(f"{welcome}; /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command = re.fullmatch(r"/(\w+)\s*(.*?)\s*", line)
        match command.groups() if command else ("", ""):
            case ("", _):
                if line.strip():
                    reply(model, line.strip(), options, completion, speed)
            case ("quit" | "exit", _):
                return
            case ("reset", _):
                model.reset_chat()
                print("[the conversation is forgotten]")
            case ("save", name):
                print(f"[{save(model.history, name)}]")
            case ("help", _):
                print(HELP)
            case (name, _):
                print(f"[there is no /{name}: /help lists the commands]")


def reply(model: Lille, line: str, options: dict[str, Any], completion: bool, speed: bool) -> None:
    """Prints the answer to a line of a conversation and how it ended; Ctrl-C stops the answer."""
    try:
        answer(model, line, options, completion)
        limit = {"max_new_tokens": "max_new_tokens", "context": "the context"}
        if model.report.stopped in limit:
            print(f"[cut: {limit[model.report.stopped]} is reached]")
    except ValueError as error:
        print(f"[{error}]")
        return
    except KeyboardInterrupt:  # the history keeps what has been printed
        print("\n[stopped]")
    if speed:
        print(speed_line(model))


def save(history: list[Message], name: str) -> str:
    """Writes the conversation to a new file; returns a line about the result."""
    if not history:
        return "nothing to save yet"
    path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")).expanduser()
    if path.exists():
        return f"{path} is already there: choose another name"
    try:
        with atomic_file(path) as file:
            file.write((json.dumps({"messages": history}, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        return f"could not write {path}: {error.strerror or error}"
    return f"saved {len(history) // 2} turns to {path}"
