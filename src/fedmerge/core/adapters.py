"""LoRA adapters in a flat vector: pairs of factors whose product is what counts.

A layer's weight is W + s·B A with A [r, in] and B [out, r] (Hu et al., arXiv:2106.09685). Averaging A and B apart is
not averaging B A. Everything here works on the factors: no product [out, in] is ever formed. s is the same for all
adapters of a layer and does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.core.vector import Layout, Slot

_RANK_FLOOR = 1e-7
"""Singular values below this share of the largest are rounding noise."""
_WORST_GAUGE = 1e3
"""How much smaller than the adapters' A the averaged A may be along a row of the product, to be expressed near it."""


@dataclass(frozen=True)
class Pair:
    """Where the two factors of one layer lie in the vector.

    Attributes:
        layer: Name of the layer.
        a: Range of A.
        b: Range of B.
        rank: r.
        fan_in: Columns of A.
        fan_out: Rows of B.
    """

    layer: str
    a: tuple[int, int]
    b: tuple[int, int]
    rank: int
    fan_in: int
    fan_out: int

    def left(self, vectors: Float[Tensor, "n P"]) -> Float[Tensor, "n o r"]:
        """B of each vector, in float64."""
        return vectors[:, slice(*self.b)].double().reshape(-1, self.fan_out, self.rank)

    def right(self, vectors: Float[Tensor, "n P"]) -> Float[Tensor, "n r i"]:
        """A of each vector, in float64."""
        return vectors[:, slice(*self.a)].double().reshape(-1, self.rank, self.fan_in)


def pairs_of(layout: Layout) -> tuple[Pair, ...]:
    """The pairs of factors in a vector, by PEFT's names; a layer whose A is frozen has none: it is linear in B."""
    found = []
    slots = {slot.name: slot for slot in layout.slots}
    for name, slot in slots.items():
        other = slots.get(name.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in name and other is not None and _fit(slot, other):
            (rank, fan_in), (fan_out, _) = slot.shape, other.shape
            layer = name.partition(".lora_A.")[0]
            found.append(Pair(layer, (slot.start, slot.stop), (other.start, other.stop), rank, fan_in, fan_out))
    return tuple(found)


def _fit(a: Slot, b: Slot) -> bool:
    return len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]


def averaging_error(
    pairs: tuple[Pair, ...], vectors: Float[Tensor, "n P"], weights: Float[Tensor, "k n"]
) -> Float[Tensor, " k"]:
    """How far averaging the factors is from averaging the products, all layers together.

    ‖(Σ w B)(Σ w A) − Σ w B A‖ / ‖Σ w B A‖ in the Frobenius norm; 0 where the products average to nothing.

    Args:
        pairs: Of the vectors.
        vectors: The adapters.
        weights: Of each average; rows sum to 1.
    """
    off, size = (torch.zeros(len(weights), dtype=torch.float64, device=vectors.device) for _ in range(2))
    for pair in pairs:
        left, right = pair.left(vectors), pair.right(vectors)
        for k, row in enumerate(weights.double()):
            b, a = _side_by_side(row, left), right.flatten(0, 1)
            mean_b, mean_a = torch.einsum("n,nor->or", row, left), torch.einsum("n,nri->ri", row, right)
            size[k] += _squared_norm(b, a)
            off[k] += _squared_norm(torch.cat([b, -mean_b], dim=1), torch.cat([a, mean_a]))
    return torch.where(size > 0, (off / size.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0).sqrt(), 0.0)


def product_means(
    pairs: tuple[Pair, ...],
    vectors: Float[Tensor, "n P"],
    weights: Float[Tensor, "k n"],
    means: Float[Tensor, "k P"],
) -> Float[Tensor, "k P"]:
    """`means` with the factors of each pair replaced by those of the averaged products, cut back to rank r.

    Σ_n w_n B_n A_n has rank n·r at most; its best approximation of rank r (Eckart and Young) comes from a QR
    decomposition of the stacked factors and the singular values of a core of n·r squared. Of all factors with that
    product those are taken whose A is the averaged A, projected on the rows of the product: they stay comparable with
    what came before, so that momentum and sums of updates keep their meaning.

    Args:
        pairs: Of the vectors.
        vectors: The adapters.
        weights: Of each average.
        means: Averages of the whole vectors; everything but the pairs is kept.
    """
    result = means.clone()
    for pair in pairs:
        left, right = pair.left(vectors), pair.right(vectors)
        q_a, r_a = torch.linalg.qr(right.flatten(0, 1).T)
        for k, row in enumerate(weights.double()):
            q_b, r_b = torch.linalg.qr(_side_by_side(row, left))
            u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
            scale = (row[:, None, None] * right.square()).sum().div(pair.rank).sqrt()  # of a row of the adapters' A
            b, a = _near(pair.right(means[k : k + 1])[0], q_b @ u, s, vh @ q_a.T, scale)
            result[k, slice(*pair.a)] = a.flatten().to(result.dtype)
            result[k, slice(*pair.b)] = b.flatten().to(result.dtype)
    return result


def _side_by_side(weights: Float[Tensor, " n"], left: Float[Tensor, "n o r"]) -> Float[Tensor, "o nr"]:
    """[w_1 B_1, …, w_n B_n]."""
    return (weights[:, None, None] * left).permute(1, 0, 2).flatten(1)


def _squared_norm(b: Float[Tensor, "o m"], a: Float[Tensor, "m i"]) -> Tensor:
    """‖B A‖² by the Gram matrices of the factors."""
    return ((b.T @ b) * (a @ a.T)).sum()


def _near(
    averaged: Float[Tensor, "r i"],
    u: Float[Tensor, "o m"],
    s: Float[Tensor, " m"],
    vh: Float[Tensor, "m i"],
    scale: Float[Tensor, ""],
) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r i"]]:
    """Factors of the product's best approximation of rank r, with A as near to the averaged one as its rows allow.

    Where the averaged A all but misses a row of the product, A are the product's rows times `scale` instead.
    """
    rank = len(averaged)
    if float(s[0]) == 0:
        return averaged.new_zeros(len(u), rank), averaged
    kept = min(rank, int((s > _RANK_FLOOR * s[0]).sum()))
    rows = vh[:kept]
    if kept < rank:  # a product of lower rank: the averaged A says which further rows to keep, at weight 0
        beside = averaged - (averaged @ rows.T) @ rows
        rows = torch.cat([rows, torch.linalg.svd(beside, full_matrices=False)[2][: rank - kept]])
    columns = averaged.new_zeros(len(u), rank)
    columns[:, :kept] = u[:, :kept] * s[:kept]
    gauge = averaged @ rows.T
    if float(torch.linalg.svdvals(gauge)[-1]) * _WORST_GAUGE > float(scale):
        return torch.linalg.solve(gauge, columns, left=False), gauge @ rows
    return columns / scale, scale * rows
