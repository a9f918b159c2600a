"""A process with all its descendants, as Linux tells: processor seconds, and the cores that they may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def _fields(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` from the state on; none if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """The process itself and all that came from it and still has its parent."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _fields(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def cpu_seconds(pid: int) -> float:
    """User and system seconds of the tree so far, those of its ended and awaited children included."""
    return sum(sum(map(int, fields[11:15])) for p in descendants(pid) if (fields := _fields(p))) / _TICKS


def hold(pid: int, cores: set[int]) -> None:
    """Keeps every thread of the tree on these cores; threads to come inherit that."""
    for process in descendants(pid):
        try:
            threads = os.listdir(f"/proc/{process}/task")
        except OSError:
            continue
        for thread in threads:
            with suppress(OSError):  # it may have ended
                os.sched_setaffinity(int(thread), cores)
