"""Terminal interface of inference.py: one answer, or a conversation with commands."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

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
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            print("[that was not UTF-8 text]")
            continue
        command = re.fullmatch(r"/(\w+)\s*(.*?)\s*", line)
        match command.groups() if command else ("", ""):
            case ("", _):
                if line.strip():
                    turn = reply(model, line.strip(), options, completion)
                    transcript += turn
                    if speed and turn:
                        print(speed_line(model))
            case ("quit" | "exit", _):
                return
            case ("reset", _):
                model.reset_chat()
                transcript.clear()
                print("[the conversation is forgotten]")
            case ("save", name):
                print(f"[{save(transcript, name)}]")
            case ("speed", _):
                speed = not speed
                print(f"[tokens per second: {'on' if speed else 'off'}]")
            case ("help", _):
                print(HELP)
            case (name, _):
                print(f"[there is no /{name}: /help lists the commands]")


def reply(model: Lille, line: str, options: dict[str, Any], completion: bool) -> list[Message]:
    """Prints the answer to a line as it is generated; returns the turn, empty without an answer."""
    answer, interrupted = "", False
    try:
        pieces = model.stream(line, not completion, **options)
        if completion:
            show(line)
        for piece in pieces:
            answer += piece
            show(piece)
    except ValueError as error:
        print(f"[{error}]")
        return []
    except KeyboardInterrupt:
        interrupted = True
    print()
    if interrupted:
        print("[stopped]")
    elif model.report.stopped != "end":
        limit = "the context" if model.report.stopped == "context" else model.report.stopped
        print(f"[cut: {limit} is reached]")
    if interrupted and not answer:
        return []
    return [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def save(transcript: list[Message], name: str) -> str:
    """Writes the conversation to a new file; returns a line about the result."""
    if not transcript:
        return "nothing to save yet"
    path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")).expanduser()
    if path.exists():
        return f"{path} is already there: choose another name"
    try:
        with atomic_file(path) as file:
            line = json.dumps({"messages": transcript}, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))
    except OSError as error:
        return f"could not write {path}: {error.strerror or error}"
    return f"saved {len(transcript) // 2} turns to {path}"
