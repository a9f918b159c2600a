"""How well each task is served: a row per method, a column per task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedmerge.experiment.record import RunRecord
from fedmerge.report.kinds import known_tasks
from fedmerge.report.statistics import Interval, mean_interval
from fedmerge.report.study import Study, client_accuracies, studies
from fedmerge.report.table import Cell, Column, Table
from fedmerge.report.tables import OVER_SEEDS, by_setting
from fedmerge.report.text import plural

_OVER_TASKS = Column("Mean over tasks (%)", "percent", "each task counting once, however many clients it has")


def task_table(runs: Sequence[RunRecord]) -> Table | None:
    """A row per method and setting: mean test accuracy of each task's clients, means over seeds, best mean first.

    Args:
        runs: Several methods and seeds; of several settings, too.

    Returns:
        None if no run has clients of two tasks or more.

    Raises:
        UsageError: if the runs cannot stand in one report, see `studies`.
    """
    found = {study.setting: study_task_table(study) for study in studies(runs)}
    tables = {setting: table for setting, table in found.items() if table is not None}
    return by_setting(tables, "Test accuracy by task and setting") if tables else None


def study_task_table(study: Study) -> Table | None:
    """The same for one setting."""
    tasks = tuple(dict.fromkeys(task for run in study.all_runs() for task in known_tasks(run) or ()))
    if not tasks:
        return None
    rows = {label: _row([task_means(run) for run in runs.values()], tasks) for label, runs in study.runs.items()}
    order = sorted(rows, key=lambda label: -np.nan_to_num(rows[label][-1].mean, nan=-np.inf))
    columns = (Column("Method", "text"), *(Column(f"{task} (%)", "percent") for task in tasks), _OVER_TASKS)
    notes = (*((OVER_SEEDS,) if len(study.seeds) > 1 else ()), _clients_note(study))
    cells: list[tuple[Cell, ...]] = [(label, *rows[label]) for label in order]
    return Table(columns, tuple(cells), f"Test accuracy by task: {study.setting}", notes)


def task_means(run: RunRecord) -> dict[str, float]:
    """Task -> mean test accuracy of its clients at the selected round; without those that have no test items."""
    accuracy, found = client_accuracies(run.selected()), dict[str, list[float]]()
    for task, value in zip(known_tasks(run) or (), accuracy, strict=False):
        if not np.isnan(value):
            found.setdefault(task, []).append(float(value))
    return {task: math.fsum(values) / len(values) for task, values in found.items()}


def _row(seeds: Sequence[Mapping[str, float]], tasks: Sequence[str]) -> tuple[Interval, ...]:
    """An interval over seeds for each task, and for the mean over tasks."""
    own = [mean_interval(np.array([means.get(task, math.nan) for means in seeds])) for task in tasks]
    overall = [math.fsum(means.values()) / len(means) if means else math.nan for means in seeds]
    return (*own, mean_interval(np.array(overall)))


def _clients_note(study: Study) -> str:
    tasks = [found for found in map(known_tasks, study.all_runs()) if found is not None]
    counts = sorted({found.count(task) for found in tasks for task in set(found)})
    size = plural(counts[0], "client") if len(counts) == 1 else f"{counts[0]} to {plural(counts[-1], 'client')}"
    return f"Mean over the clients of a task ({size} each), at the round chosen on validation."
