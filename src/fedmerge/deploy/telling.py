"""What a site lets the server know where it cannot answer: nothing of its data, its files or its folders.

The text of an error may hold a cell of a table, a path, or whatever a function of the site's own put there. It goes to
the site's own log. The server gets a fixed sentence, which says where to look.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.core.text import brief, printable
from fedmerge.deploy.private_state import BusyError
from fedmerge.experiment.store import versions

_LOOK = "the site's own log says more"
_SENTENCES: tuple[tuple[type[BaseException], str], ...] = (
    (BusyError, "another process of the site is at work; it answers when it is asked later"),
    (DataError, f"the site's data cannot be used as they are; {_LOOK}"),
    (UsageError, f"something in the site's folder or settings cannot be used as it is; {_LOOK}"),
    (FedmergeError, f"the site cannot do what it was asked for; {_LOOK}"),
    (MemoryError, f"the site has not enough memory; {_LOOK}"),
)


class TellableError(UsageError):
    """What may be told to the server word by word: it is about what the server itself sent."""


@contextmanager
def tellable(folder: Path | None = None) -> Iterator[None]:
    """Within the block errors are about what the server sent.

    Args:
        folder: Of the site; not told.

    Raises:
        TellableError: instead of a FedmergeError.
    """
    try:
        yield
    except FedmergeError as error:
        text = str(error)
        raise TellableError(text if folder is None else text.replace(f"{folder}{os.sep}", "")) from error


def told_to_server(error: Exception) -> str:
    """What the server is told of an error.

    >>> told_to_server(DataError("/data/patients.csv, line 17: got 'John Smith'"))
    "the site's data cannot be used as they are; the site's own log says more"
    >>> told_to_server(KeyError("John Smith"))
    "the site's program failed unexpectedly (KeyError); the site's own log says more"
    """
    if isinstance(error, TellableError):
        return str(error)
    for kind, sentence in _SENTENCES:
        if isinstance(error, kind):
            return sentence
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    if isinstance(error, OSError):
        why = name if error.errno is None else os.strerror(error.errno)
        return f"the site cannot read or write something ({why}); {_LOOK}"
    return f"the site's program failed unexpectedly ({name}); {_LOOK}"


def note_of(note: str, told: Mapping[str, Any]) -> str:
    """What the server shows of an answer beside its numbers: the site's note, or else that its programs are others.

    Args:
        note: That came with the answer.
        told: The site's versions, as `told_versions` gives them; may be anything.
    """
    own = told_versions()
    others = {
        name: told[name] for name in ("fedmerge", "torch") if name in told and _base(told[name]) != _base(own[name])
    }
    if note or not others:
        return note
    listed = ", ".join(f"{name} {printable(brief(found))} instead of {own[name]}" for name, found in others.items())
    return f"it has {listed}; results need not have the bits of a simulation, and messages may not be understood"


def _base(version: Any) -> str:
    """A version without what it was built for: on a processor 2.8.0+cu128 does what 2.8.0+cpu does."""
    return str(version).partition("+")[0]


def told_versions() -> dict[str, Any]:
    """Versions that the server may compare with its own; nothing of the machine."""
    found = versions()
    return {name: found[name] for name in ("fedmerge", "python", "torch")}
