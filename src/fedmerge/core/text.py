"""Foreign texts in messages, logs and tables: short, on one line, and without anything that a terminal would obey."""

from __future__ import annotations

import unicodedata

MOST_LETTERS = 200
"""Of a foreign value in a message."""


def printable(text: str, *, keep: str = "") -> str:
    r"""A text with every character that cannot be seen written as its escape.

    Control characters, line breaks, the sequences that move a terminal's cursor, marks that turn the direction of
    writing around and halves of surrogate pairs are all among them; letters of any script, signs made of several
    and spaces that do not break are not.

    Args:
        text: From a file, a name or the wire.
        keep: Characters that stay as they are.

    >>> printable("caf\u00e9 \x1b[2J\n")
    'caf\xe9 \\x1b[2J\\n'
    """
    if text.isprintable():
        return text
    return "".join(letter if letter in keep or is_visible(letter) else _escaped(letter) for letter in text)


def is_visible(letter: str) -> bool:
    r"""Whether a letter can do no more than be seen.

    >>> [is_visible(letter) for letter in ("a", "\u00a0", "\u200d", "\u202e", "\x1b")]
    [True, True, True, False, False]
    """
    return letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs"


_JOINERS = "\u200c\u200d"  # within words of some scripts, and within signs made of several


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def brief(value: object, most: int = MOST_LETTERS) -> str:
    """A foreign value as Python would write it, cut where it is long.

    >>> brief("fedmerge"), brief(list(range(1000)), 20)
    ("'fedmerge'", '[0, 1, 2, 3, 4, 5...')
    """
    try:
        text = repr(value[: most + 1] if isinstance(value, (str, bytes)) else value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, a table of a thousand tables
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= most else text[: most - 3] + "..."


def shortened(text: str, most: int = MOST_LETTERS) -> str:
    """A foreign name or another program's complaint on one line, cut where it is long."""
    return printable(text if len(text) <= most else text[: most - 3] + "...")
