"""A client's own rows on three sides: those that it brought, the others cut from its train rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError
from fedmerge.core.randomness import generator
from fedmerge.data.partition import SPLITS, Split
from fedmerge.data.pool import Ints
from fedmerge.data.sides import item_sides

log = logging.getLogger(__name__)

Rows = dict[Split, tuple[NDArray[Any], Ints]]
"""Inputs [n, ...] and targets of each split."""


def cut_splits(name: str, own: Rows, shares: tuple[float, float, float], seed: int) -> Rows:
    """A client's rows on all three sides; those that it did not bring are cut from its train rows.

    The cut depends on the seed, the client's name and its rows alone; identical rows land on one side.

    Args:
        name: The client's.
        own: What it brought, train rows at least.
        shares: Of train, validation and test, see `side_shares`.
        seed: Decides the cut.

    Raises:
        DataError: if there are too few rows to give each side one.
    """
    wanted = [0.0 if split in own else share for split, share in zip(SPLITS, shares, strict=True)]
    wanted[0] = 1 - sum(wanted)
    inputs, targets = own["train"]
    items = _identity(inputs)
    sides = item_sides(items, np.zeros_like(items), wanted, generator(seed, f"own split of {name}"))
    cut: Rows = {split: (inputs[sides == side], targets[sides == side]) for side, split in enumerate(SPLITS)}
    short = [split for split, share in zip(SPLITS, wanted, strict=True) if share and not len(cut[split][0])]
    if short:
        raise DataError(
            f"client {name!r} has {len(items)} rows, {len(np.unique(items))} of them different: too few to give one to "
            f"{' and '.join(short)}. Give it more, leave it out, or set that share to 0"
        )
    cut.update({split: rows for split, rows in own.items() if split != "train"})
    _warn_of_copies(name, cut)
    return cut


def _identity(inputs: NDArray[Any]) -> Ints:
    """[n] the same number for identical rows."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(row, len(seen)) for row in _row_bytes(inputs)], dtype=np.int64)


def _row_bytes(inputs: NDArray[Any]) -> Iterator[bytes]:
    return (row.tobytes() for row in inputs + 0)  # -0 and 0 are one value: -0 + 0 is 0


def _warn_of_copies(name: str, rows: Rows) -> None:
    """Logs how many validation and test rows a client also trains on; only splits that it brought can have them."""
    trained = set(_row_bytes(rows["train"][0]))
    for split in SPLITS[1:]:
        copies = sum(row in trained for row in _row_bytes(rows[split][0]))
        if copies:
            log.warning("client %r: %d of its %s rows are among its train rows", name, copies, split)
