"""What a site's program tells the people there: lines of its log, passed on as they are added."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

NEWS = "fedmerge: "
"""Begins each line that people should see."""
_MOST = 1 << 20
"""Bytes that are read at once; of more, the last ones."""


class NewsFormatter(logging.Formatter):
    """Marks every line of a message, and no line of a traceback, as one that people should see."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """The message with its marks."""
        return "\n".join(f"{NEWS}{line}" for line in record.getMessage().splitlines())


class NewLines:
    """Whole lines that are added to a file from now on; the file may not be there yet, and may begin anew.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._rest = path, 0, b""
        with suppress(OSError):
            self._place = path.stat().st_size

    def take(self) -> list[str]:
        """Lines that have come since the last time."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                start = self._place if self._place <= size else 0
                file.seek(max(start, size - _MOST))
                added = file.read(_MOST)
                self._place = file.tell()
        except OSError:
            return []
        *lines, self._rest = (self._rest + added).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]
