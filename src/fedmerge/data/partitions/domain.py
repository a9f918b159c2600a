"""Clients that see the same classes in one style each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmerge.core.errors import DataError
from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator
from fedmerge.data.partition import SPLITS, ClientPart, Partition
from fedmerge.data.partitions._registry import make_partition, partition
from fedmerge.data.pool import Ints, Pool
from fedmerge.data.sides import item_sides, items_of, side_shares


@partition("domain", citation="Chen et al. 2025, arXiv:2504.06768: 'Domain non-IID'")
@dataclass(frozen=True)
class Domain:
    """One domain per client, equal sizes; the test items of a domain are shared by its clients.

    An item is on the same side in every domain: nobody is tested on a thing that anybody trained on.
    """

    clients_per_domain: int = option(10, at_least=1, help="clients that share a domain's items")
    validation: float = option(0.15, at_least=0, below=1, help="share of the items for validation")
    test: float = option(0.25, at_least=0, below=1, help="share of the items held out for the test")

    def __post_init__(self) -> None:
        check_options(self)
        side_shares(self.validation, self.test, "Domain")

    def split(self, pool: Pool, seed: int) -> Partition:
        """The partition of a pool with domains; what does not divide evenly is left over."""
        if pool.domain is None:
            raise DataError(f"{pool.name} has no domains; take a source that has, or another kind of partition")
        rng = generator(seed, "partition domain")
        shares = side_shares(self.validation, self.test, "Domain")
        sides = item_sides(items_of(pool), pool.targets, shares, rng)
        domains = np.unique(pool.domain).tolist()
        rows = {
            (d, side): rng.permutation(np.flatnonzero((pool.domain == d) & (sides == side)))
            for d in domains
            for side in range(3)
        }
        sizes = [self._size(rows, side, pool) if shares[side] else 0 for side in range(3)]
        clients = [
            ClientPart(f"{_name(pool, d)}-{j}", **self._rows(rows, d, j, sizes), group=group)
            for group, d in enumerate(domains)
            for j in range(self.clients_per_domain)
        ]
        return make_partition(self, pool, seed, clients)

    def _size(self, rows: dict[tuple[int, int], Ints], side: int, pool: Pool) -> int:
        """Items of a client on one side: what the poorest domain can give to each of its clients."""
        sharing = 1 if side == 2 else self.clients_per_domain
        domain, there = min(((d, len(r)) for (d, s), r in rows.items() if s == side), key=lambda pair: pair[1])
        if there < sharing:
            raise DataError(
                f"asked for {sharing} clients with {SPLITS[side]} items of their own in each domain; domain "
                f"{_name(pool, domain)!r} of {pool.name} has {there} such items; "
                f"take fewer clients per domain or a larger share of {SPLITS[side]} items"
            )
        return there // sharing

    def _rows(self, rows: dict[tuple[int, int], Ints], domain: int, client: int, sizes: list[int]) -> dict[str, Any]:
        own = {side: slice(client * sizes[side], (client + 1) * sizes[side]) for side in (0, 1)}
        train, validation = (rows[domain, side][own[side]] for side in (0, 1))
        return {"train": train, "validation": validation, "test": rows[domain, 2]}


def _name(pool: Pool, domain: int) -> str:
    return pool.domain_names[domain] if pool.domain_names else f"domain-{domain}"
