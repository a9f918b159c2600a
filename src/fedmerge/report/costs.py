"""What a run cost: bytes, passes, memory and time, beside its accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedmerge.experiment.record import RoundRecord, RunRecord
from fedmerge.report.statistics import FloatArray


@dataclass(frozen=True)
class Costs:
    """Means over the rounds that were trained; NaN where nothing was trained or nothing is known.

    Attributes:
        bytes_down: Per client of the cohort and round.
        bytes_up: Per client of the cohort and round.
        forward: Examples passed forward per round, all clients together.
        backward: Examples passed backward per round.
        server_floats: Numbers the server must remember between rounds, at most (FedMerge keeps more while it searches).
        seconds_per_round: Without evaluation.
        seconds: Of the whole run.
    """

    bytes_down: float
    bytes_up: float
    forward: float
    backward: float
    server_floats: float
    seconds_per_round: float
    seconds: float


def costs(run: RunRecord) -> Costs:
    """Costs of one run; round 0, the state before any training, is not a round here."""
    trained = [record for record in run.rounds if record.round > 0]
    replies = sum(len(record.cohort) for record in trained)
    return Costs(
        bytes_down=_ratio(sum(record.bytes_down for record in trained), replies),
        bytes_up=_ratio(sum(record.bytes_up for record in trained), replies),
        forward=_ratio(sum(record.forward for record in trained), len(trained)),
        backward=_ratio(sum(record.backward for record in trained), len(trained)),
        server_floats=max((_server_floats(record) for record in trained or run.rounds), default=math.nan),
        seconds_per_round=_ratio(math.fsum(record.seconds for record in trained), len(trained)),
        seconds=run.seconds,
    )


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan


def _server_floats(record: RoundRecord) -> float:
    value = record.state.get("server_floats")
    return float(value) if isinstance(value, (int, float)) else math.nan


def cumulative_bytes(run: RunRecord) -> FloatArray:
    """[E] bytes down and up until each evaluated round, divided by all N clients."""
    total = np.cumsum([record.bytes_down + record.bytes_up for record in run.rounds], dtype=np.float64)
    evaluated = [record.test is not None for record in run.rounds]
    return total[evaluated] / len(run.client_names)
