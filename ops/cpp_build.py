"""C++ files, compiled at their first use and kept in ~/.cache/lille."""

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


def processor() -> str:
    """Model and instruction sets of the CPU, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    names = ("model name", "flags", "Features", "CPU part")  # the last two: ARM
    return "\n".join(line for line in lines if line.startswith(names))


@functools.cache
def native_library(source: Path, *flags: str) -> ctypes.CDLL | None:
    """The file `source`, compiled for this processor; None where it cannot be compiled.

    The file name of the library is a hash of all it depends on, so only the first use waits.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lille"
    for extra in (["-march=native", "-fopenmp"], ["-march=native"], []):
        command = [*shlex.split(compiler), *FLAGS, *flags, *extra]
        dependencies = "\0".join([source.read_text("utf-8"), *command, processor()])
        key = hashlib.sha256(dependencies.encode()).hexdigest()[:16]
        library = cache / f"{source.stem}-{key}.so"
        try:
            if not library.exists():
                cache.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=cache) as folder:
                    output = Path(folder) / library.name
                    command += [str(source), "-o", str(output)]
                    subprocess.run(command, check=True, capture_output=True, timeout=120)
                    os.replace(output, library)  # whole, even if several processes compile
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError):
            continue
    return None
