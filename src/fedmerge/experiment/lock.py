"""One process per run folder: a lock that the system takes back when its holder dies."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fedmerge.core.errors import UsageError

if sys.platform != "win32":  # which has no such locks: two processes are not kept apart there
    import fcntl

NAME = ".lock"
_MOST_DIGITS = 20
_PAUSE = 0.25
"""Seconds between two tries to hold a folder."""
_WAIT, _MOST_WAITS = 0.01, 50
"""Seconds between two looks at who holds a lock, and their number: its number is written just after it is taken."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; within the block no other process can.

    Args:
        folder: Must exist.

    Raises:
        UsageError: if another process holds it; names that process.
        OSError: if the folder cannot be written.
    """
    descriptor = _taken(folder / NAME)
    try:
        yield
    finally:
        with suppress(OSError):  # the file itself holds nobody up
            if _is_at(descriptor, folder / NAME):  # the folder may have been replaced, and its new one held by another
                (folder / NAME).unlink()  # while it is held: whoever waits for it sees that it is gone
        os.close(descriptor)


@contextmanager
def patient_lock(folder: Path, seconds: float) -> Iterator[None]:
    """`run_lock` that waits for another process or thread to leave the folder.

    Args:
        folder: Must exist.
        seconds: How long to wait.

    Raises:
        UsageError: if it is held for longer.
        OSError: if the folder cannot be written.
    """
    give_up = time.monotonic() + seconds
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run_lock(folder))
                break
            except UsageError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(_PAUSE)
        yield


def _taken(path: Path) -> int:
    """A descriptor that holds the lock; the file at `path` is the one that is locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock(descriptor, path)
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed it in the meantime


def _lock(descriptor: int, path: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{path.parent} is in use by process {_holder(descriptor)}; wait for it or end it, or choose another folder"
        ) from error


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Number of the process that holds it: not one that has died, as the file of a killed holder may still say."""
    found = "(unknown)"
    for _ in range(_MOST_WAITS):
        words = os.pread(descriptor, _MOST_DIGITS, 0).split()
        found = words[0].decode("ascii") if words and words[0].isdigit() else found
        if found.isdigit() and _is_alive(int(found)):
            return found
        time.sleep(_WAIT)
    return found


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
