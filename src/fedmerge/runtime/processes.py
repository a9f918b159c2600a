"""Workers that are processes of this machine, one thread each, and share memory with the one that started them.

Where a process can be forked safely (Linux without an accelerator), workers have engine and examples from the start and
nothing is copied; elsewhere both are handed over once, in memory that all of them share. Forking is safe here because a
worker computes on one thread, touches nothing that other threads of its parent (a run is written down by one) might
hold, and leaves no thread behind; with an accelerator it is not, because its driver does not survive a fork.

They are started by the first call that can be divided, not when the engine is made: many engines never train.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from fedmerge.core.errors import UsageError
from fedmerge.core.interrupts import interrupts_held
from fedmerge.runtime.engines import Engine
from fedmerge.runtime.parcels import Arena, Known, Packed, pack, unpack
from fedmerge.runtime.workers import Death, Done, Failure, Job, packed_outcome, run_job

Start = Literal["fork", "spawn"]

_SLOTS = 2
"""Parcels that may be on their way in one direction."""
_NOTICE = struct.Struct("<BQQ")
"""Which slot a parcel lies in, where its message begins there, and how long that is. All that goes through a pipe."""
_LOOK_UP_SECONDS = 1.0
"""How often a worker looks whether its parent is still there; one that waits learns it from its pipe at once."""

_OURS: WeakSet[Connection] = WeakSet()
"""This process's ends of all pipes to workers. A forked one must close them: held open, they would hide an end."""
_STARTING = threading.Lock()
"""No process is forked while another one's end of a pipe is open here."""


def safe_start() -> Start:
    """How workers begin on this machine."""
    return "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"


@dataclass
class _Lane:
    """One direction between two processes: parcels lie in the slots by turns, so that two can be on their way.

    Attributes:
        slots: Memory that both share.
        parcels: How many have gone this way.
    """

    slots: list[Arena] = field(default_factory=lambda: [Arena() for _ in range(_SLOTS)])
    parcels: int = 0

    def write(self, packed: Packed) -> bytes:
        """Puts a parcel into the next slot; what the other side needs to read it."""
        slot = self.parcels % _SLOTS
        block = self.slots[slot].block(packed.size + len(packed.head))
        packed.fill(block)
        block.numpy()[packed.size : packed.size + len(packed.head)] = np.frombuffer(packed.head, dtype=np.uint8)
        self.parcels += 1
        return _NOTICE.pack(slot, packed.size, len(packed.head))

    def read(self, notice: bytes, known: Known, *, copied: bool) -> Any:
        """The value of a parcel, see `unpack`."""
        slot, start, length = _NOTICE.unpack(notice)
        block = self.slots[slot].block(start + length)
        return unpack(block[start : start + length].numpy().tobytes(), block, known, copied=copied)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    down: _Lane
    up: _Lane


@dataclass(frozen=True)
class _Post:
    """How a worker hears and answers.

    Attributes:
        pipe: For notices.
        down: Of jobs.
        up: Of outcomes.
        parent: Process id of who started the worker.
    """

    pipe: Connection
    down: _Lane
    up: _Lane
    parent: int


@dataclass(frozen=True)
class _Handed:
    """Engine and examples for workers that do not inherit them, in memory that all of them share.

    Attributes:
        lane: Where the engine lies as a parcel.
        notice: Of that parcel.
        examples: The memory of the clients' examples.
        places: Where each of those that are known lies there.
        values: Notice of the examples themselves, the second parcel of the lane.
    """

    lane: _Lane
    notice: bytes
    examples: Arena
    places: list[tuple[int, int]]
    values: bytes


