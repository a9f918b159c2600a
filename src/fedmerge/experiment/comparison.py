"""Several methods on the same data, seeds, cohorts and local budget, one after another or spread over processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmerge.core.errors import UsageError
from fedmerge.data import FederatedData
from fedmerge.experiment.config import Config, Table, build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import RoundRecord, RunRecord, read_run

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
    if not methods or not seeds:
        raise UsageError("a comparison needs at least one method and one seed")
    jobs: list[Job] = []
    faults: dict[str, None] = {}
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


def _table_of(base: Mapping[str, Any], method: str | Mapping[str, Any], seed: int) -> Table:
    table = dict(base) | {"seed": seed}
    if isinstance(method, str):
        return table | {"method": {"name": method}}
    own = dict(method)
    training = {**base.get("training", {}), **own.pop("training", {})}
    return table | {"label": own.pop("label", ""), "training": training, "method": own}


def run_jobs(jobs: Sequence[Job], out: Path, *, processes: int = 1, report: Report | None = None) -> tuple[RunRecord, ...]:
    """Runs every job into a folder of its own below `out`.

    Args:
        jobs: From `plan`.
        out: Receives one run folder per job.
        processes: Runs at the same time; the numbers do not depend on it.
        report: Told of every finished round.

    Raises:
        UsageError: if a run's folder exists already; nothing has started then.
    """
    taken = [job.name for job in jobs if (out / job.name).exists()]
    if taken:
        raise UsageError(f"{out} already holds {', '.join(taken)}; nothing was overwritten. Choose another --out")
    if processes == 1 or len(jobs) == 1:
        return _one_by_one(jobs, out, report)
    return _spread(jobs, out, processes, report)


def _one_by_one(jobs: Sequence[Job], out: Path, report: Report | None) -> tuple[RunRecord, ...]:
    records, seed, data = [], None, None
    for job in jobs:
        if job.config.run.seed != seed or data is None:
            seed = job.config.run.seed
            data = load_data(job.config.source, job.config.partition, seed)
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
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
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
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return tuple(read_run(out / job.name) for job in jobs)


def _work(table: Table, folder: str) -> None:
    config = build_config(table)
    execute_config(config, folder=Path(folder))


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

