"""Ways of dealing a pool out to clients, one file each; importing the folder files them all."""

from __future__ import annotations

from fedmerge.data.partitions import (
    class_clusters,
    dirichlet,
    domain,
    iid,
    pathological,
    permuted,
    quantity,
    rotations,
    task,
    user,
)
from fedmerge.data.partitions._registry import PARTITIONS, Partitioner

__all__ = [
    "PARTITIONS",
    "Partitioner",
    "class_clusters",
    "dirichlet",
    "domain",
    "iid",
    "pathological",
    "permuted",
    "quantity",
    "rotations",
    "task",
    "user",
]
