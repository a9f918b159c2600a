"""Folders that are replaced as a whole: a process that is killed leaves the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmerge.core.files import PRIVATE, make_folder, sync_folder

_NEW, _OLD = ".new", ".old"


@contextmanager
def replacing(place: Path, *, private: bool = True) -> Iterator[Path]:
    """A new folder to write into, which takes the place of an earlier one when the block ends without a fault.

    Where the system can exchange two folders in one step (Linux), whoever reads sees the old one or the new one at any
    moment. Elsewhere a process that is killed can leave the old one under a name of its own: who reads calls
    `put_back` first. One process at a time may do this.

    Args:
        place: The folder.
        private: Whether all files are the owner's alone.
    """
    new, old = _beside(place, _NEW), _beside(place, _OLD)
    put_back(place)
    shutil.rmtree(new, ignore_errors=True)
    make_folder(place.parent)
    new.mkdir(mode=0o700)
    new.chmod(0o700)  # a umask may have taken the owner's rights
    try:
        yield new
        if not private and place.exists():
            new.chmod(place.stat().st_mode)
        _sync(new, private=private)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if place.exists() and not _exchanged(new, place):
        place.rename(old)
    if not place.exists():
        new.rename(place)
    sync_folder(place.parent)
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)


def put_back(place: Path) -> None:
    """Undoes a replacement that a killed process began and did not end, or removes what is left of one that it ended.

    Args:
        place: The folder.
    """
    old = _beside(place, _OLD)
    if not old.exists():
        return
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(place)


_HERE, _EXCHANGE = -100, 2
"""Of the system call: paths start from the current folder; both names change places."""


def _exchanged(one: Path, other: Path) -> bool:
    """Lets two folders change places in one step; False where the system or the disk cannot."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _beside(place: Path, ending: str) -> Path:
    return place.with_name(f".{place.name}{ending}")


def _sync(folder: Path, *, private: bool) -> None:
    """Brings every file to the disk, and gives it to its owner alone."""
    for path in [folder, *folder.rglob("*")]:
        if private:
            path.chmod(0o700 if path.is_dir() else PRIVATE)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
