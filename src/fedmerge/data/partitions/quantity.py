"""Clients that differ only in how much they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator
from fedmerge.data.partition import SPLITS, ClientPart, Partition
from fedmerge.data.partitions._registry import client_names, make_partition, partition
from fedmerge.data.partitions._stock import stock_of
from fedmerge.data.partitions._uneven import check_total, total_items
from fedmerge.data.pool import Ints, Pool
from fedmerge.data.sides import apportion


@partition("quantity", citation="Li, Diao, Chen, He 2022, arXiv:2102.02079")
@dataclass(frozen=True)
class Quantity:
    """Clients alike in their labels and very unequal in size: sizes above the floor are Dirichlet(alpha)."""

    clients: int = option(50, at_least=1, help="number of clients")
    alpha: float = option(0.5, above=0, help="small: a few clients have nearly all; large: equal sizes")
    total: int | float | None = option(None, above=0, help="items dealt out, or a fraction of the source")
    min_examples: int = option(20, at_least=3, help="fewest items of a client, its three sides together")
    train: int = option(64, at_least=1, help="train items per client on average")
    validation: int = option(40, at_least=0, help="validation items per client on average")
    test: int = option(200, at_least=0, help="test items per client on average")

    def __post_init__(self) -> None:
        check_options(self)
        check_total(self)

    def split(self, pool: Pool, seed: int) -> Partition:
        """The partition of a pool."""
        rng = generator(seed, "partition quantity")
        shares = (self.train, self.validation, self.test)
        spare = total_items(self, pool) - self.clients * self.min_examples
        above = apportion(spare, rng.dirichlet(np.full(self.clients, self.alpha)))
        sides = np.stack([_sides(self.min_examples + int(size), shares) for size in above])
        stock = stock_of(pool, "all", shares, rng)
        stock.check(dict(zip(SPLITS, sides.sum(axis=0).tolist(), strict=True)), "lower total or take a larger source")
        clients = []
        for name, counts in zip(client_names(self.clients), sides, strict=True):
            rows: dict[str, Any] = {split: stock.take(split, [counts[n]]) for n, split in enumerate(SPLITS)}
            clients.append(ClientPart(name, **rows))
        return make_partition(self, pool, seed, clients)


def _sides(size: int, shares: tuple[int, int, int]) -> Ints:
    """Items of each side: one at least where there is a share, the rest by the shares."""
    floor = np.array([int(share > 0) for share in shares])
    return floor + apportion(size - int(floor.sum()), shares)
