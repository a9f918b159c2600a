"""How runs went, round by round, with the seeds of a method side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedmerge.experiment.record import RoundRecord, RunRecord
from fedmerge.report.costs import cumulative_bytes
from fedmerge.report.statistics import FloatArray, mean_entropy, mean_interval
from fedmerge.report.study import Study, client_accuracies


@dataclass(frozen=True)
class Curve:
    """One quantity of one method at every round that all its S seeds evaluated (E of them).

    Attributes:
        label: The method.
        rounds: [E] ascending.
        values: [S, E].
        bytes_per_client: [E] down and up until then over all clients, mean over seeds.
    """

    label: str
    rounds: FloatArray
    values: FloatArray
    bytes_per_client: FloatArray

    @property
    def mean(self) -> FloatArray:
        """[E] over seeds."""
        return np.asarray(self.values.mean(axis=0))

    def band(self) -> tuple[FloatArray, FloatArray] | None:
        """[E] low and high: the 95 % t interval of three seeds or more, the range of two, None for one."""
        seeds = len(self.values)
        if seeds < 2:
            return None
        if seeds == 2:
            return self.values.min(axis=0), self.values.max(axis=0)
        intervals = [mean_interval(column) for column in self.values.T]
        return np.array([i.low for i in intervals]), np.array([i.high for i in intervals])


Measure = Callable[[RunRecord, RoundRecord], float]


def accuracy(_run: RunRecord, record: RoundRecord) -> float:
    """Mean test accuracy over clients."""
    return float(np.nanmean(client_accuracies(record)))


def entropy(_run: RunRecord, record: RoundRecord) -> float:
    """Mean normalised entropy of the merging weights; NaN without them."""
    return np.nan if record.mixing is None else mean_entropy(np.array(record.mixing))


def curves(study: Study, measure: Measure) -> tuple[Curve, ...]:
    """One curve per method that has the quantity; rounds at which any of its seeds lacks it are left out."""
    found = (_curve(label, tuple(runs.values()), measure) for label, runs in study.runs.items())
    return tuple(curve for curve in found if len(curve.rounds))


def _curve(label: str, runs: tuple[RunRecord, ...], measure: Measure) -> Curve:
    tracks = [_track(run, measure) for run in runs]
    rounds = sorted(set.intersection(*(set(track) for track in tracks)))
    values = np.array([[track[number][0] for number in rounds] for track in tracks])
    sent = np.array([[track[number][1] for number in rounds] for track in tracks])
    return Curve(label, np.array(rounds, dtype=np.float64), values, sent.mean(axis=0))


def _track(run: RunRecord, measure: Measure) -> dict[int, tuple[float, float]]:
    """Round -> value and bytes per client until then."""
    pairs = zip(run.evaluated(), cumulative_bytes(run), strict=True)
    track = {record.round: (measure(run, record), float(sent)) for record, sent in pairs}
    return {number: pair for number, pair in track.items() if not np.isnan(pair[0])}
