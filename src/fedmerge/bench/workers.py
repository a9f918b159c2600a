"""Long-lived processes, one thread each, that make one run after another and keep the clients of the last settings."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from fedmerge.bench.plan import Run
from fedmerge.bench.result import Result, Ticket, diverged, finished, is_divergence
from fedmerge.core.errors import FedmergeError
from fedmerge.core.interrupts import interrupts_held
from fedmerge.data import FederatedData
from fedmerge.experiment.config import build_config, to_table
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import RoundRecord

KEPT_FEDERATIONS = 2


@dataclass(frozen=True)
class Failure:
    """A run that could not be made; it is not recorded, so that a restart tries again.

    Attributes:
        run: Which one.
        message: One line.
        details: Where it happened, for an error that is not the user's.
    """

    run: Run
    message: str
    details: str = ""


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    run: Run | None = None


@dataclass(frozen=True)
class Crew:
    """The processes.

    Attributes:
        workers: One per job that may run at the same time.
    """

    workers: list[_Worker]

    def idle(self) -> int:
        """How many wait for a run."""
        return sum(worker.run is None for worker in self.workers)

    def running(self) -> tuple[Run, ...]:
        """What is in flight."""
        return tuple(worker.run for worker in self.workers if worker.run is not None)

    def start(self, run: Run) -> None:
        """Hands a run to an idle worker; there must be one."""
        index = next(index for index, worker in enumerate(self.workers) if worker.run is None)
        if not self.workers[index].process.is_alive():
            self.workers[index] = _hired()
        worker = self.workers[index]
        worker.run = run
        with suppress(BrokenPipeError):  # a process that died while idle is met as a failure
            worker.pipe.send(run)

    def ended(self, timeout: float) -> list[Result | Failure]:
        """Waits for runs to end; empty if none does within `timeout` seconds."""
        busy = {worker.pipe: worker for worker in self.workers if worker.run is not None}
        found = []
        for pipe in wait(list(busy), timeout):
            worker = busy[pipe]  # type: ignore[index]  # only connections are waited for
            assert worker.run is not None  # noqa: S101
            found.append(_answer(worker, worker.run))
            worker.run = None
        return found


def _answer(worker: _Worker, run: Run) -> Result | Failure:
    try:
        answer: Result | Failure = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        return Failure(run, f"its process ended with exit code {worker.process.exitcode}; is memory short?")
    return answer


@contextmanager
def crew(processes: int) -> Iterator[Crew]:
    """Starts so many processes; ends them, whatever they do, when the block is left."""
    members = Crew([_hired() for _ in range(processes)])
    try:
        yield members
    finally:
        for worker in members.workers:
            worker.process.terminate()
        for worker in members.workers:
            worker.process.join()


def _hired() -> _Worker:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the process imports torch
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(theirs, os.getpid()), daemon=True)
    with interrupts_held():  # one that is still importing would answer Ctrl-C with a traceback
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(pipe: Connection, parent: int) -> None:
    """A worker's life: it ends when its parent does, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    logging.getLogger("fedmerge").setLevel(logging.ERROR)  # else every run warns of the same clients again
    with suppress(EOFError, OSError):
        while True:
            run: Run = pipe.recv()
            pipe.send(_made(run, parent))


def _made(run: Run, parent: int) -> Result | Failure:
    began = time.perf_counter()
    ticket = Ticket(run.key, run.request, run.setting, run.label, run.seed, run.stage)
    config = build_config(run.table)

    def watch(_: RoundRecord) -> None:
        if os.getppid() != parent:
            os._exit(1)  # nobody is left to take the result

    try:
        resolved = to_table(config)
        reads = ("model",) if hasattr(config.model, "encoder") else ()  # texts are read as the model reads them
        place = {kind: resolved.get(kind) for kind in ("source", "partition", *reads)}
        data = _clients(json.dumps(place), run.seed)
        return finished(ticket, execute_config(config, data=data, watch=watch).record)
    except FedmergeError as error:
        if is_divergence(error):
            return diverged(ticket, config, error, resolved["method"]["name"], time.perf_counter() - began)
        return Failure(run, str(error))
    except Exception as error:  # a method's own fault must not end the night's work
        return Failure(run, f"{type(error).__name__}: {error}", traceback.format_exc())


@lru_cache(maxsize=KEPT_FEDERATIONS)
def _clients(place: str, seed: int) -> FederatedData:
    """The clients of a setting and seed, from the resolved tables of source, partition and language model as JSON."""
    table: dict[str, Any] = {kind: value for kind, value in json.loads(place).items() if value is not None}
    config = build_config({**table, "seed": seed})
    return load_data(config.source, config.partition, seed, config.model)


def failures_text(failures: Sequence[Failure]) -> str:
    """Every failure with what is known of it."""
    return "\n".join(
        f"{failure.run.setting}, {failure.run.label}, seed {failure.run.seed} ({failure.run.stage}): "
        f"{failure.message}\n{failure.details}"
        for failure in failures
    )
