"""What a kind of partition is, and the registry that a new one adds itself to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from fedmerge.core.registry import Registry
from fedmerge.data.partition import ClientPart, Partition
from fedmerge.data.pool import Pool


class Partitioner(Protocol):
    """A frozen dataclass of options that deals a pool out to clients."""

    def split(self, pool: Pool, seed: int) -> Partition:
        """The same partition for the same options, pool and seed.

        Raises:
            DataError: if the pool cannot satisfy the options; says what is asked and what the pool has.
        """
        ...


PARTITIONS: Registry[Partitioner] = Registry("partition")
partition = PARTITIONS.register


def make_partition(kind: Any, pool: Pool, seed: int, clients: Sequence[ClientPart]) -> Partition:
    """The clients together with all that they were made from."""
    return Partition(
        kind=PARTITIONS.name_of(kind),
        seed=seed,
        options=dataclasses.asdict(kind),
        pool_name=pool.name,
        pool_sha256=pool.sha256(),
        pool_size=len(pool),
        clients=tuple(clients),
    )


def client_names(num_clients: int) -> list[str]:
    """Names that sort in client order.

    >>> client_names(11)[9:]
    ['client-09', 'client-10']
    """
    digits = len(str(num_clients - 1))
    return [f"client-{number:0{digits}d}" for number in range(num_clients)]


def blocks(num_clients: int, groups: int) -> list[int]:
    """The group of each client: contiguous blocks whose sizes differ by one at most.

    >>> blocks(5, 2)
    [0, 0, 0, 1, 1]
    """
    return [group for group in range(groups) for _ in range(group, num_clients, groups)]
