"""Runs without what tells of single clients, for pages that are published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from fedmerge.experiment.record import RoundRecord, RunRecord, Scores
from fedmerge.report.study import Study, client_accuracies

T = TypeVar("T")
NAME = "a client"


def redacted(study: Study) -> Study:
    """The same runs without merging weights, names, groups, tasks, class counts and what language models wrote.

    The clients of a seed stand in the order of their accuracy under the seed's first run, the same for all methods, so
    that places say nothing either and methods can still be compared client by client.
    """
    orders: dict[int, list[int]] = {}
    for run in study.all_runs():
        if run.seed not in orders:
            accuracy = client_accuracies(run.selected())
            orders[run.seed] = [int(i) for i in np.argsort(accuracy, kind="stable")]
    runs = {
        label: {seed: _redacted_run(run, orders[seed]) for seed, run in seeds.items()}
        for label, seeds in study.runs.items()
    }
    return dataclasses.replace(study, runs=runs)


def _redacted_run(run: RunRecord, order: Sequence[int]) -> RunRecord:
    return dataclasses.replace(
        run,
        client_names=(NAME,) * len(run.client_names),
        groups=None,
        tasks=None,
        class_counts=None,
        samples=None,
        num_train=_in_order(run.num_train, order),
        num_validation=_in_order(run.num_validation, order),
        num_test=_in_order(run.num_test, order),
        finetuned=_ordered_scores(run.finetuned, order),
        finetuned_validation=_ordered_scores(run.finetuned_validation, order),
        rounds=tuple(_redacted_round(record, order) for record in run.rounds),
    )


def _redacted_round(record: RoundRecord, order: Sequence[int]) -> RoundRecord:
    return dataclasses.replace(
        record,
        mixing=None,
        dropped=(),
        refused=(),
        state=_single_facts(record.state),
        validation=_ordered_scores(record.validation, order),
        test=_ordered_scores(record.test, order),
    )


def _single_facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of the whole federation; a list might have an entry for each client."""
    return {name: value for name, value in state.items() if isinstance(value, (bool, int, float, str))}


def _ordered_scores(scores: Scores | None, order: Sequence[int]) -> Scores | None:
    return None if scores is None else Scores(_in_order(scores.accuracy, order), _in_order(scores.loss, order))


def _in_order(values: Sequence[T], order: Sequence[int]) -> tuple[T, ...]:
    return tuple(values[i] for i in order)
