"""Files that are whole or not there: atomic writes, locks, and errors that name their file."""

import errno
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path`, complete and on disk, or leaves the old `path` alone.

    Only a killed process leaves `path`.tmp behind, which the next write overwrites.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with named_errors(path), open(temporary, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to show
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Gives a failed write the name of its file, which the system's own error may not carry."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_directory(directory: Path) -> None:
    """Makes renames in `directory` survive a power cut (not possible, nor needed, on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(
    directory: Path, what: str, wait: bool = False, place: Path | None = None
) -> Iterator[None]:
    """Holds `directory` for one `what` at a time; waits, or UserError, if another process has it.

    The error names `place`, or else `directory`.

    The lock is on the directory itself, or on a file `.lock` in it where that cannot be (on NFS),
    and ends with the process. A file system without any locks has none.
    """
    if fcntl is None:
        yield
        return
    with ExitStack() as stack:
        for path, mode in ((directory, os.O_RDONLY), (directory / ".lock", os.O_RDWR | os.O_CREAT)):
            descriptor = os.open(path, mode)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                raise UserError(
                    f"another {what} is writing to {place or directory}: wait for it or choose "
                    "another place"
                ) from None
            except OSError:
                continue
        yield


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Holds back Ctrl-C and SIGTERM until the block is done (in the main thread, where they act).

    For a block that must not end halfway, or that would turn KeyboardInterrupt into another error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = []
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number, handler in old.items():
            if handler is not None:  # one from outside Python could not be put back
                signal.signal(number, lambda number, frame: seen.append(number))
        yield
    finally:
        for number, handler in old.items():  # SIGINT last: from then on it raises
            if handler is not None:
                signal.signal(number, handler)
        for number in seen:
            signal.raise_signal(number)


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_free_space(
    directory: Path, needed: float, what: str, advice: str, is_error: bool = True
) -> None:
    """UserError, or a printed note, if the disk of `directory` has fewer than `needed` bytes free.

    `directory` need not exist. The line is "DIRECTORY has X GB free, WHAT Y GB: ADVICE".
    """
    folder = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return
    line = f"{directory} has {free / 1e9:,.2f} GB free, {what} {needed / 1e9:,.2f} GB: {advice}"
    if is_error:
        raise UserError(line)
    print(f"note: {line}")
