"""A disk that fails at one chosen call, within this process: what `every_call.py` puts under its children.

Every call by which the package changes the folder that is watched, or makes a change there durable, is counted: open
(of a new file), write, fsync (of files and folders), rename, unlink, ftruncate, mkdir. The K-th of them fails. A write
that fails has written half of its bytes before.
"""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAULTS = ("SIGKILL", "EIO", "ENOSPC")


@dataclass
class FaultyDisk:
    """Counts calls and fails at one of them.

    Attributes:
        folder: Only calls on it and what is in it count.
        fault: One of `FAULTS`.
        at: Number of the call that fails, counted from 1; 0 for none.
        log: Told what every counted call was.
        count: Calls so far.
    """

    folder: Path
    fault: str
    at: int
    log: Callable[[str], object] = lambda _: None
    count: int = 0
    _paths: dict[int, str] = field(default_factory=dict)

    def _counts(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and (Path(path) == self.folder or self.folder in Path(path).parents)

    def step(self, kind: str, path: object, torn: Callable[[], object] = lambda: None) -> None:
        """One call: counted, and failing if it is its turn."""
        if not self._counts(path):
            return
        self.count += 1
        self.log(f"{kind} {Path(str(path)).name}")
        if self.count != self.at:
            return
        torn()
        if self.fault == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.fault)
        named = (str(path),) if kind in ("open", "rename", "unlink", "mkdir") else ()  # as the system does
        raise OSError(number, os.strerror(number), *named)

    def path_of(self, descriptor: int) -> str:
        """What a descriptor was opened at."""
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def install(self) -> None:
        """Puts itself under this process, for good."""
        disk, real_open, real_fdopen = self, os.open, os.fdopen

        def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_CREAT and not os.path.exists(path):
                disk.step("open", path)
            return real_open(path, flags, *rest, **more)

        def file_of(descriptor: int, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if mode in ("wb", "ab"):
                return io.BufferedWriter(_File(disk, descriptor))
            return real_fdopen(descriptor, mode, *rest, **more)

        os.open, os.fdopen = opened, file_of  # type: ignore[assignment]
        for name, kind in (("replace", "rename"), ("unlink", "unlink"), ("mkdir", "mkdir")):
            setattr(os, name, self._on_path(kind, getattr(os, name)))
        for name in ("fsync", "ftruncate", "pwrite"):
            setattr(os, name, self._on_descriptor(name, getattr(os, name)))

    def _on_path(self, kind: str, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if kind != "unlink" or os.path.lexists(path):
                self.step(kind, path)
            return really(path, *rest, **more)

        return call

    def _on_descriptor(self, kind: str, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *rest: Any) -> Any:
            self.step(kind, self.path_of(descriptor))
            return really(descriptor, *rest)

        return call


class _File(io.FileIO):
    """A file of such a disk."""

    def __init__(self, disk: FaultyDisk, descriptor: int) -> None:
        super().__init__(descriptor, "wb")
        self._disk = disk

    def write(self, content: Any) -> int:
        """Whole, or half if it is the turn of this call."""
        half = bytes(content)[: len(content) // 2]
        self._disk.step("write", self._disk.path_of(self.fileno()), lambda: super(_File, self).write(half))
        return super().write(content)
