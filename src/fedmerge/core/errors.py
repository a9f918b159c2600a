"""Errors a user can mend. The command line prints them without a traceback."""

from __future__ import annotations

from collections.abc import Iterable

from fedmerge.core.nearest import nearest
from fedmerge.core.text import brief, printable, shortened

MOST_NAMED = 200
"""Known names that a message lists."""
MOST_FAULTS = 25
"""Faults that a message lists."""


class FedmergeError(Exception):
    """What is wrong, what was given, what is accepted, and what to do. Exit code 1.

    Its text shows control characters of foreign names as escapes: no message can move a terminal's cursor.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n")


class UsageError(FedmergeError):
    """The request itself is wrong (an option, a name, a path). Exit code 2."""


class DivergedError(FedmergeError):
    """Clients' training has left the finite numbers: the same again ends alike."""


class DataError(FedmergeError):
    """The data cannot be used as asked."""


class RowError(DataError):
    """One row of many cannot be used.

    Attributes:
        row: Its place, from 0; whoever knows where the rows came from says so in a message of their own.
    """

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def together(faults: Iterable[str]) -> str:
    r"""All faults of one thing as one message, a line for each; what is beyond `MOST_FAULTS` is counted.

    >>> together(["a: missing", "b: missing"])
    'a: missing\nb: missing'
    """
    lines = list(faults)
    more = [f"and {len(lines) - MOST_FAULTS} more like these"] if len(lines) > MOST_FAULTS else []
    return "\n".join([*lines[:MOST_FAULTS], *more])


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """One message for every unknown name: the nearest known one first, then all of them.

    >>> unknown_name("method", "fedmrge", ["fedavg", "fedmerge"])
    "unknown method 'fedmrge'; did you mean 'fedmerge'? Known: fedavg, fedmerge"
    """
    names = sorted(known)
    near = nearest(str(name), names)
    hint = f"; did you mean {brief(near)}?" if near else "."
    listed = ", ".join(shortened(each, 80) for each in names[:MOST_NAMED])
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"unknown {what} {brief(name)}{hint} Known: {listed}{more}"
