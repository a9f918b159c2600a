"""Which clients are known to belong together: those of one task where there are several, else those of a true group."""

from __future__ import annotations

from typing import NamedTuple

from fedmerge.experiment.record import RunRecord


class Kinds(NamedTuple):
    """The parts that clients are known to fall into.

    Attributes:
        title: ``Task`` or ``True group``.
        short: Of each part, as it stands under the title: ``spam``, ``3``.
        names: Of each part, as it stands alone: ``spam``, ``group 3``.
        of: [N] the part of each client, an index.
        are_tasks: Whether they are tasks.
    """

    title: str
    short: tuple[str, ...]
    names: tuple[str, ...]
    of: tuple[int, ...]
    are_tasks: bool


def known_tasks(run: RunRecord) -> tuple[str, ...] | None:
    """[N] task of each client; None unless there are two or more."""
    return run.tasks if run.tasks is not None and len(set(run.tasks)) > 1 else None


def other_groups(run: RunRecord) -> tuple[int, ...] | None:
    """[N] true groups where they say something else than the tasks do; None if they are the same under other names."""
    tasks = known_tasks(run)
    if run.groups is None or tasks is None:
        return run.groups
    pairs = set(zip(run.groups, tasks, strict=True))
    return None if len(pairs) == len(set(run.groups)) == len(set(tasks)) else run.groups


def kinds_of(run: RunRecord) -> Kinds | None:
    """The tasks in the order of their first clients, else the true groups by number; None if neither is known."""
    tasks = known_tasks(run)
    if tasks is not None:
        names = tuple(dict.fromkeys(tasks))
        return Kinds("Task", names, names, tuple(names.index(task) for task in tasks), are_tasks=True)
    if run.groups is None:
        return None
    groups = sorted(set(run.groups))
    short = tuple(map(str, groups))
    of = tuple(groups.index(group) for group in run.groups)
    return Kinds("True group", short, tuple(f"group {name}" for name in short), of, are_tasks=False)
