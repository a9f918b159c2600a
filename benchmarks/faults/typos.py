"""Every slip of one letter in every name that a user may write, and the name that is suggested for it."""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass

from fedmerge.algorithms import ALGORITHMS
from fedmerge.cli.arguments import _COMMANDS
from fedmerge.core.nearest import nearest
from fedmerge.core.options import option_fields
from fedmerge.data import PARTITIONS, SOURCES
from fedmerge.experiment.config import OPTION_TABLES, RunOptions
from fedmerge.models import NETWORKS

LETTERS = string.ascii_lowercase + string.digits + "-_"


@dataclass(frozen=True)
class Answers:
    """What was suggested.

    Attributes:
        names: How many names are known.
        slips: How many slips there are that are not themselves names.
        right: Of them, how many were answered with the name that was meant.
        other: With another name.
        none: With none.
    """

    names: int
    slips: int
    right: int
    other: int
    none: int


def slips_of(name: str) -> set[str]:
    """All words that one insertion, deletion, substitution or exchange of neighbours makes of a name."""
    cuts = [(name[:at], name[at:]) for at in range(len(name) + 1)]
    found = {a + letter + b for a, b in cuts for letter in LETTERS}
    found |= {a + b[1:] for a, b in cuts if b}
    found |= {a + letter + b[1:] for a, b in cuts if b for letter in LETTERS}
    found |= {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    return found - {name, ""}


def answers(known: Iterable[str]) -> Answers:
    """Tries all slips of all names."""
    names = sorted(known)
    meant = [(name, slip) for name in names for slip in slips_of(name) if slip not in names]
    given = [nearest(slip, names) for _, slip in meant]
    right = sum(name == found for (name, _), found in zip(meant, given, strict=True))
    none = given.count(None)
    return Answers(len(names), len(meant), right, len(meant) - right - none, none)


def kinds_of_names() -> dict[str, Iterable[str]]:
    """The names that stand beside each other."""
    return {
        "commands": _COMMANDS,
        "methods": ALGORITHMS,
        "sources": [*SOURCES, "folder"],
        "partitions": PARTITIONS,
        "networks": NETWORKS,
        "run options": [*option_fields(RunOptions), "source", "partition", "model", "method", "training", "label"],
        **{f"{table} options": option_fields(cls) for table, cls in OPTION_TABLES.items()},
    }


def answered() -> dict[str, Answers]:
    """By kind of name."""
    found = {kind: answers(names) for kind, names in kinds_of_names().items()}
    each = [
        answers(option_fields(registry[name].cls))
        for registry in (ALGORITHMS, SOURCES, PARTITIONS, NETWORKS)
        for name in registry
        if option_fields(registry[name].cls)
    ]
    found["options of methods, sources, partitions, networks"] = _sum(each)
    return {**found, "all": _sum(found.values())}


def _sum(parts: Iterable[Answers]) -> Answers:
    columns = zip(*((p.names, p.slips, p.right, p.other, p.none) for p in parts), strict=True)
    return Answers(*(sum(column) for column in columns))
