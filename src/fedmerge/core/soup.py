"""The model soup: d global models, and how each client mixes them into the one it receives.

Every function is pure, works on flat parameter vectors, and knows nothing of networks, data or transport.
Symbols follow the paper (arXiv:2504.06768): Θ the models, W the logits, A = row_softmax(W) the merging weights.

Axes: N clients · C clients of this round · d global models · P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Soup:
    """All that the FedMerge server must remember between two rounds.

    Attributes:
        models: [d, P] the global models, Θ in the paper.
        logits: [G, N, d] unnormalised merging weights, W in the paper, in float64. G is 1 unless each group of
            layers has rows of its own.

    Raises:
        ValueError: if the two do not agree on d.
    """

    models: Float[Tensor, "d P"]
    logits: Float[Tensor, "G N d"]

    def __post_init__(self) -> None:
        if self.models.shape[0] != self.logits.shape[-1]:
            raise ValueError(
                f"the soup holds {self.models.shape[0]} models but its logits have {self.logits.shape[-1]} columns; "
                "both are d, the number of global models"
            )


def mixing(logits: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """Merging weights A = row_softmax(W): each row is positive and sums to 1.

    >>> mixing(torch.zeros(1, 4)).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    return torch.softmax(logits, dim=-1)


def merge(models: Float[Tensor, "d P"], weights: Float[Tensor, "C d"]) -> Float[Tensor, "C P"]:
    """The one model each client receives: θ_i = Σ_j A_ij Θ_j, in the models' own dtype."""
    return weights.to(models.dtype) @ models


def shares(weights: Float[Tensor, "C d"], num_examples: Int[Tensor, " C"]) -> Float[Tensor, "C d"]:
    """How much client i counts in model j: a_ij = n_i A_ij / Σ_k n_k A_kj.

    Columns sum to 1; a column that no client of this round uses is 0, so that its model stays where it is.
    """
    weighted = weights.double() * num_examples.double()[:, None]
    total = weighted.sum(dim=0, keepdim=True)
    return weighted.div_(torch.where(total > 0, total, torch.ones_like(total)))


def logit_gradient(
    weights: Float[Tensor, "C d"], along: Float[Tensor, "C d"], proportions: Float[Tensor, " C"]
) -> Float[Tensor, "C d"]:
    """∂F/∂W_ij = p_i A_ij ⟨∇L_i(θ_i), Θ_j − θ_i⟩, with the pseudo-gradient g_i in place of ∇L_i (paper, eq. 7-9).

    F(Θ, W) = Σ_i p_i L_i(Σ_j A_ij Θ_j).

    Args:
        weights: Rows of A for the clients of this round.
        along: ⟨g_i, Θ_j − θ_i⟩ from `fedmerge.core.sums.along`.
        proportions: p_i.
    """
    return proportions.double()[:, None] * weights * along
