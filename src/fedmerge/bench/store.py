"""The results of a benchmark: one file to which whole lines are appended, and nothing that a kill can tear."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedmerge.bench.result import Result, from_plain, to_line
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.strict_json import parse_json_table
from fedmerge.core.text import shortened

RUNS = "runs.jsonl"
LOCK = "bench.lock"


@dataclass(frozen=True)
class Store:
    """Results by key and by request, and the open file that new ones are appended to.

    Attributes:
        file: Positioned at its end.
        by_key: The last result of each key.
    """

    file: BinaryIO
    by_key: dict[str, Result]

    def append(self, result: Result) -> None:
        """Writes one line; it is on the disk when this returns."""
        self.file.write(to_line(result).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.by_key[result.key] = result


@contextmanager
def open_store(folder: Path) -> Iterator[Store]:
    """The store of a folder for one writer at a time; a torn last line is cut off.

    Raises:
        UsageError: if another benchmark writes this folder, or it cannot be written.
        FedmergeError: if a line in the middle is damaged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}. Choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"{folder} is being written by another benchmark; wait for it or choose another --out"
            ) from error
        _cut_torn_line(folder / RUNS)
        found = read_results(folder)
        with (folder / RUNS).open("ab") as file:
            yield Store(file, {result.key: result for result in found})


def _cut_torn_line(path: Path) -> None:
    """Drops what follows the last line break: the run was killed while it wrote that."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())


def read_results(folder: Path) -> tuple[Result, ...]:
    """Every whole line, in order; a torn last one is left out.

    Raises:
        FedmergeError: naming the file and the line that is damaged.
    """
    path = folder / RUNS
    if not path.exists():
        return ()
    lines = path.read_bytes().split(b"\n")[:-1]
    return tuple(result_from(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line)


def result_from(line: bytes, where: str) -> Result:
    """The result that one line of the file holds.

    Raises:
        FedmergeError: naming `where` and what does not fit.
    """
    try:
        plain = parse_json_table(line)
    except ValueError as error:
        raise FedmergeError(
            f"{where} is damaged: {shortened(str(error))}; delete that line, its run will be made again"
        ) from error
    return from_plain(plain, where)
