"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader never sees half of it.

    Raises:
        OSError: if it cannot be written; nothing is left behind then.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
