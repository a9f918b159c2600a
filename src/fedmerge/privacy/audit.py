"""How much a mechanism has been seen to tell, to hold against what it claims.

Two measures. From a shift: neighbours whose releases are Gaussians around two points cannot be told apart better, or
worse, than the distance of the points allows. From attacks: an attacker's scores on runs with and without a client
bound epsilon from below, with a confidence (Jagielski et al., arXiv:2006.07709).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from fedmerge.privacy.accounting import epsilon

Scores = NDArray[np.float64]


def epsilon_of_shift(shift: float, sampling_rate: float, rounds: int, delta: float) -> float:
    """Epsilon of releases that one client moves by `shift` standard deviations of their noise.

    Args:
        shift: ‖S(with) − S(without)‖ over the noise on each number of S.
        sampling_rate: q.
        rounds: Releases.
        delta: For which epsilon is told.
    """
    return epsilon(1 / shift, sampling_rate, rounds, delta) if shift > 0 else 0.0


def lower_bound(inside: Scores, outside: Scores, *, delta: float, confidence: float) -> float:
    """An epsilon below which the mechanism cannot be, given an attacker's scores; 0 where they show nothing.

    The first half of the scores chooses threshold and direction, the second half is measured at them.

    Args:
        inside: [n] scores on runs with the client; larger says that it was there.
        outside: [n] scores on runs without it.
        delta: Of the claim.
        confidence: That the bound is true, for example 0.999.
    """
    chosen, kept = [half[: len(half) // 2] for half in (inside, outside)], [h[len(h) // 2 :] for h in (inside, outside)]
    candidates = [
        (sign, threshold)
        for sign in (1.0, -1.0)
        for threshold in np.quantile(sign * np.concatenate(chosen), np.linspace(0, 1, 101))
    ]
    best = max(candidates, key=lambda one: _bound(chosen, one, delta, confidence))
    return max(0.0, _bound(kept, best, delta, confidence))


def _bound(halves: list[Scores], test: tuple[float, float], delta: float, confidence: float) -> float:
    """Log of (true positives − delta) over false positives, each at its end of a Clopper-Pearson interval.

    Where the test accuses by small scores, runs without the client are its positives.
    """
    sign, threshold = test
    positive, negative = halves if sign > 0 else halves[::-1]
    error = (1 - confidence) / 2
    hits, misses = int((sign * positive > threshold).sum()), int((sign * negative > threshold).sum())
    low = float(beta.ppf(error, hits, len(positive) - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - error, misses + 1, len(negative) - misses)) if misses < len(negative) else 1.0
    return math.log((low - delta) / high) if low > delta else -math.inf
