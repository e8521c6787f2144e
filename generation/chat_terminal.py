"""The terminal side of inference.py: one answer, or a conversation with commands."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from common.files import atomic_file

HELP = """\
/reset         forget the conversation
/save [file]   write the conversation to a .jsonl file, as prepare_dataset.py reads it
/speed         tokens per second after each answer, on or off
/help          this text
/quit          leave, as Ctrl-D does
Ctrl-C         stop the answer; at the prompt, leave
A message may begin with a slash if a space comes first."""

# What could move the cursor or change the terminal, were a model to say it.
UNPRINTABLE = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def show(text: str, end: str = "") -> None:
    shown = sys.stdout and sys.stdout.isatty()
    print(text.translate(UNPRINTABLE) if shown else text, end=end, flush=True)


def speed_of(model: Any) -> str:
    """One line about the latest answer."""
    report = model.report
    if report is None or not report.new_tokens:
        return "[no tokens]"
    used = report.prompt_tokens + report.new_tokens
    return (
        f"[{report.new_tokens} tokens, {report.tokens_per_second:.1f} tokens/s, the first after "
        f"{report.first_token:.2f} s; {used} of {model.backend.block_size} tokens of context]"
    )


def answer_once(
    model: Any, prompt: str, options: dict[str, Any], completion: bool, speed: bool
) -> None:
    """Prints the answer to one prompt, or the prompt and its continuation."""
    model.notify = lambda line: print(f"[{line}]", file=sys.stderr)
    pieces = model.stream(prompt, not completion, **options)
    if completion:
        show(prompt)
    for piece in pieces:
        show(piece)
    show("", end="\n")
    if speed:
        print(speed_of(model), file=sys.stderr)


def converse(model: Any, options: dict[str, Any], completion: bool, speed: bool) -> None:
    """A chat, or with `completion` one continuation after another, until the user leaves."""
    try:
        import readline  # noqa: F401  arrow keys and earlier lines at the prompt
    except ImportError:  # Windows
        pass
    model.notify = lambda line: print(f"[{line}]")
    transcript: list[dict[str, str]] = []  # all that was said, dropped turns included
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
        if command is not None:
            name, argument = command.groups()
            if name in ("quit", "exit"):
                return
            elif name == "reset":
                model.reset_chat()
                transcript.clear()
                print("[the conversation is forgotten]")
            elif name == "save":
                print(f"[{save(transcript, argument)}]")
            elif name == "speed":
                speed = not speed
                print(f"[tokens per second: {'on' if speed else 'off'}]")
            elif name == "help":
                print(HELP)
            else:
                print(f"[there is no /{name}: /help lists the commands]")
        elif line.strip():
            turn = reply(model, line.strip(), options, completion)
            transcript += turn
            if speed and turn:
                print(speed_of(model))


def reply(model: Any, line: str, options: dict[str, Any], completion: bool) -> list[dict[str, str]]:
    """Prints the answer to a line as it is made; returns the turn, empty if there is no answer."""
    said, stopped = [], False
    try:
        pieces = model.stream(line, not completion, **options)
        try:
            if completion:
                show(line)
            for piece in pieces:
                said.append(piece)
                show(piece)
        except KeyboardInterrupt:
            stopped = True
        finally:
            pieces.close()  # the history takes what was said
    except ValueError as error:
        print(f"[{error}]")
        return []
    print()
    if stopped:
        print("[stopped]")
    elif model.report.stopped in ("max_new_tokens", "context"):
        limit = "max_new_tokens" if model.report.stopped == "max_new_tokens" else "the context"
        print(f"[cut: {limit} is reached]")
    if stopped and not said:
        return []
    answer = {"role": "assistant", "content": "".join(said)}
    return [{"role": "user", "content": line}, answer]


def save(transcript: list[dict[str, str]], name: str) -> str:
    """Writes the conversation to a new file; returns a line that says what happened."""
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