class Processes:
    """A crew of processes of this machine.

    Args:
        engine: Makes a worker's engine; called in this process where workers are forked.
        size: How many processes.
        known: What need not travel with every call: the clients' examples. They must not change.
        start: How processes begin; by default what is safe here.

    Raises:
        UsageError: in a process that may not have processes of its own.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        size: int,
        known: Sequence[tuple[Tensor, ...]] = (),
        *,
        start: Start | None = None,
    ) -> None:
        if multiprocessing.current_process().daemon:
            raise UsageError(
                f"workers: got {size} in a process that is one of several already and cannot have its own; "
                "use workers=1"
            )
        self.size, self._start, self._known = size, start or safe_start(), Known(known)
        self._engine = engine
        self._workers: list[_Worker | None] = [None] * size
        self._gone: deque[tuple[int, Death]] = deque()
        self._handed: _Handed | None = None

    def send(self, worker: int, job: Job) -> None:
        """Hands over a job; a worker that is found dead meanwhile is told by `events`."""
        packed = pack(job, self._known)
        found = self._workers[worker]
        if found is None:
            found = self._workers[worker] = self._hired()
        notice = found.down.write(packed)
        with suppress(BrokenPipeError, ConnectionResetError):  # met again as the end of the pipe
            found.pipe.send_bytes(notice)

    def events(self) -> Iterator[tuple[int, Done | Failure | Death]]:
        """What has come from the workers; waits for the first."""
        pipes = {worker.pipe: index for index, worker in enumerate(self._workers) if worker is not None}
        for pipe in wait(list(pipes)):
            index = pipes[pipe]  # type: ignore[index]  # only connections are waited for
            worker = self._workers[index]
            assert worker is not None  # noqa: S101
            try:
                notice = worker.pipe.recv_bytes()
            except (EOFError, OSError):
                self._workers[index] = None
                worker.process.join()
                worker.pipe.close()
                yield index, Death(_reason(worker.process.exitcode))
            else:
                yield index, worker.up.read(notice, self._known, copied=True)

    def close(self) -> None:
        """Ends all processes at once: what they have is only what they were given."""
        found = [worker for worker in self._workers if worker is not None]
        self._workers = [None] * self.size
        self._handed = None
        for worker in found:
            worker.process.kill()
        for worker in found:
            worker.process.join()
            worker.pipe.close()

    def processes(self) -> list[int]:
        """Process ids of all that are started."""
        return [worker.process.pid for worker in self._workers if worker is not None and worker.process.pid is not None]

    def _hired(self) -> _Worker:
        with _STARTING, interrupts_held(), warnings.catch_warnings():
            # Python 3.12 and later warn of forks beside threads; see the head of this file
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            context = multiprocessing.get_context(self._start)
            ours, theirs = context.Pipe()
            _OURS.add(ours)
            down, up = _Lane(), _Lane()
            what = (_forked, self._engine, self._known) if self._start == "fork" else (_spawned, self._shown())
            process: Any = context.Process(  # type: ignore[attr-defined]  # of every context
                target=what[0],
                args=(_Post(theirs, down, up, os.getpid()), *what[1:]),
                daemon=True,
                name="fedmerge worker",
            )
            process.start()
            theirs.close()
        return _Worker(process, ours, down, up)

    def _shown(self) -> _Handed:
        if self._handed is None:
            lane, examples = _Lane(), Arena()
            notice = lane.write(pack(self._engine, Known()))
            places, values = (
                examples.lay(self._known.blocks()),
                lane.write(pack(self._known.values, self._known.bare())),
            )
            self._handed = _Handed(lane, notice, examples, places, values)
        return self._handed


def _reason(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"signal {-code}"


def _forked(post: _Post, engine: Callable[[], Engine], known: Known) -> None:
    """A forked worker's life."""
    for end in list(_OURS):
        end.close()
    _live(post, engine, known)


def _spawned(post: _Post, handed: _Handed) -> None:
    """A spawned worker's life."""
    engine = handed.lane.read(handed.notice, Known(), copied=True)
    memory = Known((block,) for block in handed.examples.lying(handed.places))
    _live(post, engine, Known(handed.lane.read(handed.values, memory, copied=True)))


def _live(post: _Post, make: Callable[[], Engine], known: Known) -> None:
    """Computes one job after another until the parent is gone, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGALRM, partial(_end_without, post.parent))
    signal.siginterrupt(signal.SIGALRM, False)  # no library sees a call cut short
    signal.setitimer(signal.ITIMER_REAL, _LOOK_UP_SECONDS, _LOOK_UP_SECONDS)
    torch.set_num_threads(1)
    engine = make()
    with suppress(EOFError, ConnectionError):
        while True:
            post.pipe.send_bytes(_answer(engine, post, post.pipe.recv_bytes(), known))


def _end_without(parent: int, *_: object) -> None:
    if os.getppid() != parent:
        os._exit(1)  # nobody is left to take what is being computed


def _answer(engine: Engine, post: _Post, notice: bytes, known: Known) -> bytes:
    """Computes a job; the notice of its results, or of why there are none."""
    try:
        return post.up.write(packed_outcome(run_job(engine, post.down.read(notice, known, copied=False)), known))
    except Exception as error:  # results that cannot be sent, no memory for them
        return post.up.write(packed_outcome(Failure(None, error, traceback.format_exc()), known))
