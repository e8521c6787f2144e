"""C++ files, compiled when first needed and kept in ~/.cache/lille."""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")


def cache_folder() -> Path:
    """Where the compiled files are kept: ~/.cache/lille, or a new folder where that cannot be."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lille"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) or any(folder.glob("*.so")):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    folder = tempfile.mkdtemp(prefix="lille-")  # every process compiles its own
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def native_library(source: Path, *flags: str) -> ctypes.CDLL | None:
    """The file `source`, compiled for this processor, or None where nothing here can compile it.

    The result is kept under a name made of all it depends on, so only the first use waits.
    """
    compiler = shlex.split(
        os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
    )
    if not compiler or not source.exists():
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0].splitlines()
        names = ("model name", "flags", "Features", "CPU part")  # the last two: ARM
        processor = "\n".join(line for line in lines if line.startswith(names))
    except OSError:
        processor = platform.processor() + platform.machine()
    cache = cache_folder()
    for extra in (["-march=native", "-fopenmp"], ["-march=native"], []):
        command = [*compiler, *FLAGS, *flags, *extra]
        depends = [source.read_text("utf-8"), *command, processor]
        key = hashlib.sha256("\0".join(depends).encode()).hexdigest()[:16]
        library = cache / f"{source.stem}-{key}.so"
        try:
            if not library.exists():
                with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                    built = Path(folder) / library.name
                    command += [str(source), "-o", str(built)]
                    subprocess.run(command, check=True, capture_output=True, timeout=120)
                    os.replace(built, library)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError):
            with contextlib.suppress(OSError):
                library.unlink()  # a damaged one is compiled again next time
    return None
