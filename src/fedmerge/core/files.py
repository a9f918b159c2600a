"""Files that a reader sees whole or not at all and that outlive a power cut; private ones only their owner reads."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRIVATE = 0o600


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Writes a file so that a reader never sees half of it.

    Args:
        path: Replaced as a whole.
        content: A text is written as UTF-8.
        private: Only the owner may read it, whatever the umask, from the first byte on; also where it replaces a file
            that others could read.

    Raises:
        OSError: if it cannot be written, naming the file; nothing is left behind then.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(path.name + ".part")
    with _naming(path):
        try:
            if private:
                temporary.unlink(missing_ok=True)  # the rest of a killed run may be open to others
            with os.fdopen(_opened(temporary, os.O_EXCL if private else os.O_TRUNC, private=private), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except OSError:
            with suppress(OSError):  # the first fault is the one to tell
                temporary.unlink(missing_ok=True)
            raise


def append_text(path: Path, text: str, *, private: bool = False, durable: bool = False) -> bytes:
    """Appends a text as UTF-8; a new file is made if there is none. Gives back what was written.

    Args:
        path: Grows; what a killed run left of its last line stays.
        text: With its line ends.
        private: As in `write_atomically`; a file that others could read is closed to them first.
        durable: Whether it must be on the disk when this returns.

    Raises:
        OSError: if it cannot be written, naming the file.
    """
    content = text.encode("utf-8")
    with _naming(path):
        new = not path.exists()
        with os.fdopen(_opened(path, os.O_APPEND, private=private), "ab") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable and new:
            sync_folder(path.parent)
    return content


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Failures within say which file was meant; the system leaves that out where it knows a descriptor only."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _opened(path: Path, flags: int, *, private: bool) -> int:
    """A descriptor to write to; a private file has its mode before it has any content."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, PRIVATE if private else 0o666)
    if private:
        try:
            os.fchmod(descriptor, PRIVATE)  # a umask may have taken the owner's rights, an older file may be open
        except OSError:
            os.close(descriptor)
            raise
    return descriptor


def truncate(path: Path, length: int) -> None:
    """Cuts a file off after `length` bytes, on the disk too; a file that is not there stays away.

    Raises:
        OSError: if it cannot be written, naming the file.
    """
    if not path.exists():
        return
    with _naming(path):
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, length)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing, all on the disk when this returns.

    Raises:
        OSError: if one cannot be made.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Makes what was made or renamed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
