"""common/files.py and common/signals.py: locks, directory sync, deferred signals."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import files
from common.errors import UserError
from common.files import locked, sync_directory
from common.signals import (
    SIGNALS,
    GracefulStop,
    interrupts_deferred,
    terminated_as_interrupted,
)

HOLDER = """
import sys, time
from pathlib import Path
from common.files import locked
with locked(Path(sys.argv[1]), "run"):
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(directory: Path, seconds: float) -> subprocess.Popen:
    """A process that holds the lock on `directory` for some seconds."""
    command = [sys.executable, "-c", HOLDER, str(directory), str(seconds)]
    root = Path(files.__file__).parents[1]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_directory_is_locked_by_one_at_a_time_and_left_as_it_was(tmp_path):
    for _ in range(2):
        with locked(tmp_path, "run"):
            with pytest.raises(UserError, match="another run is writing to .*: wait for it or"):
                with locked(tmp_path, "run"):
                    pass
            assert os.listdir(tmp_path) == [".lock"]
        assert os.listdir(tmp_path) == []


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    process = holder(tmp_path, 60)
    with pytest.raises(UserError, match="another run"), locked(tmp_path, "run"):
        pass
    process.kill()
    process.wait()
    with locked(tmp_path, "run"):
        pass
    assert os.listdir(tmp_path) == []


def test_waiting_for_a_lock(tmp_path):
    process = holder(tmp_path, 0.5)
    with locked(tmp_path, "run", wait=True):
        with pytest.raises(UserError), locked(tmp_path, "run"):  # on the file that is there now
            pass
        assert os.listdir(tmp_path) == [".lock"]
    assert process.wait(timeout=10) == 0


def test_a_lock_may_be_released_in_another_thread(tmp_path):
    lock = locked(tmp_path, "run")
    lock.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lock.__exit__, None, None, None).result()
    with locked(tmp_path, "run"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="of POSIX file systems")
def test_a_file_system_without_locks_or_directory_sync_will_do(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*args):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unsupported)
    n_open = len(os.listdir("/dev/fd"))
    for _ in range(5):
        sync_directory(tmp_path)
    for number in (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):

        def no_lock(*args, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", no_lock)
            with locked(tmp_path, "run"):
                assert len(os.listdir("/dev/fd")) == n_open
        assert os.listdir(tmp_path) == []

    def damaged(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", damaged)
    with pytest.raises(OSError) as caught:
        sync_directory(tmp_path)
    assert caught.value.filename == str(tmp_path)  # so that the script's error is one line
    assert len(os.listdir("/dev/fd")) == n_open


def test_a_lock_that_cannot_be_made_is_an_error_with_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, locked(tmp_path / "file", "run"):
        pass
    assert caught.value.filename.startswith(str(tmp_path / "file"))


def test_deferred_interrupts_go_to_the_previous_handlers():
    handled = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert handled == []
        assert handled == [signal.SIGTERM]
        with ThreadPoolExecutor(1) as pool:  # no signals come to a thread: nothing to do
            assert pool.submit(lambda: interrupts_deferred().__enter__()).result() is None
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_an_interrupt_for_the_block(signum):
    previous = signal.getsignal(signum)
    with pytest.raises(KeyboardInterrupt) as interrupt, terminated_as_interrupted():
        os.kill(os.getpid(), signum)
        time.sleep(5)
    assert signal.getsignal(signum) == previous and interrupt.value.signum == signum


SCRIPT = """
import sys, time
from common.signals import GracefulStop, terminated_as_interrupted
with terminated_as_interrupted(), GracefulStop() as stop:
    print("ready", flush=True)
    while not any(stop.counts):
        time.sleep(0.01)
    if sys.argv[1] == "hang":
        time.sleep(60)
    for stream in (sys.stdout, sys.stderr):
        print("still here", file=stream, flush=True)
sys.exit(7)
"""


def test_a_second_signal_ends_a_script_at_once():
    command, root = [sys.executable, "-c", SCRIPT, "hang"], Path(files.__file__).parents[1]
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    assert "once more stops at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == -signal.SIGINT


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_a_script_outlives_its_terminal():
    import pty

    pid, terminal = pty.fork()
    if pid == 0:  # the leader of a new session, which gets SIGHUP
        os.chdir(Path(files.__file__).parents[1])
        os.execv(sys.executable, [sys.executable, "-c", SCRIPT, "print"])
    while b"ready" not in os.read(terminal, 1000):
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize("context", [GracefulStop, terminated_as_interrupted, interrupts_deferred])
def test_a_signal_that_is_ignored_stays_ignored(context):
    """SIGHUP under nohup, SIGINT in a background job of a shell script."""
    previous = {signum: signal.signal(signum, signal.SIG_IGN) for signum in SIGNALS}
    try:
        with context() as stop:
            for signum in SIGNALS:
                os.kill(os.getpid(), signum)
            assert stop is None or not any(stop.counts)
        assert {signal.getsignal(signum) for signum in SIGNALS} == {signal.SIG_IGN}
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
