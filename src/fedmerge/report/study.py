"""Runs sorted into studies: one setting, several methods, several seeds, comparable by construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmerge.core.errors import DataError, UsageError, unknown_name
from fedmerge.experiment.record import RoundRecord, RunRecord, Scores
from fedmerge.report.statistics import (
    Difference,
    FloatArray,
    Interval,
    Summary,
    holm,
    paired_interval,
    paired_p_value,
    summarise,
)
from fedmerge.report.text import plural


@dataclass(frozen=True)
class Study:
    """All runs of one setting.

    Attributes:
        setting: As the runs call it.
        runs: Label -> seed -> run; labels in order of appearance, seeds ascending.
        reference: The label that every other one is compared with.
        colours: Label -> index of its colour, by name: the same however the runs were gathered.
    """

    setting: str
    runs: Mapping[str, Mapping[int, RunRecord]]
    reference: str
    colours: Mapping[str, int]

    @property
    def labels(self) -> tuple[str, ...]:
        """In order of appearance."""
        return tuple(self.runs)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed that any method ran on, ascending."""
        return tuple(sorted({seed for runs in self.runs.values() for seed in runs}))

    def all_runs(self) -> tuple[RunRecord, ...]:
        """By label, then seed."""
        return tuple(run for runs in self.runs.values() for run in runs.values())

    def local_label(self) -> str | None:
        """The first label whose method is Local-only training."""
        return next((label for label, runs in self.runs.items() if _first(runs).method == "local"), None)

    def local_run(self, seed: int) -> RunRecord | None:
        """The Local-only run of a seed."""
        label = self.local_label()
        return None if label is None else self.runs[label].get(seed)


def studies(runs: Sequence[RunRecord], *, reference: str | None = None) -> tuple[Study, ...]:
    """Sorts runs by setting and checks that those of one setting may be compared.

    Args:
        runs: In any order; labels keep their order of appearance.
        reference: A label; by default the first run of FedMerge, else the first run.

    Raises:
        UsageError: without runs, for an unknown reference, for two runs with the same label and seed, for one label
            with different options, and for runs of one seed that saw different data.
        FedmergeError: for a run without a single test score.
    """
    if not runs:
        raise UsageError("no runs to report on; give at least one run folder")
    settings: dict[str, list[RunRecord]] = {}
    for run in runs:
        _check_scored(run)
        settings.setdefault(run.setting, []).append(run)
    colours = {label: index for index, label in enumerate(sorted({run.label for run in runs}))}
    rank = {label: index for index, label in enumerate(dict.fromkeys(run.label for run in runs))}
    for members in settings.values():
        members.sort(key=lambda run: (rank[run.label], run.seed))
    return tuple(_study(setting, members, reference, colours) for setting, members in settings.items())


def _study(setting: str, members: Sequence[RunRecord], reference: str | None, colours: Mapping[str, int]) -> Study:
    table: dict[str, dict[int, RunRecord]] = {}
    for run in members:
        if run.seed in table.setdefault(run.label, {}):
            raise UsageError(
                f"two runs are called {run.label!r} with seed {run.seed} in the setting {setting!r}; "
                "give each pair of label and seed once, or another label"
            )
        table[run.label][run.seed] = run
    _check_same_options(table)
    _check_same_data(members)
    if reference is not None and reference not in table:
        raise UsageError(f"{unknown_name('reference', reference, table)} (in the setting {setting!r})")
    return Study(setting, table, reference or _default_reference(table), colours)


def _first(runs: Mapping[int, RunRecord]) -> RunRecord:
    return next(iter(runs.values()))


def _default_reference(table: Mapping[str, Mapping[int, RunRecord]]) -> str:
    merging = (label for label, runs in table.items() if _first(runs).method == "fedmerge")
    return next(merging, next(iter(table)))


def _check_scored(run: RunRecord) -> None:
    """Raises for a run that was stopped before its first evaluation or whose clients have no test items."""
    for record in (run.selected(), run.last()):
        if np.isnan(client_accuracies(record)).all():
            raise DataError(
                f"run {run.label!r} (seed {run.seed}) has no test score of any client in round {record.round}; "
                "give the clients test items"
            )


def _check_same_options(table: Mapping[str, Mapping[int, RunRecord]]) -> None:
    for label, runs in table.items():
        first = _first(runs)
        for run in runs.values():
            if (run.method, dict(run.options)) != (first.method, dict(first.options)):
                raise UsageError(
                    f"runs called {label!r} differ: seed {first.seed} is {first.method} {dict(first.options)}, seed "
                    f"{run.seed} is {run.method} {dict(run.options)}; give each its own label"
                )


def _check_same_data(members: Sequence[RunRecord]) -> None:
    first: dict[int, RunRecord] = {}
    for run in members:
        other = first.setdefault(run.seed, run)
        if run.data_sha256 != other.data_sha256:
            raise UsageError(
                f"runs {other.label!r} and {run.label!r} of seed {run.seed} saw different data (sha256 "
                f"{other.data_sha256[:12]} and {run.data_sha256[:12]}); a paired difference needs the same items and "
                "split: run both on one partition, or report them apart"
            )


def accuracies(scores: Scores) -> FloatArray:
    """[N], NaN for clients without items in the split."""
    return np.array([np.nan if value is None else value for value in scores.accuracy], dtype=np.float64)


def losses(scores: Scores) -> FloatArray:
    """[N], NaN for clients without items in the split."""
    return np.array([np.nan if value is None else value for value in scores.loss], dtype=np.float64)


def client_accuracies(record: RoundRecord) -> FloatArray:
    """[N] test accuracy of an evaluated round."""
    if record.test is None:
        raise ValueError(f"round {record.round} was not evaluated")
    return accuracies(record.test)


def summary(run: RunRecord, accuracy: FloatArray, local: FloatArray | None = None) -> Summary:
    """Summary of a run's test accuracies [N]; `local` [N] is what the share below Local-only compares with."""
    return summarise(accuracy, np.array(run.num_test, dtype=np.float64), local)


def differences(study: Study) -> tuple[Difference, ...]:
    """Every label but the reference, at the selected round of each run: label minus reference, seeds paired."""
    others = [label for label in study.labels if label != study.reference]
    shared = [tuple(seed for seed in study.runs[label] if seed in study.runs[study.reference]) for label in others]
    intervals = [_paired(study, label, seeds) for label, seeds in zip(others, shared, strict=True)]
    corrected = holm([paired_p_value(interval) for interval in intervals])
    return tuple(Difference(*parts) for parts in zip(others, shared, intervals, corrected, strict=True))


def _paired(study: Study, label: str, seeds: Sequence[int]) -> Interval:
    if not seeds:
        return Interval(np.nan, np.nan, 0)
    ours, theirs = (
        [client_accuracies(study.runs[name][seed].selected()) for seed in seeds] for name in (label, study.reference)
    )
    return paired_interval(ours, theirs)


def unfinished(study: Study) -> list[str]:
    """Runs that did not come to their end, and where their numbers stand."""
    return [words for words in map(where_it_stopped, study.all_runs()) if words]


def where_it_stopped(run: RunRecord) -> str:
    """Of a run that did not come to its end, and what its numbers are of; empty for one that did."""
    if run.status == "finished":
        return ""
    return (
        f"{run.label}, seed {run.seed}, is {run.status} after {plural(run.rounds[-1].round, 'round')}: "
        f"its numbers are of round {run.selected().round}."
    )
