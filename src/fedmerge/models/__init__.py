"""Networks, one file each; a module placed in this folder is registered by that alone."""

import importlib
import pkgutil

from fedmerge.models._registry import NETWORKS, Network, accepted, network

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["NETWORKS", "Network", "accepted", "network"]
