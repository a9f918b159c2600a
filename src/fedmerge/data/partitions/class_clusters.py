"""Groups of clients that each know only some of the classes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError
from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator
from fedmerge.data.partition import SPLITS, ClientPart, Partition, Split
from fedmerge.data.partitions._even import check_groups, sizes
from fedmerge.data.partitions._registry import blocks, client_names, make_partition, partition
from fedmerge.data.partitions._stock import Stock, draw_counts, stock_of
from fedmerge.data.pool import Ints, Pool

log = logging.getLogger(__name__)

_KIND = "class-clusters"


@partition(_KIND, citation="Chen et al. 2025, arXiv:2504.06768: 'Cluster non-IID'")
@dataclass(frozen=True)
class ClassClusters:
    """Groups of clients, each with a random subset of the classes and, inside it, Dirichlet label shares per client.

    Subsets of different groups may overlap. A class that runs out is replaced by the client's other classes.
    """

    clients: int = option(50, at_least=1, help="number of clients")
    groups: int = option(5, at_least=1, help="groups with one subset of the classes each")
    classes_per_group: int = option(4, at_least=1, help="classes in a group's subset (the paper: 30 of 100)")
    concentration: float = option(10.0, above=0, help="of the Dirichlet label shares inside the subset")
    train: int = option(64, at_least=1, help="train items per client")
    validation: int = option(40, at_least=0, help="validation items per client")
    test: int = option(200, at_least=0, help="test items per client")

    def __post_init__(self) -> None:
        check_options(self)
        check_groups(self)

    def split(self, pool: Pool, seed: int) -> Partition:
        """The partition of a pool; clients of a group stand side by side."""
        known = np.unique(pool.targets)
        if self.classes_per_group > len(known):
            raise DataError(
                f"asked for {self.classes_per_group} classes per group; {pool.name} has {len(known)}; "
                "lower classes_per_group or take a source with more classes"
            )
        rng = generator(seed, "partition class-clusters")
        stock = stock_of(pool, "class", list(sizes(self).values()), rng)
        subsets = [rng.choice(known, self.classes_per_group, replace=False) for _ in range(self.groups)]
        clients = []
        for name, group in zip(client_names(self.clients), blocks(self.clients, self.groups), strict=True):
            shares = np.zeros(len(pool.class_names))
            shares[subsets[group]] = rng.dirichlet(np.full(self.classes_per_group, self.concentration))
            rows: dict[str, Any] = {split: self._draw(stock, split, shares, name, rng) for split in SPLITS}
            clients.append(ClientPart(name, **rows, group=group))
        self._say_what_ran_out(stock, np.unique(subsets))
        return make_partition(self, pool, seed, clients)

    def _say_what_ran_out(self, stock: Stock, used: Ints) -> None:
        for split in SPLITS[:1] if stock.free else SPLITS:
            empty = used[stock.available(split)[used] == 0]
            if sizes(self)[split] and len(empty):
                names = ", ".join(stock.pool.class_names[k] for k in empty)
                side = "" if stock.free else f" {split}"
                log.warning("%s: no%s items are left of %s; the last clients drew from others", _KIND, side, names)

    def _draw(
        self, stock: Stock, split: Split, shares: NDArray[np.float64], name: str, rng: np.random.Generator
    ) -> Ints:
        wanted = sizes(self)[split]
        counts = draw_counts(shares, wanted, stock.available(split), rng)
        if counts is None:
            there = int(stock.available(split)[shares > 0].sum())
            raise DataError(
                f"{name}: asked for {wanted} {split} items of its group's {self.classes_per_group} classes, "
                f"{there} of these are left in {stock.pool.name}; take fewer clients, fewer items per client, "
                "or more classes per group"
            )
        return rng.permutation(stock.take(split, counts))
