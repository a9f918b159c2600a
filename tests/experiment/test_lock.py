"""A run folder belongs to one process at a time, and whoever comes second is told whose it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedmerge.core.errors import UsageError
from fedmerge.experiment.book import held, new_run_folder
from fedmerge.experiment.lock import NAME, patient_lock, run_lock

if sys.platform != "win32":
    import fcntl

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")

HOLD = """
import sys, time
from pathlib import Path
from fedmerge.experiment.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder_of(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def taken(folder: Path) -> str:
    """The message that somebody else holds it."""
    with pytest.raises(UsageError) as caught, run_lock(folder):
        pytest.fail("two hold it")
    return str(caught.value)


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    process = holder_of(tmp_path)
    assert process.stdout is not None
    try:
        expected = f"{tmp_path} is in use by process {process.pid}; wait for it or end it, or choose another folder"
        assert taken(tmp_path) == expected
        with pytest.raises(UsageError, match=re.escape(expected)), new_run_folder(tmp_path):
            pytest.fail("two hold it")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert (tmp_path / NAME).read_text() == f"{process.pid}\n"
    with run_lock(tmp_path):
        assert (tmp_path / NAME).read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / NAME).exists()


def test_this_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        assert f"in use by process {os.getpid()};" in taken(tmp_path)
        assert (tmp_path / NAME).read_text() == f"{os.getpid()}\n"  # the loser changes nothing
    with run_lock(tmp_path):
        pass


def test_the_lock_is_its_owners_and_shorter_numbers_leave_nothing_of_longer_ones(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("9" * 18 + "\n")
    (tmp_path / NAME).chmod(0o600)
    with run_lock(tmp_path):
        assert (tmp_path / NAME).read_text() == f"{os.getpid()}\n"
        assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


def test_a_failure_within_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    with held(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        raise ZeroDivisionError
    with held(tmp_path):
        pass


def test_a_lock_file_that_cannot_be_removed_frees_the_folder_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, run_lock(tmp_path):
        patch.setattr("os.unlink", broken)
    with run_lock(tmp_path):
        pass


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"cannot write run folder .*gone: No such file or directory"),
        held(tmp_path / "gone"),
    ):
        pytest.fail("it is not there")


def test_a_file_that_was_removed_in_the_meantime_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder goes between another's opening and locking: the second must not hold a file that nobody else sees."""
    flock, left = fcntl.flock, [1]

    def removed_before(descriptor: int, operation: int) -> None:
        if left.pop() if left else 0:
            (tmp_path / NAME).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with run_lock(tmp_path):
        assert (tmp_path / NAME).exists()
        assert f"in use by process {os.getpid()};" in taken(tmp_path)


def _held_silently(folder: Path, words: str) -> int:
    """A descriptor that holds the folder without saying whose it is."""
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, words.encode())
    return descriptor


@pytest.mark.parametrize(
    ("words", "told"),
    [("", "(unknown)"), ("root\n", "(unknown)"), ("99999999999999\n", "99999999999999"), ("1\n", "1")],
)
def test_a_holder_that_says_nothing_sensible(tmp_path: Path, words: str, told: str) -> None:
    """Process 1 is always there; no system has numbers with 14 digits."""
    descriptor = _held_silently(tmp_path, words)
    try:
        assert f"in use by process {told};" in taken(tmp_path)
    finally:
        os.close(descriptor)


def test_a_holder_is_awaited_that_has_not_written_its_number_yet(tmp_path: Path) -> None:
    """The file still names a process that was killed."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    descriptor = _held_silently(tmp_path, f"{dead.pid}\n")
    timer = threading.Timer(0.1, lambda: os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0))
    timer.start()
    try:
        assert f"in use by process {os.getpid()};" in taken(tmp_path)
    finally:
        timer.join()
        os.close(descriptor)


def test_a_folder_with_something_in_it_is_no_new_run(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UsageError, match="exists and is not empty; nothing was overwritten"), new_run_folder(tmp_path):
        pytest.fail("it is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_only_a_lock_that_is_left_over_is_nothing(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("1\n")
    with new_run_folder(tmp_path):
        assert (tmp_path / NAME).read_text() == f"{os.getpid()}\n"


def test_a_holder_that_is_alive_is_named_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", pytest.fail)
    with run_lock(tmp_path):
        assert f"in use by process {os.getpid()};" in taken(tmp_path)


def test_somebody_elses_process_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_yours(process: int, number: int) -> None:
        assert (process, number) == (4711, 0)  # 0 asks and sends nothing
        raise PermissionError

    monkeypatch.setattr("os.kill", not_yours)
    monkeypatch.setattr("time.sleep", pytest.fail)
    descriptor = _held_silently(tmp_path, "4711\n")
    try:
        assert "in use by process 4711;" in taken(tmp_path)
    finally:
        os.close(descriptor)


def test_the_lock_of_a_folder_that_took_another_s_place_is_left_to_its_holder(tmp_path):
    old, new = tmp_path / "run", tmp_path / "other"
    old.mkdir()
    new.mkdir()
    with run_lock(old):
        old.rename(tmp_path / "gone")
        new.rename(old)
        second = run_lock(old)
        second.__enter__()
    assert (old / ".lock").exists()
    with pytest.raises(UsageError, match="in use by process"), run_lock(old):
        pass
    second.__exit__(None, None, None)


def test_whoever_is_patient_gets_the_folder_when_it_is_free(tmp_path):
    held = run_lock(tmp_path)
    held.__enter__()
    threading.Timer(0.4, held.__exit__, (None, None, None)).start()
    with patient_lock(tmp_path, 20.0):
        pass
    with run_lock(tmp_path), pytest.raises(UsageError, match="in use by"), patient_lock(tmp_path, 0.3):
        pass
