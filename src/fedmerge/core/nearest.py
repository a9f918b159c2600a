"""Which of the known names somebody meant: a slip of one letter first, then what looks most alike."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_COMPARED = 1000
"""Names, and letters of a name, beyond which nothing is suggested: comparing takes time."""
_LEAST_LIKENESS = 0.6


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`; None if none is.

    Names that differ in one letter too many, too few or another, or in two neighbours that changed places, come
    before all others; capitals do not count, nor which of ``-`` and ``_`` stands between words.

    >>> nearest("rl", ["lr", "epochs", "rule"]), nearest("models", ["num_models", "gate"]), nearest("x", ["lr"])
    ('lr', 'num_models', None)
    """
    names = list(known)[:MOST_COMPARED]
    if not 0 < len(name) <= MOST_COMPARED:
        return None
    given = _plain(name)
    slips = [each for each in names if _is_one_slip(given, _plain(each))]
    if slips:
        return min(slips, key=lambda each: (_effort(given, _plain(each)), -_likeness(given, each), each))
    found = difflib.get_close_matches(name, names, n=1, cutoff=_LEAST_LIKENESS)
    return found[0] if found else None


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")


def _likeness(given: str, name: str) -> float:
    return difflib.SequenceMatcher(None, given, name).ratio()


def _effort(a: str, b: str) -> int:
    """0: the same. 1: the same letters in another order. 2: any other slip."""
    return 0 if a == b else 1 if len(a) == len(b) and sorted(a) == sorted(b) else 2


def _is_one_slip(a: str, b: str) -> bool:
    """Whether at most one insertion, deletion, substitution or exchange of neighbours makes one of the other."""
    if abs(len(a) - len(b)) > 1:
        return False
    if len(a) == len(b) == 1:
        return a == b  # one letter for another says nothing
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    rest, other = a[start:], b[start:]
    if len(a) != len(b):
        return rest[1:] == other or rest == other[1:]
    return rest[1:] == other[1:] or (rest[:2] == other[1::-1] and rest[2:] == other[2:])
