"""Which side of a split (train, validation, test) each item goes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import UsageError
from fedmerge.data.pool import Ints, Pool


def side_shares(validation: float, test: float, where: str) -> tuple[float, float, float]:
    """Shares of train, validation and test.

    Raises:
        UsageError: if nothing is left to train on.
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise UsageError(
            f"{where}: got validation = {validation} and test = {test}; "
            "expected shares >= 0 whose sum is below 1, the rest is for training"
        )
    return 1 - validation - test, validation, test


def items_of(pool: Pool) -> Ints:
    """[n] the item of each row; every row is its own where the pool names none."""
    return np.arange(len(pool)) if pool.item is None else pool.item


def item_sides(items: Ints, strata: Ints, shares: Sequence[float], rng: np.random.Generator) -> Ints:
    """The side (0 train, 1 validation, 2 test) of every row, the same for all rows of an item.

    Within each stratum the sides get their shares of the rows as nearly as whole items allow, and at least one item
    each where there are enough; an item counts under the stratum of its first row.

    Args:
        items: [n] identity of each row's item.
        strata: [n], for example classes.
        shares: Of the three sides; a side with share 0 gets nothing.
        rng: Shuffles.
    """
    _, first, item, sizes = np.unique(items, return_index=True, return_inverse=True, return_counts=True)
    side = np.zeros(len(sizes), dtype=np.int64)
    for stratum in np.unique(strata[first]):
        members = rng.permutation(np.flatnonzero(strata[first] == stratum))
        side[members] = _cut(sizes[members], shares)
    sides: Ints = side[item]
    return sides


def _cut(sizes: Ints, shares: Sequence[float]) -> Ints:
    """Sides of items in order: cut where the rows so far come nearest to the shares."""
    n, needs = len(sizes), [int(share > 0) for share in shares]
    middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
    bounds = np.cumsum(shares)[:2] / np.sum(shares)
    first, second = (int(cut) for cut in np.searchsorted(middles, bounds))
    second = min(second, n - needs[2])
    first = max(min(first, second - needs[1]), needs[0])
    second = max(second, first + needs[1])
    return np.repeat(np.arange(3), np.diff([0, min(first, n), min(second, n), n]))


def apportion(total: int, shares: Sequence[float] | NDArray[Any]) -> Ints:
    """Whole numbers near ``total * shares`` that sum to `total` (largest remainders, the first of equals).

    >>> apportion(10, [0.7, 0.15, 0.15]).tolist()
    [7, 2, 1]
    """
    exact = total * np.asarray(shares, dtype=np.float64) / np.sum(shares)
    counts: Ints = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts
