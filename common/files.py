"""Atomic file writes, directory locks, and OSErrors that carry their path."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from common.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that replaces `path` once it is complete and on disk.

    After an exception the old `path` is unchanged. Only a killed process leaves `path`.tmp behind,
    which the next write overwrites.
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
    """Adds `path` to an OSError without a file name, such as that of a failed write."""
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
        with named_errors(directory):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(
    path: Path, process_name: str, wait: bool = False, lock_file: Path | None = None
) -> Iterator[None]:
    """Lock on the output `path`, held for the block by one process at a time.

    If another process holds it, waits, or raises a UserError that calls that process
    `process_name`. `lock_file`, by default `.lock` in the directory `path`, is removed at the end;
    a killed process leaves it behind, but not the lock. Without locks in the file system the block
    runs all the same.
    """
    lock_file = lock_file or path / ".lock"
    # thread_local=False: it may be released in another thread. fallback_to_soft=False: a lock by
    # existence alone would outlive a killed process.
    lock = FileLock(lock_file, blocking=wait, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another {process_name} is writing to {path}: wait for it or choose another place"
        ) from None
    except OSError as error:
        if error.filename:  # it cannot be opened; without a name: this file system has no locks
            raise
    try:
        yield
    finally:
        with suppress(OSError):  # before the release: waiting processes then detect the removal
            lock_file.unlink()
        lock.release()


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
