"""Groups of clients that call the same things by different names."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmerge.core.errors import DataError
from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator
from fedmerge.data.partition import Partition
from fedmerge.data.partitions._even import check_groups, deal_evenly
from fedmerge.data.partitions._registry import blocks, partition
from fedmerge.data.pool import Pool


@partition("permuted", citation="Sattler, Müller, Samek 2019, arXiv:1910.01991")
@dataclass(frozen=True)
class Permuted:
    """Groups of clients, each with its own random permutation of the labels; no group keeps the true ones."""

    clients: int = option(50, at_least=1, help="number of clients")
    groups: int = option(5, at_least=1, help="groups with one label permutation each")
    train: int = option(64, at_least=1, help="train items per client")
    validation: int = option(40, at_least=0, help="validation items per client")
    test: int = option(200, at_least=0, help="test items per client")

    def __post_init__(self) -> None:
        check_options(self)
        check_groups(self)

    def split(self, pool: Pool, seed: int) -> Partition:
        """The partition of a pool; clients of a group stand side by side."""
        permutations = draw_permutations(len(pool.class_names), self.groups, seed)
        group = blocks(self.clients, self.groups)
        return deal_evenly(self, pool, seed, lambda i: {"group": group[i], "relabel": permutations[group[i]]})


def draw_permutations(num_classes: int, groups: int, seed: int) -> list[tuple[int, ...]]:
    """Different random permutations of the classes.

    Raises:
        DataError: if there are fewer permutations than groups.
    """
    if groups > math.factorial(num_classes):
        raise DataError(
            f"asked for {groups} groups with different labels; {num_classes} classes have only "
            f"{math.factorial(num_classes)} permutations; take fewer groups or a source with more classes"
        )
    rng = generator(seed, "partition permutations")
    drawn: dict[tuple[int, ...], None] = {}  # a set that keeps the order
    while len(drawn) < groups:
        drawn[tuple(rng.permutation(num_classes).tolist())] = None
    return list(drawn)
