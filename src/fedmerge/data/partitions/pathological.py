"""Clients that know a few classes each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmerge.core.errors import DataError, UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator
from fedmerge.data.partition import SPLITS, ClientPart, Partition
from fedmerge.data.partitions._even import sizes
from fedmerge.data.partitions._registry import client_names, make_partition, partition
from fedmerge.data.partitions._stock import Stock, stock_of
from fedmerge.data.pool import Ints, Pool
from fedmerge.data.sides import apportion


@partition("pathological", citation="McMahan et al. 2017, arXiv:1602.05629")
@dataclass(frozen=True)
class Pathological:
    """Clients of equal size with a few classes each, in equal parts; all classes are used about equally often."""

    clients: int = option(50, at_least=1, help="number of clients")
    classes_per_client: int = option(2, at_least=1, help="classes that a client knows")
    train: int = option(64, at_least=1, help="train items per client")
    validation: int = option(40, at_least=0, help="validation items per client")
    test: int = option(200, at_least=0, help="test items per client")

    def __post_init__(self) -> None:
        check_options(self)
        if self.train < self.classes_per_client:
            raise UsageError(
                f"Pathological.train: got {self.train} items for {self.classes_per_client} classes per client; "
                "expected at least one of each class"
            )

    def split(self, pool: Pool, seed: int) -> Partition:
        """The partition of a pool."""
        known = np.unique(pool.targets)
        if self.classes_per_client > len(known):
            raise DataError(
                f"asked for {self.classes_per_client} classes per client; {pool.name} has {len(known)}; "
                "lower classes_per_client or take a source with more classes"
            )
        rng = generator(seed, "partition pathological")
        stock = stock_of(pool, "class", list(sizes(self).values()), rng)
        counts = self._counts(known, len(pool.class_names), rng)
        _check(stock, counts.sum(axis=0))
        clients = []
        for name, wanted in zip(client_names(self.clients), counts, strict=True):
            rows: dict[str, Any] = {
                split: rng.permutation(stock.take(split, wanted[side])) for side, split in enumerate(SPLITS)
            }
            clients.append(ClientPart(name, **rows))
        return make_partition(self, pool, seed, clients)

    def _counts(self, known: Ints, num_classes: int, rng: np.random.Generator) -> Ints:
        """[N, 3, K] items of each client, side and class: the classes used least so far, chance among equals."""
        counts = np.zeros((self.clients, 3, num_classes), dtype=np.int64)
        times_used = np.zeros(num_classes, dtype=np.int64)
        for i in range(self.clients):
            shuffled = rng.permutation(known)
            classes = shuffled[np.argsort(times_used[shuffled], kind="stable")][: self.classes_per_client]
            times_used[classes] += 1
            for side, size in enumerate(sizes(self).values()):
                counts[i, side, classes] = apportion(size, np.ones(len(classes)))
        return counts


def _check(stock: Stock, wanted: Ints) -> None:
    """Refuses more items [3, K] of a class than there are."""
    asked = dict(zip(SPLITS, wanted, strict=True)) if not stock.free else {SPLITS[0]: wanted.sum(axis=0)}
    for split, counts in asked.items():
        there = stock.available(split)
        short = np.flatnonzero(counts > there)
        if len(short):
            k, side = short[0], "" if stock.free else f"{split} "
            raise DataError(
                f"asked for {counts[k]} {side}items of class {stock.pool.class_names[k]!r}, {stock.pool.name} has "
                f"{there[k]} ({len(short)} classes are short); take fewer clients, fewer items per client, "
                "or more classes per client"
            )
