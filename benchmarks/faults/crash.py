"""Runs in children that are killed or whose disk fails, and what is left of them.

Children are forked from one process that has loaded everything, so that a start takes milliseconds. A child tells its
parent through a pipe which rounds it has announced, the moment that it does.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedmerge.cli import main
from fedmerge.core.errors import UsageError
from fedmerge.data import FederatedData
from fedmerge.experiment.book import Book
from fedmerge.experiment.config import Config, build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import RoundRecord
from fedmerge.experiment.resume import resume_run

WORDS = (
    "fedmerge", "source=digits", "partition=rotations", "partition.clients=5", "partition.train=10",
    "partition.validation=4", "partition.test=6", "model.hidden=[8]", "training.epochs=1", "evaluate_every=1",
    "method.num_models=2",
)  # fmt: skip
TABLE: dict[str, Any] = {
    "source": {"name": "digits"},
    "partition": {"name": "rotations", "clients": 5, "train": 10, "validation": 4, "test": 6},
    "model": {"name": "mlp", "hidden": [8]},
    "training": {"epochs": 1},
    "evaluate_every": 1,
    "method": {"name": "fedmerge", "num_models": 2},
}
RESULTS = Path("benchmarks/results/faults")


@dataclass(frozen=True)
class World:
    """What all children run.

    Attributes:
        config: Of the run.
        data: Its clients.
    """

    config: Config
    data: FederatedData

    @property
    def words(self) -> tuple[str, ...]:
        """The same for the command line."""
        return (*WORDS, f"rounds={self.config.run.rounds}", f"checkpoint_every={self.config.run.checkpoint_every}")


def warm(rounds: int, every: int = 1) -> World:
    """Loads everything and plays one run without a folder, so that children find it all done."""
    torch.set_num_threads(1)
    config = build_config({**TABLE, "rounds": rounds, "checkpoint_every": every})
    data = load_data(config.source, config.partition, config.run.seed, config.model)
    execute_config(config, data=data)
    return World(config, data)


@dataclass
class Child:
    """A forked process.

    Attributes:
        process: Its number.
        pipe: Where it says what it announces.
        told: Lines read from there so far.
    """

    process: int
    pipe: int
    told: list[str] = field(default_factory=list)
    _rest: bytes = b""

    def read(self) -> bool:
        """Takes in what has been said; waits for something. False when the pipe is closed."""
        content = os.read(self.pipe, 1 << 16)
        *lines, self._rest = (self._rest + content).split(b"\n")
        self.told += [line.decode() for line in lines]
        return bool(content)

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.process, signal.SIGKILL)

    def end(self) -> int:
        """Waits for its end; the exit code, or minus the signal that ended it."""
        while self.read():
            pass
        os.close(self.pipe)
        _, status = os.waitpid(self.process, 0)
        return os.waitstatus_to_exitcode(status)

    @property
    def announced(self) -> list[int]:
        """The rounds that it has announced."""
        return [int(line) for line in self.told if line.isdigit()]


def forked(work: Callable[[Callable[[str], None]], int], said: Path | None = None) -> Child:
    """Runs `work` in a child; it is given a function that tells the parent a line.

    Args:
        work: Gives the exit code.
        said: File for what it prints; the parent's own by default.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return Child(process, reading)
    code = 70  # of a programming error
    try:
        os.close(reading)
        if said is not None:
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        code = work(lambda line: _said(writing, line))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _said(descriptor: int, line: str) -> None:
    os.write(descriptor, f"{line}\n".encode())


def tell_announced(tell: Callable[[str], None]) -> None:
    """Has this process's book tell the parent what it announces, whoever asks it."""
    written = Book.written

    def told(book: Book, *, wait: bool = False) -> tuple[RoundRecord, ...]:
        lines = written(book, wait=wait)
        for line in lines:
            tell(str(line.round))
        return lines

    Book.written = told  # type: ignore[method-assign, assignment]


def begun(world: World, folder: Path, before: Callable[[], None] = lambda: None, said: Path | None = None) -> Child:
    """A child that makes the run.

    Args:
        world: What it runs.
        folder: Of the run.
        before: Done in the child first.
        said: As in `forked`.
    """

    def work(tell: Callable[[str], None]) -> int:
        tell_announced(tell)
        before()
        execute_config(world.config, data=world.data, folder=folder)
        return 0

    return forked(work, said)


def commanded(world: World, folder: Path, said: Path, before: Callable[[], None] = lambda: None) -> Child:
    """The same through the command line."""

    def work(tell: Callable[[str], None]) -> int:
        tell_announced(tell)
        before()
        return main(["run", *world.words, "--out", str(folder), "--quiet"])

    return forked(work, said)


def resumed(folder: Path, before: Callable[[], None] = lambda: None, said: Path | None = None) -> Child:
    """A child that goes on with a run; exit code 2 if there is nothing to go on with."""

    def work(tell: Callable[[str], None]) -> int:
        tell_announced(tell)
        before()
        try:
            resume_run(folder)
        except UsageError:
            return 2
        return 0

    return forked(work, said)


def is_finished(folder: Path) -> bool:
    """Whether nothing is left to do."""
    path = folder / "run.json"
    return path.exists() and json.loads(path.read_bytes())["status"] == "finished"


def can_go_on(folder: Path) -> bool:
    """Whether the run got as far as to say what it is; nothing is announced before."""
    return (folder / "run.json").exists()


def left_behind(folder: Path) -> str:
    """Digest of all that a finished run says, without the time that it took."""
    found = hashlib.sha256()
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        found.update(json.dumps({k: v for k, v in json.loads(line).items() if k != "seconds"}).encode())
    record = json.loads((folder / "run.json").read_bytes())
    found.update(json.dumps({k: v for k, v in record.items() if k != "seconds"}).encode())
    for name in ("models.safetensors", "last.safetensors"):
        found.update((folder / name).read_bytes())
    return found.hexdigest()


def leftovers(folder: Path) -> list[str]:
    """Files that a finished run should not have."""
    return sorted(
        p.name for p in folder.iterdir() if p.name.startswith("checkpoint") or p.name.endswith((".part", ".lock"))
    )


def lost(before: list[int], after: list[int]) -> int:
    """Announced rounds that a resumed run had to make again."""
    return len(set(before) & set(after))


def page(title: str, lines: list[str], out: Path) -> None:
    """Writes a page that begins with the command that made it, and prints it."""
    command = f"`{' '.join(['python', *sys.argv])}`"
    text = "\n".join([command, "", f"# {title}", "", *lines, ""])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text)


def timed(child: Child) -> float:
    """Seconds until a child ends; it must end well."""
    began = time.perf_counter()
    code = child.end()
    if code != 0:
        raise RuntimeError(f"a child ended with {code}")
    return time.perf_counter() - began
