"""Clients with data of their own: sources, partitions, and the way to bring your own."""

from __future__ import annotations

from fedmerge.data.byo import from_arrays, from_dataset, from_folder, from_frame, from_texts
from fedmerge.data.deal import deal
from fedmerge.data.federated import ClientData, Examples, FederatedData, check_federation
from fedmerge.data.folder_options import FolderOptions
from fedmerge.data.partition import ClientPart, Partition
from fedmerge.data.partitions import PARTITIONS
from fedmerge.data.pool import Pool
from fedmerge.data.sources import SOURCES

__all__ = [
    "PARTITIONS",
    "SOURCES",
    "ClientData",
    "ClientPart",
    "Examples",
    "FederatedData",
    "FolderOptions",
    "Partition",
    "Pool",
    "check_federation",
    "deal",
    "from_arrays",
    "from_dataset",
    "from_folder",
    "from_frame",
    "from_texts",
]
