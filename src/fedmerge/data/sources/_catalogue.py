"""What there is, what it costs to get, and getting it: for the command line and for a first look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmerge.core.errors import UsageError
from fedmerge.data.fetch import Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import SOURCES


@dataclass(frozen=True)
class Listing:
    """One line of the list of sources.

    Attributes:
        name: As it is asked for.
        description: What the items are.
        licence: Of the data.
        megabytes: To be downloaded, all archives together, in 10^6 bytes; 0 for what needs none or finds its own.
        extra: fedmerge's optional extra that it needs, or None.
        extra_installed: Whether that is there (true if none is needed).
        fetched: Whether all of its archives are in the cache (true if it has none).
    """

    name: str
    description: str
    licence: str
    megabytes: float
    extra: str | None
    extra_installed: bool
    fetched: bool


def available(name: str) -> Listing:
    """What is known of one source without loading it.

    Raises:
        UsageError: if there is no such source.
    """
    facts = SOURCES[name].cls.facts
    return Listing(
        name=name,
        description=facts.description,
        licence=facts.licence,
        megabytes=facts.megabytes,
        extra=facts.extra,
        extra_installed=not facts.missing_modules(),
        fetched=all(package.path().exists() for package in facts.packages),
    )


def get(name: str, options: Mapping[str, Any] | None = None, *, progress: Progress = quiet) -> Pool:
    """Loads a source by name; what is not in the cache is fetched and built.

    Args:
        name: A registered source.
        options: Its options, for example ``{"size": 14}``.
        progress: Told what is going on.

    Raises:
        UsageError: if there is no such source or option.
        FedmergeError: if it cannot be fetched or read.

    >>> len(get("digits"))
    1797
    """
    SOURCES[name]
    faults: list[str] = []
    source = SOURCES.build({**(options or {}), "name": name}, "source", faults)
    if source is None:
        raise UsageError("\n".join(faults))
    return source.load(progress)
