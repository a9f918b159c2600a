"""Data sources: each module here that registers one is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from fedmerge.data.sources._catalogue import Listing, available, get
from fedmerge.data.sources._registry import SOURCES, Facts, Source, source

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SOURCES", "Facts", "Listing", "Source", "available", "get", "source"]
