"""Several tasks on English texts as one pool: clients that want different things of one language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.options import check_options, option
from fedmerge.data.fetch import Package, Progress, quiet
from fedmerge.data.pool import Ints, Pool
from fedmerge.data.sources._registry import Facts, load_packaged, pool_name, source
from fedmerge.data.sources.bbc_news import BbcNews
from fedmerge.data.sources.brown import Brown
from fedmerge.data.sources.movie_reviews import MovieReviews
from fedmerge.data.sources.spam_assassin import SpamAssassin
from fedmerge.data.sources.supersenses import Supersenses

_SOURCES: dict[str, type[MovieReviews | BbcNews | SpamAssassin | Supersenses | Brown]] = {
    "sentiment": MovieReviews,
    "topic": BbcNews,
    "spam": SpamAssassin,
    "supersense": Supersenses,
    "genre": Brown,
}


@source("text-tasks", citation="the sources movie-reviews, bbc-news, spam-assassin, supersenses and brown")
@dataclass(frozen=True)
class TextTasks:
    """Five tasks on English texts: sentiment, topic, spam, supersense and genre; the task is the domain.

    A class is named after its task ("topic: business"). Of a task that has more texts than are wanted, the largest
    classes are thinned out first and evenly, so that small ones are whole.
    """

    facts: ClassVar[Facts] = Facts(
        description="26,192 texts of 5 tasks with 50 classes: sentiment, topic, spam, supersense, genre",
        licence="that of the source of each task",
        packages=tuple(package for source in _SOURCES.values() for package in source.facts.packages),
    )
    version: ClassVar[int] = sum(source.version for source in _SOURCES.values())

    tasks: tuple[str, ...] = option(
        ("sentiment", "topic", "spam", "supersense", "genre"), help="of these five, in the order of the classes"
    )
    max_chars: int = option(400, at_least=20, at_most=4000, help="longer texts are cut after a word")
    most: int = option(6000, at_least=100, help="texts per task; there may be fewer")

    def __post_init__(self) -> None:
        check_options(self)
        faults = [unknown_name("task", name, _SOURCES) for name in self.tasks if name not in _SOURCES]
        if len(set(self.tasks)) < len(self.tasks) or not self.tasks:
            faults.append(f"got tasks {list(self.tasks)}; expected one or more, each once")
        if faults:
            raise UsageError("\n".join(f"TextTasks.tasks: {fault}" for fault in faults))

    @property
    def packages(self) -> tuple[Package, ...]:
        """The archives of the chosen tasks, in their order."""
        return tuple(package for task in self.tasks for package in _SOURCES[task].facts.packages)

    def load(self, progress: Progress = quiet) -> Pool:
        """The items, task by task; what the chosen tasks need is fetched if not in the cache."""
        return load_packaged(self, progress, self.packages)

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the archives of the chosen tasks, in their order."""
        pools = []
        for task, archive in zip(self.tasks, archives, strict=True):
            pool = _SOURCES[task](max_chars=self.max_chars).parse((archive,), progress)
            pools.append(chosen(pool, thinned(pool.targets, self.most)))
        return side_by_side(pool_name(self), self.tasks, pools)


def thinned(targets: Ints, most: int) -> Ints:
    """Rows, ascending, of at most `most` items: all classes have equally many, or all they have if that is fewer.

    A class that has more gives rows at even distances.

    >>> thinned(np.array([0, 0, 0, 0, 1, 0, 1, 2]), 5).tolist()
    [0, 2, 4, 6, 7]
    """
    counts = np.bincount(targets)
    shares = np.arange(counts.max() + 1)
    totals = np.minimum(counts[:, None], shares).sum(axis=0)
    share = shares[totals <= most][-1]  # the largest with which the classes do not exceed `most`
    kept = []
    for k, count in enumerate(counts):
        own = min(share, count)
        kept.append(np.flatnonzero(targets == k)[np.arange(own) * count // max(own, 1)])
    return np.sort(np.concatenate(kept))


def chosen(pool: Pool, rows: Ints) -> Pool:
    """Some texts of a pool with their classes and items."""
    return Pool(
        name=pool.name,
        inputs=pool.inputs[rows],
        targets=pool.targets[rows],
        class_names=pool.class_names,
        item=None if pool.item is None else pool.item[rows],
    )


def side_by_side(name: str, tasks: Sequence[str], pools: Sequence[Pool]) -> Pool:
    """Pools of texts as one: classes and items of different tasks stay apart, and the task is the domain."""
    items = [np.arange(len(pool)) if pool.item is None else pool.item for pool in pools]
    first_item = np.cumsum([0, *(own.max() + 1 for own in items[:-1])])
    first_class = np.cumsum([0, *(len(pool.class_names) for pool in pools[:-1])])
    return Pool(
        name=name,
        inputs=np.concatenate([pool.inputs for pool in pools]),
        targets=np.concatenate([pool.targets + first for pool, first in zip(pools, first_class, strict=True)]),
        class_names=tuple(f"{task}: {k}" for task, pool in zip(tasks, pools, strict=True) for k in pool.class_names),
        domain=np.repeat(np.arange(len(pools)), [len(pool) for pool in pools]),
        item=np.concatenate([own + first for own, first in zip(items, first_item, strict=True)]),
        domain_names=tuple(tasks),
        class_tasks=tuple(task for task, pool in zip(tasks, pools, strict=True) for _ in pool.class_names),
    )
