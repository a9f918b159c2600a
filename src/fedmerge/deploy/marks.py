"""Which processes belong to a program that was started here: those of its group, and those that carry its mark.

A mark is a variable of the environment, which everything that a program starts inherits. Groups alone are not enough:
Flower's programs start others in sessions of their own, which outlive their parent. Marks alone are not enough: a
program may overwrite its environment, as nginx does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MARK = "FEDMERGE_PROCESSES"
"""The variable: marks between slashes, outermost first."""
_PROC = Path("/proc") if Path("/proc/self/environ").exists() else None
"""Where Linux tells of processes; None elsewhere, where marks cannot be seen."""
_LOOK = 0.05


class Program(NamedTuple):
    """A program that was started in a group of its own.

    Attributes:
        group: Its number, which is its first process's.
        mark: In its environment.
    """

    group: int
    mark: str


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    group: int
    born: str


def birth(pid: int) -> str | None:
    """When a process began, as the system tells it: with its number it is one process for ever. None: there is none."""
    found = _read(pid) if _PROC else next((each for each in _listed() if each.pid == pid), None)
    return None if found is None else found.born


def end(programs: Iterable[Program], *, grace: float, look: float = _LOOK) -> None:
    """Ends all processes of some programs: by SIGTERM, and by SIGKILL what is left after `grace` seconds.

    Processes that this one has started itself must be waited for meanwhile or afterwards by whoever started them.
    """
    programs = list(programs)
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        last = time.monotonic() + seconds
        asked: set[int] = set()
        while left := members(programs):
            for pid in left - asked:
                _send(pid, programs, number)
            asked |= left  # who comes up meanwhile is asked too
            if time.monotonic() >= last:
                break
            time.sleep(look)


def members(programs: Iterable[Program]) -> set[int]:
    """Numbers of the processes of some programs that live now."""
    programs = list(programs)
    if _PROC is not None:
        pids = (int(path.name) for path in _PROC.iterdir() if path.name.isdigit())
        return {pid for pid in pids if _belongs(pid, programs)}
    listed, groups = _listed(), {program.group for program in programs}
    found = {each.pid for each in listed if each.group in groups}
    while new := {each.pid for each in listed if each.parent in found} - found:
        found |= new
    return found


def _belongs(pid: int, programs: Iterable[Program]) -> bool:
    """Whether a process that lives now is one of some programs; on Linux."""
    found = _read(pid)
    if found is None:
        return False
    marks = _marks(pid)
    return any(found.group == program.group or program.mark in marks for program in programs)


def _marks(pid: int) -> list[str]:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or somebody else's
        return []
    beginning = f"{MARK}=".encode()
    told = [part for part in content.split(b"\0") if part.startswith(beginning)]
    return told[0][len(beginning) :].decode("utf-8", "replace").split("/") if told else []


def _read(pid: int) -> _Process | None:
    """A process that lives, from Linux's own table; its name there may hold anything, also parentheses."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    state, parent, group, born = fields[0], int(fields[1]), int(fields[2]), fields[19].decode()
    return None if state in (b"Z", b"X") else _Process(pid, parent, group, born)


def _listed() -> list[_Process]:
    """All processes that live, where there is no such table."""
    command = ["ps", "-A", "-o", "pid=,ppid=,pgid=,stat=,lstart="]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    rows = [line.split(None, 4) for line in told.splitlines()]
    return [
        _Process(int(row[0]), int(row[1]), int(row[2]), row[4].strip())
        for row in rows
        if len(row) == 5 and not row[3].startswith("Z")
    ]


def _send(pid: int, programs: Iterable[Program], number: signal.Signals) -> None:
    """A signal to a process, unless its number has passed to another one meanwhile."""
    with suppress(OSError):
        descriptor = _handle_of(pid)
        if descriptor is None:
            if _PROC is None or _belongs(pid, programs):
                os.kill(pid, number)
            return
        try:
            if _belongs(pid, programs):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def _handle_of(pid: int) -> int | None:
    """A descriptor of a process; None where the system, this Python or a sandbox has none.

    Raises:
        ProcessLookupError: if there is no such process.
    """
    opened = getattr(os, "pidfd_open", None)
    if opened is None or not hasattr(signal, "pidfd_send_signal"):
        return None
    try:
        return int(opened(pid))
    except ProcessLookupError:
        raise
    except OSError:
        return None
