"""SIGINT, SIGTERM and SIGHUP: graceful stop of a training run, deferral, and clean-up.

A signal that the process ignores, as SIGHUP under nohup and SIGINT in a shell script's background
job, stays ignored.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP, of a terminal that is closed
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
STOPPING = "stopping after this step is saved"


class Interrupted(KeyboardInterrupt):
    """A signal ended the script; the message says what was saved and how to continue."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def handle(handler: Callable[[int, Any], None] | signal.Handlers) -> dict[int, Any]:
    """Installs a handler of SIGNALS, but for ignored ones; returns the previous handlers."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    kept = (signal.SIG_IGN, None)  # None: not installed by Python
    return {s: signal.signal(s, handler) for s, old in handlers.items() if old not in kept}


def restore(handlers: dict[int, Any]) -> None:
    for signum, handler in reversed(handlers.items()):  # SIGINT last: from then on it may raise
        signal.signal(signum, handler)


def drop_lost_terminal() -> None:
    """Points stdout and stderr to /dev/null if their terminal is closed: a print would raise."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


class GracefulStop:
    """Counts SIGNALS in `counts`, in their order, for the loop to check.

    With `exit_on_second` a second signal has its usual effect; in a script it ends the process at
    once, as SIGKILL would, even one that hangs. One of several ranks must not exit on it: a
    launcher may pass on a signal that the process got already, and it sends SIGTERM to the other
    ranks as soon as one exits, which must not end rank 0 before its report. Hence no promise to
    save either: the loop makes it, once all ranks have answered.
    """

    def __init__(self, exit_on_second: bool = True):
        self.exit_on_second = exit_on_second
        self.counts = [0] * len(SIGNALS)
        self.previous: dict[int, Any] = {}  # handlers

    def __enter__(self) -> "GracefulStop":
        self.previous = handle(self.count)
        return self

    def count(self, signum: int, frame: Any) -> None:
        self.counts[SIGNALS.index(signum)] += 1
        if self.exit_on_second:
            ours = [s for s, handler in self.previous.items() if handler is raise_interrupted]
            restore(self.previous | dict.fromkeys(ours, signal.SIG_DFL))
        drop_lost_terminal()
        if self.exit_on_second and sum(self.counts) == 1:
            hint = "once more stops at once, with the checkpoints before it kept"
            with suppress(OSError):
                os.write(2, f"\n{STOPPING}; {hint}\n".encode())

    def __exit__(self, *error: Any) -> None:
        if self.exit_on_second:
            restore(self.previous)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Delays SIGNALS until the end of the block (in the main thread, which gets them).

    For a block that must not end halfway, or that would turn KeyboardInterrupt into another error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending = []
    previous = handle(lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        restore(previous)
        for number in pending:
            signal.raise_signal(number)


def raise_interrupted(signum: int, frame: Any) -> None:
    drop_lost_terminal()
    raise Interrupted(signum, "interrupted")


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Makes SIGNALS raise Interrupted, a KeyboardInterrupt, in the block: its clean-up runs."""
    previous = handle(raise_interrupted)
    try:
        yield
    finally:
        restore(previous)


@contextmanager
def terminated_at_once() -> Iterator[None]:
    """Gives SIGNALS their default effect in a block that waits in C++, which no handler ends."""
    previous = handle(signal.SIG_DFL)
    try:
        yield
    finally:
        restore(previous)
