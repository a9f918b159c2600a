"""Sums over clients and over parameters, in float64 and in blocks of rows and columns.

Clients come in client-id order (see `fedmerge.core.protocol.deliver`), so a sum does not depend on who answered
first. A block is made float64 in one small room that stays in the processor's cache, and is used for all that is
wanted of it before the next: however many clients there are, there is no float64 copy of their replies. A column's sum
never depends on the block of columns it is in, and up to `ROWS` clients make one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 1 << 13
"""Columns of a block, at most."""
ROWS = 64
"""Rows of a block, at most."""
_ROOM = 1 << 19
"""Numbers of a block, at most: 4 MiB."""


def blocks(length: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cover 0..length.

    >>> list(blocks(5, 3))
    [slice(0, 3, None), slice(3, 5, None)]
    """
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _columns(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Blocks of columns such that one with as many of the rows as are taken at a time fits into the room."""
    return blocks(num_columns, min(BLOCK, _ROOM // max(1, min(num_rows, ROWS))))


class _Room:
    """Where one block at a time is float64."""

    def __init__(self, device: torch.device) -> None:
        self._numbers = torch.empty(_ROOM, dtype=torch.float64, device=device)

    def wide(self, block: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
        """The block in float64; good until the next is asked for."""
        if block.dtype == torch.float64:
            return block
        return self._numbers[: block.numel()].view(block.shape).copy_(block)

    def squared_norms(self, wide: Float[Tensor, "r c"]) -> Float[Tensor, " r"]:
        """‖row‖² of the block that `wide` gave, which is good no longer."""
        lent = wide.data_ptr() == self._numbers.data_ptr()
        return (wide.mul_(wide) if lent else wide.square()).sum(dim=1)


def _even(rows: Float[Tensor, "d n"]) -> Float[Tensor, "D n"]:
    """One or two rows of zeros more where that makes a multiple of 8: a product with 8 rows is faster than with 6."""
    missing = -len(rows) % 8
    return pad(rows, (0, 0, 0, missing)) if missing in (1, 2) else rows


def column_sums(
    vectors: Float[Tensor, "C P"], *weights: Float[Tensor, "C _"]
) -> Iterator[tuple[slice, Float[Tensor, "d b"]]]:
    """Σ_i weights_ij · vectors_i in float64, a block of columns after another.

    Args:
        vectors: To be summed.
        weights: Several sets of them, as if side by side.
    """
    d, room = sum(each.shape[1] for each in weights), _Room(vectors.device)
    for columns in _columns(*vectors.shape):
        total = _even(torch.zeros(d, columns.stop - columns.start, dtype=torch.float64, device=vectors.device))
        for some in blocks(len(vectors), ROWS):
            across = _even(torch.cat([each[some].double() for each in weights], dim=1).T)
            total.addmm_(across, room.wide(vectors[some, columns]))
        yield columns, total[:d]


def weighted_sum(weights: Float[Tensor, "C d"], vectors: Float[Tensor, "C P"]) -> Float[Tensor, "d P"]:
    """Σ_i weights_ij · vectors_i in float64.

    >>> weighted_sum(torch.tensor([[0.5], [0.5]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])).tolist()
    [[2.0, 2.0]]
    """
    total = torch.empty(weights.shape[1], vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for columns, part in column_sums(vectors, weights):
        total[:, columns] = part
    return total


def inner_products(left: Float[Tensor, "n P"], right: Float[Tensor, "m P"]) -> Float[Tensor, "n m"]:
    """All ⟨left_i, right_j⟩ in float64."""
    total = torch.zeros(len(right), len(left), dtype=torch.float64, device=left.device)
    room = _Room(left.device)
    for columns in _columns(*left.shape):
        wide = right[:, columns].double()
        for some in blocks(len(left), ROWS):
            total[:, some].addmm_(wide, room.wide(left[some, columns]).T)
    return total.T


def centred(models: Float[Tensor, "d P"]) -> Float[Tensor, "d P"]:
    """Models minus their mean, in float64.

    Differences of models that are close vanish in float32; every inner product ⟨Θ_j − θ_i, g⟩ with
    θ_i = Σ_j A_ij Θ_j and rows of A summing to 1 is the same for centred models. Differences to the first model come
    before the mean, so that identical models give exactly 0 and not rounding noise, which a rule would follow.
    """
    wide = models.double()
    apart = wide - wide[:1]
    return apart - apart.mean(dim=0, keepdim=True)


def centred_products(models: Float[Tensor, "d P"]) -> Float[Tensor, "d d"]:
    """All ⟨Θ_j − Θ̄, Θ_k − Θ̄⟩ in float64."""
    total = torch.zeros(len(models), len(models), dtype=torch.float64, device=models.device)
    for columns in _columns(*models.shape):
        apart = centred(models[:, columns])
        total.addmm_(apart, apart.T)
    return total


class Compared(NamedTuple):
    """What one pass over the replies tells about them and the models.

    Attributes:
        products: [C, d] ⟨g_i, Θ_j − Θ̄⟩.
        squares: [C] ‖g_i‖².
        spread: [d] ‖Θ_j − Θ̄‖².
    """

    products: Float[Tensor, "C d"]
    squares: Float[Tensor, " C"]
    spread: Float[Tensor, " d"]

    def rows(self, some: slice) -> Compared:
        """The same of some of the replies."""
        return Compared(self.products[some], self.squares[some], self.spread)

    def along(self, weights: Float[Tensor, "C d"]) -> Float[Tensor, "C d"]:
        """q_ij = ⟨Θ_j − θ_i, g_i⟩ with θ_i = Σ_j A_ij Θ_j.

        Negative where the client's update points towards model j: a step of the logits against q mixes more of it in.
        """
        return self.products - (weights * self.products).sum(dim=1, keepdim=True)

    def reach(self) -> Float[Tensor, " C"]:
        """‖g_i‖ · max_j ‖Θ_j − Θ̄‖, what q_ij could be at most."""
        return self.squares.sqrt() * self.spread.max().sqrt()


def compared(models: Float[Tensor, "d P"], updates: Float[Tensor, "C P"]) -> Compared:
    """Replies against centred models, in float64."""
    d, C = len(models), len(updates)
    products, room = _even(torch.zeros(d, C, dtype=torch.float64, device=updates.device)), _Room(updates.device)
    squares, spread = products.new_zeros(C), products.new_zeros(d)
    for columns in _columns(*updates.shape):
        apart = centred(models[:, columns])
        spread += apart.square().sum(dim=1)
        apart = _even(apart)
        for some in blocks(C, ROWS):
            wide = room.wide(updates[some, columns])
            products[:, some].addmm_(apart, wide.T)
            squares[some] += room.squared_norms(wide)
    return Compared(products[:d].T, squares, spread)


def along(
    models: Float[Tensor, "d P"], updates: Float[Tensor, "C P"], weights: Float[Tensor, "C d"]
) -> Float[Tensor, "C d"]:
    """`Compared.along` of replies and models of which nothing else is asked."""
    return compared(models, updates).along(weights)


def squared_norms(vectors: Float[Tensor, "n P"]) -> Float[Tensor, " n"]:
    """‖v_i‖² in float64."""
    total = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    room = _Room(vectors.device)
    for columns in _columns(*vectors.shape):
        for some in blocks(len(vectors), ROWS):
            total[some] += room.squared_norms(room.wide(vectors[some, columns]))
    return total


def shares_of_examples(num_examples: Int[Tensor, " C"]) -> Float[Tensor, "C 1"]:
    """FedAvg's weights n_i / Σ n, as one column."""
    wide = num_examples.double()
    return (wide / wide.sum())[:, None]
