"""Terminal interface of inference.py: one answer, or a conversation with commands."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import one_line, printable
from common.files import atomic_file
from generation.conversation import Lille, Message

HELP = """\
/reset         forget the conversation
/save [file]   write the conversation to a .jsonl file, as prepare_dataset.py reads it
/speed         tokens per second after each answer, on or off
/help          this text
/quit          leave, as Ctrl-D does
Ctrl-C         stop the answer; at the prompt, leave
A message may begin with a slash if a space comes first."""


def show(text: str) -> None:
    is_terminal = sys.stdout and sys.stdout.isatty()
    print(printable(text, keep="\n\t") if is_terminal else text, end="", flush=True)


def typed(text: str) -> str:
    """Decodes typed text as UTF-8 in any locale (LC_ALL=C too); UnicodeError if it is invalid."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8")


def speed_line(model: Lille) -> str:
    """Speed and context use of the latest answer."""
    report = model.report
    context = report.prompt_tokens + report.new_tokens
    return (
        f"[{report.new_tokens} tokens, {report.tokens_per_second:.1f} tokens/s, the first after "
        f"{report.first_token:.2f} s; {context} of {model.backend.block_size} tokens of context]"
    )


def answer_once(
    model: Lille, prompt: str, options: dict[str, Any], completion: bool, speed: bool
) -> None:
    """Prints the answer to one prompt, or the prompt and its continuation."""
    model.notify = lambda line: print(f"[{line}]", file=sys.stderr)
    pieces = model.stream(prompt, not completion, **options)
    if completion:
        show(prompt)
    for piece in pieces:
        show(piece)
    show("\n")
    if speed:
        print(speed_line(model), file=sys.stderr)


def converse(model: Lille, options: dict[str, Any], completion: bool, speed: bool) -> None:
    """Runs a chat, or one continuation after another with `completion`, until the user leaves."""
    try:
        import readline  # noqa: F401  arrow keys and earlier lines at the prompt
    except ImportError:  # Windows
        pass
    model.notify = lambda line: print(f"[{line}]")
    transcript: list[Message] = []  # the whole conversation, dropped turns included
    welcome = "Lille continues what you write" if completion else "A chat with Lille"
    print(f"{welcome}; /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = typed(input("> "))
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeError:
            print("[that was not UTF-8 text]")
            continue
        command = re.match(r"/(\w+)(.*)", line)
        try:
            match command.groups() if command else ("", ""):
                case ("", _):
                    if line.strip():
                        answered = reply(model, line.strip(), options, completion, transcript)
                        if speed and answered:
                            print(speed_line(model))
                case ("quit" | "exit", _):
                    return
                case ("reset", _):
                    model.reset_chat()
                    transcript.clear()
                    print("[the conversation is forgotten]")
                case ("save", name):
                    print(f"[{printable(save(transcript, name.strip()))}]")
                case ("speed", _):
                    speed = not speed
                    print(f"[tokens per second: {'on' if speed else 'off'}]")
                case ("help", _):
                    print(HELP)
                case (name, _):
                    print(f"[there is no /{name:.40}: /help lists the commands]")
        except KeyboardInterrupt:
            print("\n[stopped]")


def reply(
    model: Lille,
    line: str,
    options: dict[str, Any],
    completion: bool,
    transcript: list[Message],
) -> bool:
    """Prints the answer to a line as it is generated; whether there was one.

    The question and the answer, as far as it got, become part of the transcript.
    """
    answer = {"role": "assistant", "content": ""}
    turn = [{"role": "user", "content": line}, answer]
    note = ""
    try:
        pieces = model.stream(line, not completion, **options)
        if completion:
            show(line)
        for piece in pieces:
            if not answer["content"]:
                transcript += turn
            answer["content"] += piece
            show(piece)
        if not answer["content"]:
            transcript += turn
        if model.report.stopped != "end":
            limit = "the context" if model.report.stopped == "context" else model.report.stopped
            note = f"cut: {limit} is reached"
    except KeyboardInterrupt:
        note = "stopped"
    except Exception as error:  # the model's, such as a lack of memory: the chat goes on
        note = str(error) if isinstance(error, ValueError) else f"no answer: {one_line(error)}"
    print()
    if note:
        print(f"[{printable(note)}]")
    return bool(transcript) and transcript[-1] is answer


def save(transcript: list[Message], name: str) -> str:
    """Writes the conversation to a new file; returns a line about the result."""
    if not transcript:
        return "nothing to save yet"
    name = name or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")
    try:
        path = Path(name).expanduser()
        if path.exists():
            return f"{path} is already there: choose another name"
        with atomic_file(path) as file:
            line = json.dumps({"messages": transcript}, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))
    except (OSError, RuntimeError, ValueError) as error:  # also: no such user, a NUL in the name
        return f"could not write {name:.200}: {getattr(error, 'strerror', None) or error}"
    return f"saved {len(transcript) // 2} turns to {path}"
