"""The control: every client draws from the same distribution."""

from __future__ import annotations

from dataclasses import dataclass

from fedmerge.core.options import check_options, option
from fedmerge.data.partition import Partition
from fedmerge.data.partitions._even import deal_evenly
from fedmerge.data.partitions._registry import partition
from fedmerge.data.pool import Pool


@partition("iid", citation="McMahan et al. 2017, arXiv:1602.05629")
@dataclass(frozen=True)
class Iid:
    """All clients alike: items drawn from the whole pool without replacement."""

    clients: int = option(50, at_least=1, help="number of clients")
    train: int = option(64, at_least=1, help="train items per client")
    validation: int = option(40, at_least=0, help="validation items per client")
    test: int = option(200, at_least=0, help="test items per client")

    def __post_init__(self) -> None:
        check_options(self)

    def split(self, pool: Pool, seed: int) -> Partition:
        """The partition of a pool."""
        return deal_evenly(self, pool, seed, lambda _: {})
