"""Clients of equal size whose items come from the whole pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fedmerge.core.errors import UsageError
from fedmerge.core.randomness import generator
from fedmerge.data.partition import SPLITS, ClientPart, Partition, Split
from fedmerge.data.partitions._registry import client_names, make_partition
from fedmerge.data.partitions._stock import stock_of
from fedmerge.data.pool import Pool

ADVICE = "take fewer clients, fewer items per client, or a larger source"


class EvenSizes(Protocol):
    """The options of every kind whose clients have the same sizes."""

    @property
    def clients(self) -> int:
        """Number of clients."""
        ...

    @property
    def train(self) -> int:
        """Train items per client; `validation` and `test` alike."""
        ...

    @property
    def validation(self) -> int: ...

    @property
    def test(self) -> int: ...


def sizes(kind: EvenSizes) -> dict[Split, int]:
    """Items per client and side."""
    return {"train": kind.train, "validation": kind.validation, "test": kind.test}


def check_groups(kind: Any) -> None:
    """Refuses more groups than clients.

    Raises:
        UsageError: with both numbers.
    """
    if kind.groups is not None and kind.groups > kind.clients:
        raise UsageError(
            f"{type(kind).__name__}.groups: got {kind.groups} groups for {kind.clients} clients; "
            "expected a client for every group"
        )


def deal_evenly(kind: EvenSizes, pool: Pool, seed: int, traits: Callable[[int], dict[str, Any]]) -> Partition:
    """Draws every client's items without replacement from the whole pool.

    Args:
        kind: The options.
        pool: The items.
        seed: Decides the draw.
        traits: What client i has beside its rows: group, relabel, rotation, invert.
    """
    per_client = sizes(kind)
    rng = generator(seed, "partition rows")
    stock = stock_of(pool, "all", list(per_client.values()), rng)
    stock.check({split: kind.clients * size for split, size in per_client.items()}, ADVICE)
    clients = []
    for i, name in enumerate(client_names(kind.clients)):
        rows: dict[str, Any] = {split: stock.take(split, [per_client[split]]) for split in SPLITS}
        clients.append(ClientPart(name, **rows, **traits(i)))
    return make_partition(kind, pool, seed, clients)
