"""Results sorted by setting, method and seed, and the numbers that are derived from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmerge.bench.known import Known, answers, is_part_of
from fedmerge.bench.plan import Find, Planner, Run
from fedmerge.bench.result import Result, as_array, as_number
from fedmerge.bench.suite import Setting, Suite
from fedmerge.bench.tuning import Tuning
from fedmerge.report.statistics import (
    Difference,
    FloatArray,
    Interval,
    Summary,
    holm,
    mean_interval,
    paired_interval,
    paired_p_value,
    summarise,
)

Scores = Mapping[str, Mapping[int, FloatArray]]
"""Label -> seed -> [N] test accuracy at the selected round."""


@dataclass(frozen=True)
class Sheet:
    """All reported results of one setting.

    Attributes:
        setting: Which one.
        results: Label -> seed -> result, finished or diverged, seeds ascending; only labels with a result.
        tunings: Label -> how its rate was chosen, of every label of the setting.
        reference: The label that the others are compared with.
        local: Label of Local-only training, if it has results.
    """

    setting: Setting
    results: Mapping[str, Mapping[int, Result]]
    tunings: Mapping[str, Tuning]
    reference: str
    local: str | None

    def finished(self, label: str) -> dict[int, Result]:
        """Seed -> result of the runs that did not diverge."""
        return {seed: result for seed, result in self.results.get(label, {}).items() if result.status == "finished"}

    def diverged(self, label: str) -> tuple[int, ...]:
        """Seeds on which a method diverged."""
        return tuple(seed for seed, result in self.results.get(label, {}).items() if result.status == "diverged")

    def scores(self) -> Scores:
        """Of every label with a finished run."""
        found = {label: self.finished(label) for label in self.results}
        return {label: {s: r.accuracies() for s, r in runs.items()} for label, runs in found.items() if runs}

    def mean(self, label: str) -> Interval:
        """Mean accuracy over clients, over the seeds that finished."""
        return mean_interval(np.array([np.nanmean(result.accuracies()) for result in self.finished(label).values()]))

    def ranked_score(self, label: str) -> float:
        """Mean accuracy over seeds in which a diverged run counts 0; NaN without a run."""
        values = [float(np.nanmean(result.accuracies())) for result in self.finished(label).values()]
        values += [0.0] * len(self.diverged(label))
        return math.fsum(values) / len(values) if values else math.nan

    def by_mean(self) -> list[str]:
        """Labels, best mean first; those that only diverged last."""
        scored = {label: self.mean(label).mean for label in self.results}
        return sorted(scored, key=lambda label: -np.nan_to_num(scored[label], nan=-1.0))

    def summary(self, label: str, seed: int) -> Summary:
        """Of one finished run; the share below Local-only compares with the Local run of the same seed."""
        result = self.results[label][seed]
        local = None
        if self.local is not None and self.local != label and seed in self.finished(self.local):
            local = self.results[self.local][seed].accuracies()
        return summarise(result.accuracies(), np.array(result.num_test, dtype=np.float64), local)

    def last_mean(self, label: str, seed: int) -> float:
        """Mean accuracy over clients at the last round."""
        return float(np.nanmean(as_array(self.results[label][seed].last_test)))


def sheets(suite: Suite, results: Iterable[Result]) -> tuple[Sheet, ...]:
    """Every setting with what there is of it.

    A page can still be written after the package's defaults have changed: where no result is known to answer a run
    (see `Known`), the last one that was asked for in the same words does.
    """
    made = tuple(results)
    known, by_request = Known(made), {result.request: result for result in made}
    planner = Planner(suite)

    def find(run: Run) -> Result | None:
        asked = by_request.get(run.request)
        return known.find(run) or (asked if asked is not None and answers(asked, run) else None)

    return tuple(_sheet(planner, setting, find) for setting in suite.settings.values())


def _sheet(planner: Planner, setting: Setting, find: Find) -> Sheet:
    suite = planner.suite
    tunings = {label: planner.tuning(setting, label, find) for label in setting.labels}
    found: dict[str, dict[int, Result]] = {}
    for label, tuning in tunings.items():
        if tuning.chosen is None:
            continue
        for seed in sorted(suite.protocol.seeds):
            result = find(planner.run(setting, label, seed, tuning.chosen))
            if result is not None:
                found.setdefault(label, {})[seed] = result
    names = {label: next(iter(runs.values())).method for label, runs in found.items()}
    local = next((label for label, name in names.items() if name == "local"), None)
    return Sheet(setting, found, tunings, suite.protocol.reference, local)


def pairs(scores: Scores, left: str, right: str) -> tuple[tuple[int, ...], Interval]:
    """Seeds that both ran, and left − right on them; an empty interval where there is none."""
    ours, theirs = scores.get(left, {}), scores.get(right, {})
    seeds = tuple(seed for seed in ours if seed in theirs)
    if not seeds:
        return (), Interval(math.nan, math.nan, 0)
    return seeds, paired_interval([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])


def differences(sheet: Sheet) -> dict[str, Difference]:
    """Every label minus the reference on the seeds that both ran; Holm over the labels of the setting."""
    scores = sheet.scores()
    others = [label for label in scores if label != sheet.reference]
    found = {label: pairs(scores, label, sheet.reference) for label in others}
    corrected = holm([paired_p_value(interval) for _, interval in found.values()])
    return {
        label: Difference(label, seeds, interval, p)
        for (label, (seeds, interval)), p in zip(found.items(), corrected, strict=True)
    }


def mismatched(sheet: Sheet) -> list[int]:
    """Seeds on which methods saw different data: their pairs mean nothing. It takes a change of the data's code."""
    hashes: dict[int, set[str]] = {}
    for label in sheet.results:
        for seed, result in sheet.finished(label).items():
            hashes.setdefault(seed, set()).add(result.data_sha256)
    return sorted(seed for seed, found in hashes.items() if len(found) > 1)


def inconsistent(sheet: Sheet) -> list[str]:
    """Labels whose runs had different options: the package's defaults changed between them."""
    return [
        label
        for label, runs in sheet.results.items()
        if any(not _alike(result.options, next(iter(runs.values())).options) for result in runs.values())
    ]


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Equal but for options that one of two versions of the package did not know."""
    return is_part_of(one, other) or is_part_of(other, one)


def average(results: Iterable[Result], name: str) -> float:
    """Mean of a number over runs; NaN if any lacks it or there is none."""
    values = [as_number(getattr(result, name)) for result in results]
    return math.fsum(values) / len(values) if values else math.nan


def with_results(found: Sequence[Sheet]) -> tuple[Sheet, ...]:
    """The settings that have any reported result."""
    return tuple(sheet for sheet in found if sheet.results)
