"""Parts of a flat vector by their ranges of entries."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]
"""Disjoint (start, stop), ascending."""


def joined(spans: Iterable[tuple[int, int]]) -> Ranges:
    """Ascending spans with those that touch made one.

    >>> joined([(0, 2), (2, 5), (7, 9)])
    ((0, 5), (7, 9))
    """
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        touches = bool(found) and found[-1][1] == start
        found.append((found.pop()[0] if touches else start, stop))
    return tuple(found)


def rest(ranges: Ranges, length: int) -> Ranges:
    """What `ranges` leave of 0..length.

    >>> rest(((0, 2), (5, 6)), 8)
    ((2, 5), (6, 8))
    """
    edges = [0, *(edge for span in ranges for edge in span), length]
    return tuple((start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop)


def gathered(vector: Float[Tensor, "*axes P"], ranges: Ranges) -> Float[Tensor, "*axes S"]:
    """The entries in `ranges`, one after another."""
    return torch.cat([vector[..., :0], *(vector[..., start:stop] for start, stop in ranges)], dim=-1)


def placed(vector: Float[Tensor, " P"], part: Float[Tensor, " S"], ranges: Ranges) -> Float[Tensor, " P"]:
    """`vector` with the entries in `ranges` replaced by `part`: the inverse of `gathered`."""
    return woven(part, gathered(vector, rest(ranges, len(vector))), ranges)


def woven(part: Float[Tensor, " S"], others: Float[Tensor, " R"], ranges: Ranges) -> Float[Tensor, " P"]:
    """`part` in `ranges` and `others` everywhere else: the inverse of `gathered` on `ranges` and on their `rest`.

    >>> woven(torch.tensor([1.0, 2.0]), torch.tensor([7.0, 8.0, 9.0]), ((1, 3),)).tolist()
    [7.0, 1.0, 2.0, 8.0, 9.0]
    """
    pieces, used, done = [], 0, 0
    for start, stop in ranges:
        pieces += [others[done : start - used], part[used : used + stop - start]]
        done, used = start - used, used + stop - start
    return torch.cat([*pieces, others[done:]])


def mask(ranges: Ranges, like: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 in `ranges`, 0 elsewhere."""
    ones = torch.zeros(len(like), dtype=like.dtype, device=like.device)
    for start, stop in ranges:
        ones[start:stop] = 1
    return ones
