"""How many others stand behind what a client can read off its own models: the price of personalization.

A round moves model j by Σ_k a_kj g_k with the shares a_kj = n_k A_kj / Σ_l n_l A_lj of `fedmerge.core.soup.shares`.
Client i sees its own model Σ_j A_ij Θ_j before and after, and so Σ_k q_ik g_k with q_ik = Σ_j A_ij a_kj. It knows its
own g_i and can take it away; what is left mixes the others' updates with the shares

    p_ik = q_ik / Σ_{l≠i} q_il   for k ≠ i.

As many as K_eff(i) = 1 / Σ_{k≠i} p_ik² updates of equal share would be mixed as well: with K_eff(i) = 1 client i reads
one other client's update as if it had been sent it. All this is about what other clients learn. The server sees every
update anyway; averages of several rounds, what is public of a client's data and any further knowledge can only make a
crowd smaller; server steps that mix more than q (momentum, shrinkage towards a common step) are not in the formula.

Axes: N clients (or those of one round) · d models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.core.soup import shares

SMALL = 5
"""A crowd K_eff below this is warned of."""
_BLOCK = 1 << 22
"""Largest number of q_ik that are held at a time: 32 MiB."""


@dataclass(frozen=True)
class Crowd:
    """What the merging weights say of every client's crowd; float64.

    Attributes:
        effective: [N] K_eff(i), from 1 to N − 1; NaN for a client whose model no other client moves: it can read
            nobody.
        nearest: [N] the client whose update i could read best, argmax_k p_ik, of equal ones the first; −1 where
            `effective` is NaN.
        nearest_share: [N] its share max_k p_ik in 0..1; NaN where `effective` is.
        largest: [N] max_j a_ij in 0..1: how much of some model's step is client i's update alone.
        leverage: [N] h_ii = Σ_j A_ij a_ij in 0..1: how much of the step of its own model is its own update.
    """

    effective: Float[Tensor, " N"]
    nearest: Int[Tensor, " N"]
    nearest_share: Float[Tensor, " N"]
    largest: Float[Tensor, " N"]
    leverage: Float[Tensor, " N"]


def crowd(weights: Float[Tensor, "N d"], examples: Int[Tensor, " N"]) -> Crowd:
    """K_eff, the best readable other client, largest share and leverage of every client.

    One client alone, a client alone in its models and a client that weighs no model have no crowd: NaN. With one model
    (d = 1) everybody reads everybody: K_eff(i) = (Σ_{k≠i} n_k)² / Σ_{k≠i} n_k², which is N − 1 for equal n. A model
    that nobody uses, and a client without examples, count for nothing.

    Args:
        weights: A, merging weights >= 0, rows summing to 1; those of a round's cohort give that round's crowd.
        examples: n >= 0, training examples of the same clients.

    Raises:
        ValueError: for NaN, infinite or negative numbers, without clients, or if shapes disagree.

    >>> found = crowd(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([5, 5, 5]))
    >>> found.effective.tolist(), found.nearest.tolist()
    ([1.0, 1.0, nan], [1, 0, -1])
    """
    _check(weights, examples)
    wide = weights.double()
    share = shares(wide, examples)
    rows = max(1, _BLOCK // len(wide))
    blocks = [torch.arange(start, min(start + rows, len(wide))) for start in range(0, len(wide), rows)]
    parts = [_read_by(clients, wide[clients], share) for clients in blocks]
    effective, nearest, nearest_share = (torch.cat(column) for column in zip(*parts, strict=True))
    return Crowd(effective, nearest, nearest_share, share.amax(dim=1), (wide * share).sum(dim=1))


def _read_by(
    clients: Int[Tensor, " B"], rows: Float[Tensor, "B d"], share: Float[Tensor, "N d"]
) -> tuple[Tensor, Tensor, Tensor]:
    """[B] K_eff, nearest and its share for some of the clients, given as their indices and rows of A."""
    mixed = rows @ share.T
    mixed[torch.arange(len(clients)), clients] = 0.0
    total = mixed.sum(dim=1, keepdim=True)
    others = mixed / total  # 0/0 is NaN: nobody to read
    alone = ~(total[:, 0] > 0)
    most, nearest = mixed.max(dim=1)
    effective = 1 / others.square().sum(dim=1)
    return effective, torch.where(alone, -1, nearest), most / total[:, 0]


def _check(weights: Tensor, examples: Tensor) -> None:
    if weights.ndim != 2 or examples.shape != weights.shape[:1] or not weights.numel():
        raise ValueError(
            f"got weights {tuple(weights.shape)} and examples {tuple(examples.shape)}; expected [N, d] and [N] of the "
            "same clients, at least one client and one model"
        )
    for name, values in (("weights", weights), ("examples", examples)):
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise ValueError(f"{name}: got NaN, infinite or negative numbers; expected finite numbers >= 0")
