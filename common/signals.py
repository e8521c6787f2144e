"""SIGINT and SIGTERM end a run between two steps, with a checkpoint."""

import os
import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal stopped the run, after it was saved; the message says how to continue."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class StopSignals:
    """Counts SIGINT and SIGTERM in `seen` for the loop to see; a second one acts at once.

    Not so for one of several ranks (`alone` False). There a launcher may pass on what the process
    got already, and kills what does not end in time; and from the first rank's exit on it sends
    SIGTERM to the others, which must not end rank 0 before it has said what it saved.
    """

    def __init__(self, alone: bool = True, speaks: bool = True):
        self.alone, self.speaks = alone, speaks
        self.seen = [0] * len(SIGNALS)
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        in_main_thread = threading.current_thread() is threading.main_thread()
        for signum in SIGNALS if in_main_thread else ():
            self.previous[signum] = signal.signal(signum, self.note)
        return self

    def note(self, signum: int, frame: Any) -> None:
        if self.speaks and not any(self.seen):
            again = "; once more stops at once" if self.alone else ""
            os.write(2, b"\nstopping after this step" + again.encode() + b"\n")
        self.seen[SIGNALS.index(signum)] += 1
        if self.alone:
            self.restore()

    def restore(self) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def __exit__(self, *error: Any) -> None:
        if self.alone:
            self.restore()
