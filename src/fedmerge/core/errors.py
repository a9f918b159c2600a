"""Errors a user can mend. The command line prints them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedmergeError(Exception):
    """What is wrong, what was given, what is accepted, and what to do. Exit code 1."""


class UsageError(FedmergeError):
    """The request itself is wrong (an option, a name, a path). Exit code 2."""


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


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """One message for every unknown name: the nearest known one first, then all of them.

    >>> unknown_name("method", "fedmrge", ["fedavg", "fedmerge"])
    "unknown method 'fedmrge'; did you mean 'fedmerge'? Known: fedavg, fedmerge"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(names)}"
