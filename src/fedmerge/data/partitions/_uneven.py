"""Clients of unequal size: how many items are dealt out, and on which side."""

from __future__ import annotations

from typing import Protocol

from fedmerge.core.errors import DataError, UsageError
from fedmerge.data.pool import Pool


class UnevenSizes(Protocol):
    """The options of every kind whose clients differ in size; train, validation and test are means over clients."""

    @property
    def clients(self) -> int: ...
    @property
    def total(self) -> int | float | None: ...
    @property
    def min_examples(self) -> int: ...
    @property
    def train(self) -> int: ...
    @property
    def validation(self) -> int: ...
    @property
    def test(self) -> int: ...


def check_total(kind: UnevenSizes) -> None:
    """Refuses a fraction above 1.

    Raises:
        UsageError: with the number.
    """
    if isinstance(kind.total, float) and kind.total > 1:
        raise UsageError(
            f"{type(kind).__name__}.total: got {kind.total}; "
            "expected a whole number of items, or a fraction > 0 and <= 1"
        )


def total_items(kind: UnevenSizes, pool: Pool) -> int:
    """How many items of the pool are dealt out.

    Raises:
        DataError: if the pool has fewer, or they are too few for every client's floor.
    """
    if kind.total is None:
        total = kind.clients * (kind.train + kind.validation + kind.test)
    else:
        total = kind.total if isinstance(kind.total, int) else int(kind.total * len(pool))
    if total > len(pool):
        raise DataError(
            f"asked for {total} items, {pool.name} has {len(pool)}; "
            "give a smaller total, take fewer clients, fewer items per client, or a larger source"
        )
    if total < kind.clients * kind.min_examples:
        raise DataError(
            f"{total} items of {pool.name} are dealt out; {kind.clients} clients with at least {kind.min_examples} "
            f"need {kind.clients * kind.min_examples}; raise total, lower min_examples, or take fewer clients"
        )
    return total
