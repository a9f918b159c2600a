"""The rows of a pool that are not dealt out yet.

The item law lives here: where a pool names items, every item is given one side (train, validation or test) for the
whole federation before anything is dealt out. Where every row is its own item, any row may go to any side, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError
from fedmerge.data.partition import SPLITS, Split
from fedmerge.data.pool import Ints, Pool
from fedmerge.data.sides import item_sides, items_of


@dataclass(frozen=True)
class Stock:
    """Shuffled rows by side and stratum; `take` removes what it gives.

    Attributes:
        pool: Where the rows are from.
        queues: For each side the rows of each stratum; the three sides are one and the same list if sides are free.
        free: Whether any row may go to any side.
    """

    pool: Pool
    queues: dict[Split, list[Ints]]
    free: bool

    def available(self, split: Split) -> Ints:
        """Rows left for one side, per stratum."""
        return np.array([len(rows) for rows in self.queues[split]], dtype=np.int64)

    def take(self, split: Split, counts: Sequence[int] | Ints) -> Ints:
        """So many rows of each stratum, stratum by stratum; the caller has checked that they are there."""
        queue = self.queues[split]
        taken = [rows[:count] for rows, count in zip(queue, counts, strict=True)]
        queue[:] = [rows[count:] for rows, count in zip(queue, counts, strict=True)]
        return np.concatenate(taken)

    def check(self, asked: dict[Split, int], advice: str) -> None:
        """Refuses a request for more rows than there are, all strata together.

        Args:
            asked: Rows for each side.
            advice: What to change, for the message.

        Raises:
            DataError: with the numbers.
        """
        if self.free:
            there, total = int(self.available("train").sum()), sum(asked.values())
            if total > there:
                raise DataError(
                    f"asked for {total} items, {self.pool.name} has {there}; {advice} "
                    "(options clients, train, validation, test of the partition)"
                )
            return
        for split, total in asked.items():
            there = int(self.available(split).sum())
            if total > there:
                raise DataError(
                    f"asked for {total} {split} items, {self.pool.name} has {there} for that side "
                    f"({len(self.pool)} in all; near-copies of one item stay on one side); {advice}"
                )


def stock_of(
    pool: Pool,
    by: Literal["all", "class"],
    shares: Sequence[float],
    rng: np.random.Generator,
    *,
    fixed: bool = False,
    known: Ints | None = None,
) -> Stock:
    """All rows of a pool, shuffled.

    Args:
        pool: Where the rows are from.
        by: Whether rows are asked for by class or all together, in one stratum.
        shares: Of train, validation and test in what will be asked for; decides how many items go to each side.
        rng: Shuffles.
        fixed: Fix sides even if every row is its own item.
        known: [n] sides that are decided already, −1 for rows that are free; the same for all rows of an item.
    """
    strata, num_strata = (pool.targets, len(pool.class_names)) if by == "class" else (np.zeros_like(pool.targets), 1)
    if pool.item is None and not fixed:
        queue = _queues(rng.permutation(len(pool)), strata, num_strata)
        return Stock(pool, dict.fromkeys(SPLITS, queue), free=True)
    sides = item_sides(items_of(pool), strata, shares, rng)
    sides = sides if known is None else np.where(known < 0, sides, known)
    rows = [rng.permutation(np.flatnonzero(sides == side)) for side in range(3)]
    queues = {split: _queues(rows[side], strata, num_strata) for side, split in enumerate(SPLITS)}
    return Stock(pool, queues, free=False)


def _queues(rows: Ints, strata: Ints, num_strata: int) -> list[Ints]:
    """The rows of each stratum, in the order given."""
    rows = rows[np.argsort(strata[rows], kind="stable")]
    return np.split(rows, np.searchsorted(strata[rows], np.arange(1, num_strata)))


def draw_counts(shares: NDArray[np.float64], total: int, available: Ints, rng: np.random.Generator) -> Ints | None:
    """Labels drawn with the given shares; what a class cannot give is drawn again from the others.

    Returns:
        [K] counts that sum to `total`, none above what is available; None if the classes with a share are too few.
    """
    counts = np.zeros(len(available), dtype=np.int64)
    while (missing := total - int(counts.sum())) > 0:
        open_shares = np.where(counts < available, shares, 0.0)
        if open_shares.sum() <= 0:
            return None
        counts = np.minimum(counts + rng.multinomial(missing, open_shares / open_shares.sum()), available)
    return counts
