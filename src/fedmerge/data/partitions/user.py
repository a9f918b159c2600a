"""Clients as they are in nature: writers, sites, speakers."""

from __future__ import annotations

import logging
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

log = logging.getLogger(__name__)


@partition("user", citation="Caldas et al. 2018, arXiv:1812.01097")
@dataclass(frozen=True)
class User:
    """The source's natural users, each with all of its items."""

    min_examples: int = option(20, at_least=3, help="users with fewer items are left out")
    max_clients: int | None = option(None, at_least=1, help="draw so many users; none takes all")
    validation: float = option(0.15, at_least=0, below=1, help="share of a client's items for validation")
    test: float = option(0.15, at_least=0, below=1, help="share of a client's items for the test")

    def __post_init__(self) -> None:
        check_options(self)
        side_shares(self.validation, self.test, "User")

    def split(self, pool: Pool, seed: int) -> Partition:
        """The partition of a pool with users."""
        if pool.user is None:
            raise DataError(f"{pool.name} has no natural users; take a source that has, or another kind of partition")
        rng = generator(seed, "partition user")
        shares = side_shares(self.validation, self.test, "User")
        sides = item_sides(items_of(pool), pool.user, shares, rng)
        clients = []
        for user in self._choose(pool.name, pool.user, rng):
            mine = rng.permutation(np.flatnonzero(pool.user == user))
            rows: dict[str, Any] = {split: mine[sides[mine] == side] for side, split in enumerate(SPLITS)}
            self._check(pool, user, [len(part) for part in rows.values()], shares)
            clients.append(ClientPart(_name(pool, user), **rows))
        return make_partition(self, pool, seed, clients)

    def _choose(self, pool: str, column: Ints, rng: np.random.Generator) -> list[int]:
        users, sizes = np.unique(column, return_counts=True)
        enough = users[sizes >= self.min_examples]
        if not len(enough):
            raise DataError(
                f"asked for users with at least {self.min_examples} items; the largest of {pool} has "
                f"{sizes.max()}; lower min_examples"
            )
        log.info("%d of %d users of %s have at least %d items", len(enough), len(users), pool, self.min_examples)
        if self.max_clients is None or self.max_clients >= len(enough):
            return [int(user) for user in enough]
        return sorted(int(user) for user in rng.choice(enough, self.max_clients, replace=False))

    def _check(self, pool: Pool, user: int, sizes: list[int], shares: tuple[float, float, float]) -> None:
        for split, size, share in zip(SPLITS, sizes, shares, strict=True):
            if share and not size:
                raise DataError(
                    f"user {_name(pool, user)!r} of {pool.name} has {sum(sizes)} items and none for {split}, because "
                    "near-copies stay on one side; raise min_examples"
                )


def _name(pool: Pool, user: int) -> str:
    return pool.user_names[user] if pool.user_names else f"user-{user}"
