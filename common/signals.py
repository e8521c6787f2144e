"""SIGINT and SIGTERM: graceful stop of a training run, deferral, and clean-up."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal stopped the run after it was saved; the message says how to continue."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class GracefulStop:
    """Counts SIGINT and SIGTERM in `counts`, in the order of SIGNALS, for the loop to check.

    With `exit_on_second` a second signal has its usual effect. One of several ranks must not exit
    on it: a launcher may pass on a signal that the process got already, and it sends SIGTERM to
    the other ranks as soon as one exits, which must not end rank 0 before its report.
    """

    def __init__(self, exit_on_second: bool = True, verbose: bool = True):
        self.exit_on_second, self.verbose = exit_on_second, verbose
        self.counts = [0] * len(SIGNALS)
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        for signum in SIGNALS:
            self.previous[signum] = signal.signal(signum, self.count)
        return self

    def count(self, signum: int, frame: Any) -> None:
        if self.verbose and not any(self.counts):
            hint = "; once more stops at once" if self.exit_on_second else ""
            os.write(2, b"\nstopping after this step" + hint.encode() + b"\n")
        self.counts[SIGNALS.index(signum)] += 1
        if self.exit_on_second:
            self.restore()

    def restore(self) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def __exit__(self, *error: Any) -> None:
        if self.exit_on_second:
            self.restore()


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Delays SIGINT and SIGTERM until the end of the block (in the main thread, which gets them).

    For a block that must not end halfway, or that would turn KeyboardInterrupt into another error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in previous:
            signal.signal(number, lambda number, frame: pending.append(number))
        yield
    finally:
        for number, handler in previous.items():  # SIGINT last: from then on it raises
            signal.signal(number, handler)
        for number in pending:
            signal.raise_signal(number)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt in the block, so that its clean-up runs."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
