"""Groups of clients that see the same things from different sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator
from fedmerge.data.partition import Partition
from fedmerge.data.partitions._even import check_groups, deal_evenly
from fedmerge.data.partitions._registry import blocks, partition
from fedmerge.data.pool import Pool

_TRAITS: tuple[dict[str, Any], ...] = (
    *({"rotation": degrees} for degrees in (0.0, 90.0, 180.0, 270.0)),
    {"invert": True},
)


@partition("rotations", citation="Ghosh et al. 2020, arXiv:2006.04088")
@dataclass(frozen=True)
class Rotations:
    """Groups of clients whose images are turned by 0, 90, 180, 270 degrees, and a fifth with inverted colours."""

    clients: int = option(50, at_least=1, help="number of clients")
    groups: int | None = option(None, at_least=1, at_most=5, help="groups; none means 5 unless continuous")
    continuous: bool = option(False, help="every client its own angle in [0, 180) degrees, no groups")
    train: int = option(64, at_least=1, help="train items per client")
    validation: int = option(40, at_least=0, help="validation items per client")
    test: int = option(200, at_least=0, help="test items per client")

    def __post_init__(self) -> None:
        check_options(self)
        if self.continuous and self.groups is not None:
            raise UsageError("Rotations.groups: got groups and continuous = true; give one of them")
        check_groups(self)

    def split(self, pool: Pool, seed: int) -> Partition:
        """The partition of a pool of images; clients of a group stand side by side."""
        if self.continuous:
            degrees = generator(seed, "partition angles").uniform(0, 180, self.clients).tolist()
            return deal_evenly(self, pool, seed, lambda i: {"rotation": degrees[i]})
        group = blocks(self.clients, min(self.clients, 5) if self.groups is None else self.groups)
        return deal_evenly(self, pool, seed, lambda i: {"group": group[i], **_TRAITS[group[i]]})
