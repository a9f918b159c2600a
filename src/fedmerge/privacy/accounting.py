"""How much a run tells, by privacy loss distributions of the Poisson-sampled Gaussian mechanism.

Neighbours differ by one client (or one example) that is there or not. The bound is rounded upwards (connect-the-dots,
Doroshenko et al., arXiv:2207.04380) and computed by dp-accounting, which is loaded at the first question.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from fedmerge.core.errors import UsageError

_INTERVAL = 1e-4
"""Grid of the privacy loss at z = 1 and above; wider for less noise, whose losses grow as 1/z²."""
_NOISE = (1e-2, 1e6)
"""Noise multipliers that `noise_for` looks between."""
_PRECISION = 1e-3
"""Relative width at which `noise_for` stops."""


def epsilon(noise_multiplier: float, sampling_rate: float, rounds: int, delta: float) -> float:
    """The epsilon that goes with `delta` after `rounds` releases.

    Args:
        noise_multiplier: z, noise over the largest contribution; 0 gives infinity.
        sampling_rate: q, chance of each client to take part in a round, independently of all others.
        rounds: Releases, 0 or more.
        delta: Between 0 and 1.

    Raises:
        UsageError: for a number out of range, or without dp-accounting.

    >>> round(epsilon(1.0, 1.0, 1, 1e-5), 2)
    4.38
    """
    _check(sampling_rate, rounds, delta)
    if not 0 <= noise_multiplier < math.inf:
        raise UsageError(f"noise_multiplier: got {noise_multiplier!r}; expected a number >= 0")
    if rounds == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    if sampling_rate == 1:  # r Gaussian releases are one with the noise divided by √r
        noise_multiplier, rounds = noise_multiplier / math.sqrt(rounds), 1
    one = _distributions().from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=_INTERVAL * max(1.0, noise_multiplier**-2),
        sampling_prob=sampling_rate,
    )
    every = one.self_compose(rounds) if rounds > 1 else one
    return float(every.get_epsilon_for_delta(delta))


def noise_for(target: float, sampling_rate: float, rounds: int, delta: float) -> float:
    """The least noise multiplier, to a thousandth, with which a run stays at or below an epsilon; by bisection.

    Args:
        target: Epsilon, above 0.
        sampling_rate: q.
        rounds: 1 or more.
        delta: Between 0 and 1.

    Raises:
        UsageError: for a number out of range, or without dp-accounting.
    """
    _check(sampling_rate, rounds, delta)
    if not 0 < target < math.inf:
        raise UsageError(f"epsilon: got {target!r}; expected a number > 0")
    low, high = _NOISE[0], _NOISE[0]
    while epsilon(high, sampling_rate, rounds, delta) > target:
        if high >= _NOISE[1]:
            raise UsageError(f"epsilon: got {target!r}, which no noise multiplier up to {_NOISE[1]:g} reaches")
        low, high = high, min(4 * high, _NOISE[1])
    while high > (1 + _PRECISION) * low:
        middle = math.sqrt(low * high)
        enough = epsilon(middle, sampling_rate, rounds, delta) <= target
        low, high = (low, middle) if enough else (middle, high)
    return high


def _check(sampling_rate: float, rounds: int, delta: float) -> None:
    faults = []
    if not 0 < sampling_rate <= 1:
        faults.append(f"sampling_rate: got {sampling_rate!r}; expected a number > 0 and <= 1")
    if not 0 <= rounds < math.inf or rounds != int(rounds):
        faults.append(f"rounds: got {rounds!r}; expected a whole number >= 0")
    if not 0 < delta < 1:
        faults.append(f"delta: got {delta!r}; expected a number > 0 and < 1")
    if faults:
        raise UsageError("\n".join(faults))


def _distributions() -> Any:
    try:
        return importlib.import_module("dp_accounting.pld.privacy_loss_distribution")
    except ImportError as error:
        raise UsageError(
            "epsilon cannot be computed: the package dp-accounting is missing; install it with "
            "pip install 'fedmerge[privacy]'"
        ) from error
