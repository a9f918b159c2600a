"""Clients of one task each: sizes as asked for, all classes of the task or a Dirichlet share of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fedmerge.core.errors import DataError
from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator
from fedmerge.data.partition import SPLITS, ClientPart, Partition, Split
from fedmerge.data.partitions._registry import make_partition, partition
from fedmerge.data.partitions._stock import Stock, draw_counts, stock_of
from fedmerge.data.pool import Ints, Pool


@partition("task", citation="Chen et al. 2025, arXiv:2504.06768: clients of a foundation model with different tasks")
@dataclass(frozen=True)
class Task:
    """One task (domain of the pool) per client; nothing is given to two clients.

    With `alpha` every client draws its own shares of the task's classes from Dirichlet(alpha), the same on its three
    sides; without it a client's items are drawn from all of the task's.
    """

    clients_per_task: int = option(4, at_least=1, help="clients that share a task")
    train: int = option(64, at_least=1, help="train items per client")
    validation: int = option(40, at_least=0, help="validation items per client")
    test: int = option(120, at_least=0, help="test items per client")
    alpha: float | None = option(None, above=0, help="small: few classes of the task per client; none: all alike")

    def __post_init__(self) -> None:
        check_options(self)

    def split(self, pool: Pool, seed: int) -> Partition:
        """The partition of a pool with domains."""
        if pool.domain is None:
            raise DataError(f"{pool.name} has no tasks (domains); take a source that has, or another kind of partition")
        clients = []
        known = np.full(len(pool), -1)  # sides of items that an earlier task has too
        for group, domain in enumerate(np.unique(pool.domain).tolist()):
            name = pool.domain_names[domain] if pool.domain_names else f"task-{domain}"
            rng, own = generator(seed, "partition task", group), np.flatnonzero(pool.domain == domain)
            stock = self._stock(pool, own, name, known[own], rng)
            known = _decided(known, pool, own, stock)
            clients += self._clients(stock, own, name, group, rng)
        return make_partition(self, pool, seed, clients)

    @property
    def _sizes(self) -> dict[Split, int]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def _stock(self, pool: Pool, own: Ints, name: str, known: Ints, rng: np.random.Generator) -> Stock:
        """The rows of one task."""
        part = replace(
            pool,
            name=f"task {name!r} of {pool.name}",
            inputs=pool.inputs[own],
            targets=pool.targets[own],
            item=None if pool.item is None else pool.item[own],
            user=None,
            domain=None,
            answers=None,
        )
        by: Literal["all", "class"] = "all" if self.alpha is None else "class"
        stock = stock_of(part, by, list(self._sizes.values()), rng, known=known)
        stock.check(
            {split: self.clients_per_task * size for split, size in self._sizes.items()},
            "take fewer clients_per_task, fewer items per client, or a larger source",
        )
        return stock

    def _clients(self, stock: Stock, own: Ints, name: str, group: int, rng: np.random.Generator) -> list[ClientPart]:
        clients = []
        for i in range(self.clients_per_task):
            counts = self._counts(stock, self._sizes, name, rng)
            rows: dict[str, Any] = {split: own[stock.take(split, counts[split])] for split in SPLITS}
            clients.append(ClientPart(f"{name}-{i}", **rows, group=group))
        return clients

    def _counts(self, stock: Stock, sizes: dict[Split, int], name: str, rng: np.random.Generator) -> dict[Split, Any]:
        """Items of each stratum for one client."""
        if self.alpha is None:
            return {split: [size] for split, size in sizes.items()}
        there = stock.available("train") > 0
        shares = np.zeros(len(there))
        shares[there] = rng.dirichlet(np.full(int(there.sum()), self.alpha))
        taken = np.zeros_like(stock.available("train"))
        counts: dict[Split, Any] = {}
        for split in SPLITS:
            left = stock.available(split) - (taken if stock.free else 0)
            drawn = draw_counts(shares, sizes[split], left, rng)
            if drawn is None:
                raise DataError(
                    f"task {name!r}: the classes that a client drew have too few {split} items for {sizes[split]}; "
                    "raise alpha, or take fewer clients or items"
                )
            counts[split], taken = drawn, taken + drawn
        return counts


def _decided(known: Ints, pool: Pool, own: Ints, stock: Stock) -> Ints:
    """[n] `known` with the sides that a task's stock gave to its items, wherever else these stand in the pool."""
    if pool.item is None:
        return known
    sides = known.copy()
    for side, split in enumerate(SPLITS):
        rows = own[np.concatenate(stock.queues[split])]
        sides[np.isin(pool.item, pool.item[rows])] = side
    return sides
