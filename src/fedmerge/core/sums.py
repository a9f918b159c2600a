"""Sums over clients and over parameters, in float64 and in blocks of rows and columns.

Clients come in client-id order (see `fedmerge.core.protocol.deliver`), so a sum does not depend on who answered
first. Blocks keep the float64 copies small, however many clients there are; a column's sum never depends on the block
of columns it is in, and up to `ROWS` clients make one block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 1 << 13
ROWS = 256


def _blocks(length: int, size: int = BLOCK) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def weighted_sum(weights: Float[Tensor, "C d"], vectors: Float[Tensor, "C P"]) -> Float[Tensor, "d P"]:
    """Σ_i weights_ij · vectors_i in float64.

    >>> weighted_sum(torch.tensor([[0.5], [0.5]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])).tolist()
    [[2.0, 2.0]]
    """
    rows = weights.double().T
    total = torch.empty(weights.shape[1], vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for block in _blocks(vectors.shape[1]):
        total[:, block] = rows[:, :ROWS] @ vectors[:ROWS, block].double()
        for later in _blocks(len(vectors), ROWS):
            if later.start:
                total[:, block] += rows[:, later] @ vectors[later, block].double()
    return total


def inner_products(left: Float[Tensor, "n P"], right: Float[Tensor, "m P"]) -> Float[Tensor, "n m"]:
    """All ⟨left_i, right_j⟩ in float64."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for block in _blocks(left.shape[1]):
        wide = right[:, block].double().T
        for some in _blocks(len(left), ROWS):
            total[some] += left[some, block].double() @ wide
    return total


def centred(models: Float[Tensor, "d P"]) -> Float[Tensor, "d P"]:
    """Models minus their mean, in float64.

    Differences of models that are close vanish in float32; every inner product ⟨Θ_j − θ_i, g⟩ with
    θ_i = Σ_j A_ij Θ_j and rows of A summing to 1 is the same for centred models. Differences to the first model come
    before the mean, so that identical models give exactly 0 and not rounding noise, which a rule would follow.
    """
    wide = models.double()
    apart = wide - wide[:1]
    return apart - apart.mean(dim=0, keepdim=True)


def along(
    models: Float[Tensor, "d P"], updates: Float[Tensor, "C P"], weights: Float[Tensor, "C d"]
) -> Float[Tensor, "C d"]:
    """q_ij = ⟨Θ_j − θ_i, g_i⟩ with θ_i = Σ_j A_ij Θ_j, in float64 on centred models.

    Negative where the client's update points towards model j: a step of the logits against q mixes more of it in.
    """
    products = inner_products(updates, centred(models))
    return products - (weights * products).sum(dim=1, keepdim=True)


def squared_norms(vectors: Float[Tensor, "n P"]) -> Float[Tensor, " n"]:
    """‖v_i‖² in float64."""
    total = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    for block in _blocks(vectors.shape[1]):
        for some in _blocks(len(vectors), ROWS):
            total[some] += vectors[some, block].double().square().sum(dim=1)
    return total


def shares_of_examples(num_examples: Int[Tensor, " C"]) -> Float[Tensor, "C 1"]:
    """FedAvg's weights n_i / Σ n, as one column."""
    wide = num_examples.double()
    return (wide / wide.sum())[:, None]
