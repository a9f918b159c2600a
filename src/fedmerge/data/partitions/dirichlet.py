"""Every class is spread over the clients by its own Dirichlet draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError
from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator
from fedmerge.data.partition import SPLITS, ClientPart, Partition
from fedmerge.data.partitions._registry import client_names, make_partition, partition
from fedmerge.data.partitions._stock import Stock, stock_of
from fedmerge.data.partitions._uneven import check_total, total_items
from fedmerge.data.pool import Ints, Pool
from fedmerge.data.sides import apportion

_DRAWS = 1000


@partition("dirichlet", citation="Hsu, Qi, Brown 2019, arXiv:1909.06335")
@dataclass(frozen=True)
class Dirichlet:
    """Unequal clients, each with few classes: each class is spread over clients by Dirichlet(alpha).

    A client that has more than the mean number of items gets none of the classes that follow, as in the code that
    the field shares. Draws are repeated until every client has `min_examples` items and something on each side.
    """

    clients: int = option(50, at_least=1, help="number of clients")
    alpha: float = option(0.1, above=0, help="small: few classes per client; large: all clients alike")
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
        rng = generator(seed, "partition dirichlet")
        total = total_items(self, pool)
        stock = stock_of(pool, "class", (self.train, self.validation, self.test), rng, fixed=True)
        counts = self._spread(_used(stock, total, rng), rng)
        clients = []
        for i, name in enumerate(client_names(self.clients)):
            rows: dict[str, Any] = {
                split: rng.permutation(stock.take(split, counts[side, :, i])) for side, split in enumerate(SPLITS)
            }
            clients.append(ClientPart(name, **rows))
        return make_partition(self, pool, seed, clients)

    def _spread(self, used: Ints, rng: np.random.Generator) -> Ints:
        """[3, K, N] items of each side, class and client that keep the floors."""
        wanted = np.array([self.train, self.validation, self.test]) > 0
        fairest = 0
        for _ in range(_DRAWS):
            counts = spread_classes(used, self.clients, self.alpha, rng)
            fewest = int(counts.sum(axis=(0, 1)).min())
            if fewest >= self.min_examples and counts.sum(axis=1)[wanted].min() > 0:
                return counts
            fairest = max(fairest, fewest)
        raise DataError(
            f"asked for at least {self.min_examples} items, some on each side, for each of {self.clients} clients; "
            f"in the fairest of {_DRAWS} draws a client has {fairest} of {int(used.sum())} items (Dirichlet alpha "
            f"{self.alpha}); raise alpha or total, lower min_examples, or take fewer clients"
        )


def _used(stock: Stock, total: int, rng: np.random.Generator) -> Ints:
    """[3, K] items of each side and class among `total` items drawn from all."""
    available = np.stack([stock.available(split) for split in SPLITS])
    quota = apportion(total, available.sum(axis=1))
    return np.stack([rng.multivariate_hypergeometric(row, size) for row, size in zip(available, quota, strict=True)])


def spread_classes(used: Ints, num_clients: int, alpha: float, rng: np.random.Generator) -> Ints:
    """One draw: items [3, K] of each side and class over N clients, [3, K, N]."""
    counts = np.zeros((*used.shape, num_clients), dtype=np.int64)
    mean = used.sum() / num_clients
    for k in range(used.shape[1]):
        below = counts.sum(axis=(0, 1)) <= mean  # never empty: not everybody is above the mean
        shares = rng.dirichlet(np.full(num_clients, alpha)) * below
        counts[:, k] = _cut(used[:, k], shares if shares.sum() > 0 else below)
    return counts


def _cut(sizes: Ints, shares: NDArray[Any]) -> Ints:
    """[3, N] whole items: each side's row is cut at the cumulated shares, rounded to the nearest.

    Cutting off decimals instead would give the last client one item of nearly every class.
    """
    cumulated = np.cumsum(shares)
    ends = np.rint(sizes[:, None] * (cumulated / cumulated[-1])).astype(np.int64)
    counts: Ints = np.diff(ends, axis=1, prepend=0)
    return counts
