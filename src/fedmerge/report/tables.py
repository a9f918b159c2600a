"""Runs as tables: pandas frames with one row per run or client, and the tables of the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedmerge.experiment.record import RoundRecord, RunRecord, Scores
from fedmerge.report.costs import costs
from fedmerge.report.statistics import Difference, FloatArray, Interval, mean_entropy, mean_interval, recovery
from fedmerge.report.study import (
    Study,
    accuracies,
    client_accuracies,
    differences,
    losses,
    studies,
    summary,
    unfinished,
)
from fedmerge.report.table import Cell, Column, Table
from fedmerge.report.text import ranges

Row = Mapping[str, Any]  # title -> cell
OVER_SEEDS = "± is the half width of a 95 % t interval over seeds."


def runs_frame(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """One row per run: summaries at the selected round, at the last round (``last_``) and fine-tuned, and costs.

    Accuracies are shares in 0..1. Nothing here is a best test score.

    Raises:
        UsageError: if the runs cannot stand in one report, see `studies`.
    """
    return pd.DataFrame([_run_row(study, run) for study in studies(runs) for run in study.all_runs()])


def _run_row(study: Study, run: RunRecord) -> dict[str, Any]:
    selected, last = run.selected(), run.last()
    return {
        "setting": run.setting,
        "label": run.label,
        "method": run.method,
        "seed": run.seed,
        "status": run.status,
        "data_sha256": run.data_sha256,
        "clients": len(run.client_names),
        "num_params": run.num_params,
        "selected_round": selected.round,
        **_summaries(study, run, RunRecord.selected),
        "last_round": last.round,
        **{f"last_{name}": value for name, value in _summaries(study, run, RunRecord.last).items()},
        "finetuned_mean": math.nan if run.finetuned is None else summary(run, accuracies(run.finetuned)).mean,
        **_structure(run, selected),
        **dataclasses.asdict(costs(run)),
    }


def _summaries(study: Study, run: RunRecord, pick: Callable[[RunRecord], RoundRecord]) -> dict[str, float]:
    """Summaries at the round that `pick` takes, of this run and of Local-only alike."""
    local = None if run.label == study.local_label() else study.local_run(run.seed)
    level = None if local is None else client_accuracies(pick(local))
    return dataclasses.asdict(summary(run, client_accuracies(pick(run)), level))


def _structure(run: RunRecord, record: RoundRecord) -> dict[str, float]:
    if record.mixing is None:
        return {"models": math.nan, "recovery": math.nan, "entropy": math.nan}
    mixing = np.array(record.mixing)
    return {
        "models": float(mixing.shape[1]),
        "recovery": math.nan if run.groups is None else recovery(mixing, run.groups),
        "entropy": mean_entropy(mixing),
    }


def clients_frame(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """One row per run and client: the table that every summary is derived from.

    Raises:
        UsageError: if the runs cannot stand in one report, see `studies`.
    """
    return pd.concat([_client_rows(run) for study in studies(runs) for run in study.all_runs()], ignore_index=True)


def _client_rows(run: RunRecord) -> pd.DataFrame:
    scores = {"": run.selected().test, "last_": run.last().test, "finetuned_": run.finetuned}
    columns: dict[str, Any] = {
        "setting": run.setting,
        "label": run.label,
        "method": run.method,
        "seed": run.seed,
        "client": range(len(run.client_names)),
        "name": run.client_names,
        "group": run.groups,
        "task": run.tasks,
        "num_train": run.num_train,
        "num_validation": run.num_validation,
        "num_test": run.num_test,
    }
    for prefix, split in scores.items():
        columns[f"{prefix}accuracy"] = _values(split, accuracies)
        columns[f"{prefix}loss"] = _values(split, losses)
    return pd.DataFrame(columns)


def _values(scores: Scores | None, read: Callable[[Scores], FloatArray]) -> FloatArray | float:
    return math.nan if scores is None else read(scores)


def comparison_table(runs: Sequence[RunRecord], *, reference: str | None = None) -> Table:
    """The main table: a row per method and setting, means over seeds with 95 % t intervals, best mean first.

    Args:
        runs: Several methods and seeds; of several settings, too.
        reference: The label that the others are compared with, paired by seed; by default FedMerge, else the first.

    Raises:
        UsageError: if the runs cannot stand in one report, see `studies`.
    """
    found = {study.setting: study_table(study) for study in studies(runs, reference=reference)}
    return by_setting(found, "Test accuracy over clients, by setting")


def by_setting(tables: Mapping[str, Table], caption: str) -> Table:
    """The tables of several settings as one that says which; of a single setting its own.

    Args:
        tables: Setting -> table, at least one.
        caption: Of the whole.
    """
    if len(tables) == 1:
        return next(iter(tables.values()))
    columns = tuple(dict.fromkeys(column for table in tables.values() for column in table.columns))
    rows = [
        (setting, *(dict(zip(table.columns, row, strict=True)).get(column) for column in columns))
        for setting, table in tables.items()
        for row in table.rows
    ]
    notes = tuple(dict.fromkeys(note for table in tables.values() for note in table.notes))
    return Table((Column("Setting", "text"), *columns), tuple(rows), caption, notes)


_SUMMARY_COLUMNS = {
    "mean": Column("Mean (%)", "percent", "test accuracy, mean over clients, at the round chosen on validation"),
    "weighted": Column("Weighted (%)", "percent", "each client counting with its test items"),
    "worst_tenth": Column("Worst tenth (%)", "percent", "mean of the worst tenth of the clients"),
    "bottom_decile": Column("10th percentile (%)", "percent", "a tenth of the clients is below this"),
    "deviation": Column("Spread (points)", "percent", "standard deviation over clients"),
    "below_local": Column("Below Local (%)", "percent", "share of clients worse than training alone"),
    "last_mean": Column("Last round (%)", "percent", "mean over clients at the last round instead"),
    "finetuned_mean": Column("Fine-tuned (%)", "percent", "the selected round's models after local fine-tuning"),
}


def study_table(study: Study) -> Table:
    """The main table of one setting; columns without any number are left out."""
    frame = pd.DataFrame([_run_row(study, run) for run in study.all_runs()])
    gaps = {difference.label: difference for difference in differences(study)}
    rows = [_method_row(study, label, frame[frame["label"] == label], gaps.get(label)) for label in study.labels]
    rows.sort(key=lambda row: -row["Mean (%)"].mean)
    return _filled(_main_columns(study), rows, f"Test accuracy over clients: {study.setting}", _notes(study))


def _filled(columns: Sequence[Column], rows: Sequence[Row], caption: str, notes: tuple[str, ...] = ()) -> Table:
    """A table of the columns that say something in any row."""
    kept = [column for column in columns if any(_says(row[column.title]) for row in rows)]
    return Table(tuple(kept), tuple(tuple(row[column.title] for column in kept) for row in rows), caption, notes)


def _notes(study: Study) -> tuple[str, ...]:
    """What the numbers alone do not say."""
    notes = [OVER_SEEDS] if len(study.seeds) > 1 else []
    notes += unfinished(study)
    found = differences(study)
    if any(difference.interval.over == "clients" for difference in found):
        notes.append("† over clients, one seed: says nothing about other splits.")
    for difference in found:
        if difference.seeds != study.seeds:
            seeds = f"seeds {ranges(difference.seeds)} only" if difference.seeds else "no seed in common"
            notes.append(f"{difference.label} and {study.reference} are paired on {seeds}.")
    local = study.local_label()
    if local is None:
        notes.append("There is no Local-only run: the share of clients below it is unknown.")
    elif tuple(study.runs[local]) != study.seeds:
        notes.append(f"The share below Local counts seeds {ranges(tuple(study.runs[local]))} only.")
    return tuple(notes)


def _main_columns(study: Study) -> tuple[Column, ...]:
    mean, *others = _SUMMARY_COLUMNS.values()
    return (
        Column("Method", "text"),
        Column("Seeds", "whole", "runs that differ in initial model, cohorts and, unless the clients are fixed, split"),
        mean,
        Column(f"To {study.reference} (points)", "points", f"paired difference to {study.reference} on the same seeds"),
        Column("p (Holm)", "p", "paired t test over seeds, corrected for the number of methods"),
        *others,
    )


def _method_row(study: Study, label: str, frame: pd.DataFrame, gap: Difference | None) -> Row:
    return {
        "Method": label,
        "Seeds": len(frame),
        f"To {study.reference} (points)": gap.interval if gap else None,
        "p (Holm)": gap.p_value if gap else None,
        **{column.title: mean_interval(frame[name].to_numpy()) for name, column in _SUMMARY_COLUMNS.items()},
    }


def _says(cell: Cell) -> bool:
    value = cell.mean if isinstance(cell, Interval) else cell
    return value is not None and not (isinstance(value, float) and math.isnan(value))


_COST_COLUMNS = {
    "bytes_down": Column("Down", "bytes", "per client and round"),
    "bytes_up": Column("Up", "bytes", "per client and round"),
    "forward": Column("Forward", "count", "examples passed forward per round, all clients"),
    "backward": Column("Backward", "count", "examples passed backward per round, all clients"),
    "server_floats": Column("Server state", "count", "numbers the server keeps between rounds"),
    "seconds_per_round": Column("Round", "seconds", "wall time of a round without evaluation"),
    "seconds": Column("Run", "seconds", "wall time of a whole run"),
}


def cost_table(study: Study) -> Table:
    """Costs of every method, means over its seeds."""
    rows: list[tuple[Cell, ...]] = []
    for label, runs in study.runs.items():
        frame = pd.DataFrame([dataclasses.asdict(costs(run)) for run in runs.values()])
        rows.append((label, *(float(frame[name].mean()) for name in _COST_COLUMNS)))
    return Table((Column("Method", "text"), *_COST_COLUMNS.values()), tuple(rows), f"Costs: {study.setting}")


def structure_table(study: Study) -> Table | None:
    """Models, entropy of merging weights and recovery of the true groups; None if no method has merging weights."""
    rows: list[Row] = []
    for label, runs in study.runs.items():
        frame = pd.DataFrame([_structure(run, run.selected()) for run in runs.values()])
        if frame["models"].notna().any():
            cells = {column.title: mean_interval(frame[name].to_numpy()) for name, column in _STRUCTURE_COLUMNS.items()}
            rows.append({"Method": label, **cells})
    columns = (Column("Method", "text"), *_STRUCTURE_COLUMNS.values())
    return _filled(columns, rows, f"Merging weights: {study.setting}") if rows else None


_STRUCTURE_COLUMNS = {
    "models": Column("Models", "count", "d at the selected round"),
    "entropy": Column("Entropy", "share", "of a client's merging weights: 0 one model, 1 all alike"),
    "recovery": Column(
        "Groups found", "share", "adjusted Rand index of the heaviest model against the true groups: 1 all, 0 chance"
    ),
}
