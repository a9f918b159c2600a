"""Several methods on the same data, seeds, cohorts and local budget, one after another or spread over processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from fedmerge.core.errors import UsageError
from fedmerge.core.interrupts import interrupts_heard, interrupts_held
from fedmerge.data import FederatedData
from fedmerge.experiment.config import Config, Table, build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import RoundRecord, RunRecord, read_run
from fedmerge.experiment.simulation import prepare

Report = Callable[[str, int], None]
"""Called with a run's name and how many of its rounds are done."""
_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes:
        name: Of its folder, ``label-seed``.
        table: Its configuration.
        config: The same, checked.
    """

    name: str
    table: Table
    config: Config


def plan(base: Mapping[str, Any], methods: Sequence[str | Mapping[str, Any]], seeds: Sequence[int]) -> tuple[Job, ...]:
    """The runs of a comparison, seed by seed.

    Args:
        base: What all runs share, as for `build_config`.
        methods: Names, or tables of a method's options that may also hold ``label`` and a ``training`` table.
        seeds: Each decides split, initial model, cohorts and batches.

    Raises:
        UsageError: with every fault of every run, each once.
    """
    faults = dict.fromkeys(_faults_of_request(base, methods, seeds))
    if faults:
        raise UsageError("\n".join(faults))
    jobs: list[Job] = []
    for seed in seeds:
        for method in methods:
            table = _table_of(base, method, seed)
            try:
                config = build_config(table)
            except UsageError as error:
                faults.update(dict.fromkeys(str(error).splitlines()))
                continue
            jobs.append(Job(f"{config.name}-seed{seed}", table, config))
    names = [job.name for job in jobs]
    faults.update(
        (f"methods: two runs are called {name!r}; give methods that differ in options a `label` each", None)
        for name in names
        if names.count(name) > 1
    )
    if faults:
        raise UsageError("\n".join(faults))
    return tuple(jobs)


def _faults_of_request(base: Mapping[str, Any], methods: Any, seeds: Any) -> list[str]:
    """What is wrong with a comparison apart from its single runs."""
    faults = [
        f"{key}: got one for a comparison; name the methods instead, each with options and a label of its own"
        for key in ("method", "label")
        if key in base
    ]
    if not isinstance(methods, (list, tuple)) or not all(isinstance(method, (str, Mapping)) for method in methods):
        faults.append(f"methods: got {methods!r}; expected a list of names or tables with a name")
    if not isinstance(seeds, (list, tuple)) or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds):
        faults.append(f"seeds: got {seeds!r}; expected a list of whole numbers")
    elif len(set(seeds)) < len(seeds):
        faults.append(f"seeds: got {list(seeds)}; expected each once")
    if not faults and not (methods and seeds):
        faults.append("a comparison needs at least one method and one seed")
    return faults


def _table_of(base: Mapping[str, Any], method: str | Mapping[str, Any], seed: int) -> Table:
    table = dict(base) | {"seed": seed}
    if isinstance(method, str):
        return table | {"method": {"name": method}}
    own = dict(method)
    both = base.get("training", {}), own.pop("training", {})
    wrong = [given for given in both if not isinstance(given, Mapping)]  # left for `build_config` to complain of
    training = wrong[0] if wrong else {**both[0], **both[1]}
    return table | {"label": own.pop("label", ""), "training": training, "method": own}


def run_jobs(
    jobs: Sequence[Job], out: Path, *, processes: int = 1, report: Report | None = None
) -> tuple[RunRecord, ...]:
    """Runs every job into a folder of its own below `out`.

    Args:
        jobs: From `plan`.
        out: Receives one run folder per job.
        processes: Runs at the same time; the numbers do not depend on it.
        report: Told of every finished round.

    Raises:
        UsageError: if a run's folder exists already or a run cannot start; nothing has been written then.
    """
    refuse_taken([job.name for job in jobs], out)
    data = _rehearsed(jobs)
    if processes == 1 or len(jobs) == 1:
        return _one_by_one(jobs, data, out, report)
    return _spread(jobs, out, processes, report)


def refuse_taken(names: Sequence[str], out: Path) -> None:
    """Refuses run folders that exist already.

    Raises:
        UsageError: naming those that are there below `out`.
    """
    try:
        taken = [name for name in names if (out / name).exists()]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write run folders below {out}: {getattr(error, 'strerror', error)}") from error
    if taken:
        raise UsageError(f"{out} already holds {', '.join(taken)}; nothing was overwritten. Choose another folder")


def _rehearsed(jobs: Sequence[Job]) -> FederatedData:
    """The first seed's clients, after every run on them was prepared: what cannot start fails before any training."""
    first = jobs[0].config
    data = load_data(first.source, first.partition, first.run.seed, first.model)
    for config in (job.config for job in jobs if job.config.run.seed == first.run.seed):
        prepare(config.method, data, config.model, config.training, config.run)
    return data


def _one_by_one(jobs: Sequence[Job], data: FederatedData, out: Path, report: Report | None) -> tuple[RunRecord, ...]:
    """`data` are the clients of the first job's seed."""
    records, seed = [], jobs[0].config.run.seed
    for job in jobs:
        if job.config.run.seed != seed:
            seed = job.config.run.seed
            data = load_data(job.config.source, job.config.partition, seed, job.config.model)
        records.append(_run_here(job, data, out, report))
    return tuple(records)


def _run_here(job: Job, data: FederatedData, out: Path, report: Report | None) -> RunRecord:
    def watch(record: RoundRecord) -> None:
        if report is not None:
            report(job.name, record.round)

    return execute_config(job.config, data=data, folder=out / job.name, watch=watch).record


def _spread(jobs: Sequence[Job], out: Path, processes: int, report: Report | None) -> tuple[RunRecord, ...]:
    """Fresh processes work on whole runs; their progress is read from the folders they write."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    workers = min(processes, len(jobs))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(stop,)) as pool:
        with interrupts_held():  # a worker that is still importing would answer Ctrl-C with a traceback
            futures: list[Future[None]] = [pool.submit(_work, job.table, str(out / job.name)) for job in jobs]
        try:
            while wait(futures, timeout=_POLL_SECONDS).not_done:
                _tell(jobs, out, report)
                failed = next((future for future in futures if future.done() and future.exception()), None)
                if failed is not None:
                    break
            _tell(jobs, out, report)
            for future in futures:
                if future.done():
                    future.result()
        except BaseException:
            stop.set()  # runs that lie ready for a worker cannot be cancelled any more
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return tuple(read_run(out / job.name) for job in jobs)


_stops: list[Event] = []
"""Of this worker process: set when no further run is to begin."""


def _begin(stop: Event) -> None:
    _stops.append(stop)


def _work(table: Table, folder: str) -> None:
    if any(stop.is_set() for stop in _stops):
        return
    with interrupts_heard():
        execute_config(build_config(table), folder=Path(folder))


def _tell(jobs: Sequence[Job], out: Path, report: Report | None) -> None:
    if report is None:
        return
    for job in jobs:
        rounds = out / job.name / "rounds.jsonl"
        if rounds.exists():
            report(job.name, rounds.read_bytes().count(b"\n") - 1)


def free_folder(parent: Path, name: str) -> Path:
    """`parent`/`name`, or the first of name-2, name-3, ... that does not exist."""
    folder, number = parent / name, 1
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder
