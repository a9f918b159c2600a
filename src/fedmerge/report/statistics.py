"""From the accuracy of every client to the numbers of a table. Pure functions on arrays; no record is read here.

Accuracies are shares in 0..1. NaN stands for a client without test items; it takes no part in any summary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from fedmerge.core.errors import DataError

FloatArray = npt.NDArray[np.float64]
Over = Literal["seeds", "clients"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """The per-client table of one run at one round, in a few numbers.

    Attributes:
        mean: Over clients, each counting once.
        weighted: Over clients, each counting with its number of test items (the pooled accuracy).
        deviation: Standard deviation over clients; they are all there are, so it divides by N, not N - 1.
        worst_tenth: Mean of the ceil(N / 10) worst clients.
        bottom_decile: 10th percentile, linear between clients.
        below_local: Share of clients worse than their own Local-only model; NaN without such a run.
    """

    mean: float
    weighted: float
    deviation: float
    worst_tenth: float
    bottom_decile: float
    below_local: float


def summarise(accuracy: FloatArray, num_test: FloatArray, local: FloatArray | None = None) -> Summary:
    """Every summary of one run at one round.

    Args:
        accuracy: [N].
        num_test: [N] test items.
        local: [N] accuracy of each client's Local-only model, if there is one.

    Raises:
        DataError: if no client has a test score.
    """
    known = ~np.isnan(accuracy)
    if not known.any():
        raise DataError(f"none of the {len(accuracy)} clients has a test score; give the clients test items")
    values = accuracy[known]
    worst = np.sort(values)[: -(-len(values) // 10)]
    return Summary(
        mean=float(values.mean()),
        weighted=float(np.average(values, weights=num_test[known])),
        deviation=float(values.std()),
        worst_tenth=float(worst.mean()),
        bottom_decile=float(np.percentile(values, 10)),
        below_local=math.nan if local is None else share_below(accuracy, local),
    )


def share_below(accuracy: FloatArray, other: FloatArray) -> float:
    """Share of the clients scored in both, [N] each, that do strictly worse than in `other`."""
    known = ~(np.isnan(accuracy) | np.isnan(other))
    return float((accuracy < other)[known].mean()) if known.any() else math.nan


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % t interval.

    Attributes:
        mean: Of the values.
        half_width: NaN when there is one value: nothing is known about the spread then.
        count: How many values, over what.
        over: ``clients`` says nothing about another split of the data.
    """

    mean: float
    half_width: float
    count: int
    over: Over = "seeds"

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width

    @property
    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of 0; without an interval, False."""
        return self.low > 0 or self.high < 0


def mean_interval(values: FloatArray, *, over: Over = "seeds") -> Interval:
    """Mean of [n] values with ± t(n - 1) s / sqrt(n), where s divides by n - 1; NaN values are left out."""
    known = values[~np.isnan(values)]
    n = len(known)
    if n < 2:
        return Interval(float(known[0]) if n else math.nan, math.nan, n, over)
    quantile = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Interval(float(known.mean()), quantile * float(known.std(ddof=1)) / math.sqrt(n), n, over)


@dataclass(frozen=True)
class Difference:
    """One method minus the reference, on the same clients of the same seeds.

    Attributes:
        label: The method.
        seeds: On which both ran; empty if there is none, and then every number is NaN.
        interval: Of the difference of the means over clients, over seeds; with a single seed, over its clients.
        p_value: Of a paired t test over seeds, Holm-corrected for the number of methods compared; NaN with one seed.
    """

    label: str
    seeds: tuple[int, ...]
    interval: Interval
    p_value: float


def paired_interval(ours: Sequence[FloatArray], theirs: Sequence[FloatArray]) -> Interval:
    """Interval of ours - theirs, one array [N] per seed in each, the same seeds in the same order.

    With two seeds or more the interval is over seeds, with one it is over that seed's clients.
    """
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(gaps) == 1:
        return mean_interval(gaps[0], over="clients")
    return mean_interval(np.array([np.nanmean(gap) for gap in gaps]))


def paired_p_value(interval: Interval) -> float:
    """Two-sided p of the paired t test whose interval is given; 1 if the two are identical, NaN unless over seeds."""
    if interval.over != "seeds" or math.isnan(interval.half_width):
        return math.nan
    if interval.half_width == 0:
        return 1.0 if interval.mean == 0 else 0.0
    freedom = interval.count - 1
    quantile = float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))
    return float(2 * special.stdtr(freedom, -abs(interval.mean) / interval.half_width * quantile))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down correction: the i-th smallest of m becomes max over k <= i of (m - k + 1) p_k, at most 1.

    NaN stays NaN and is not counted among the m.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    running = 0.0
    for rank, (p, index) in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p))
        corrected[index] = running
    return tuple(corrected)


def recovery(mixing: FloatArray, groups: Sequence[int]) -> float:
    """Adjusted Rand index of every client's heaviest model against its true group: 1 is perfect, about 0 is chance.

    Args:
        mixing: [N, d] merging weights.
        groups: [N].
    """
    from sklearn.metrics import adjusted_rand_score  # noqa: PLC0415 - takes half a second to import

    return float(adjusted_rand_score(list(groups), mixing.argmax(axis=1)))


def mean_entropy(mixing: FloatArray) -> float:
    """Mean over clients of -sum_j a_j log a_j / log d: 0 is one model each, 1 is all models alike; NaN for d = 1."""
    models = mixing.shape[1]
    if models < 2:
        return math.nan
    return float(special.entr(mixing).sum(axis=1).mean() / math.log(models))


def overlap(mixing: FloatArray) -> FloatArray:
    """[N, N] share of weight that two clients put on the same models, sum_j min(a_ij, a_kj): 1 on the diagonal."""
    return np.stack([np.minimum(row, mixing).sum(axis=1) for row in mixing])
