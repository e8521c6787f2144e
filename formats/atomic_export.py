"""Atomic replacement of an exported folder or file."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.files import locked, named_errors, sync_directory
from common.signals import interrupts_deferred


@contextmanager
def atomic_export(
    target: Path, names: Sequence[str] = (), optional: Sequence[str] = (), magic: bytes = b""
) -> Iterator[Path]:
    """A path to write that becomes `target` after the block, or is removed if the block fails.

    An export that is a folder has the files `names` and may have those of `optional`; without
    `names` it is one file, which begins with `magic`. An earlier export is replaced at the end.
    Raises UserError when `target` holds anything else, and while another process exports to it.
    Only a killed process leaves a hidden `.NAME.exporting` behind, which the next export removes.
    """
    target = Path(os.path.realpath(target))
    check_target(target, names, optional, magic)
    temporary = target.with_name(f".{target.name}.exporting")
    old = target.with_name(f".{target.name}.replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target, "export", lock_file=target.with_name(f".{target.name}.lock")):
        remove(temporary)  # left by a killed export
        if names and old.exists() and not target.exists():  # killed between the two renames
            os.replace(old, target)
        temporary.mkdir()
        try:
            export = temporary if names else temporary / target.name
            with named_errors(target):
                yield export
                for path in filter(Path.is_file, temporary.rglob("*")):
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
            check_target(target, names, optional, magic)  # the export has taken some time
            with interrupts_deferred():
                if names and target.exists():  # a folder cannot be renamed onto one with files
                    remove(old)
                    os.replace(target, old)
                os.replace(export, target)
                sync_directory(target.parent)
                remove(old if names else temporary)
        except BaseException:
            with interrupts_deferred():
                remove(temporary)
            raise


def check_target(target: Path, names: Sequence[str], optional: Sequence[str], magic: bytes) -> None:
    """Raises UserError when an export to `target` would destroy something else."""
    if not names:
        if target.is_dir():
            raise UserError(f"{target} is a folder: give the path of a file to write")
        if target.exists() and first_bytes(target, len(magic)) != magic:
            raise UserError(f"{target} is there and is no earlier export: give another file")
        return
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: give the path of a folder to write")
    folders = {name.partition("/")[0] for name in (*names, *optional) if "/" in name}
    files = set()
    for path in target.iterdir() if target.exists() else ():
        inner = path.iterdir() if path.name in folders and path.is_dir() else [path]
        files |= {file.relative_to(target).as_posix() for file in inner}
    for name in sorted(files.difference(names, optional)):
        raise UserError(
            f"{target} holds {name}, which is not of an earlier export: give another folder"
        )
    missing = [name for name in names if name not in files]
    if files and missing:
        raise UserError(
            f"{target} is no earlier export (it has no {missing[0]}): give another folder"
        )


def first_bytes(path: Path, n: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(n)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
