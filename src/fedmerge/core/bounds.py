"""How much one client may move, and how far models may come apart: bounds that cost nothing among honest clients.

A client that lies is soon alone in a model of its own, which then runs away from the others. Every client holds a
little of it, and the step of every row is ruled by it: that is how a few liars harm all. So a model that is much
further from the others than models are from each other is brought back.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.core.sums import centred, inner_products, squared_norms


def weighted_median(values: Float[Tensor, "*rows n"], weights: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """The smallest value that together with all smaller ones has more than half of the weight.

    >>> weighted_median(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0.2, 0.6, 0.2]))
    tensor(5.)
    """
    order = values.argsort(dim=-1)
    reached = weights.gather(-1, order).cumsum(dim=-1)
    place = (reached <= reached[..., -1:] / 2).sum(dim=-1, keepdim=True).clamp_max(values.shape[-1] - 1)
    return values.gather(-1, order).gather(-1, place).squeeze(-1)


def distances(models: Float[Tensor, "d P"]) -> Float[Tensor, "d d"]:
    """‖Θ_j − Θ_k‖ in float64."""
    apart = centred(models)
    squares = squared_norms(apart)
    return (squares[:, None] + squares[None, :] - 2 * inner_products(apart, apart)).clamp_min(0).sqrt()


def gaps(models: Float[Tensor, "d P"], use: Float[Tensor, " d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
    """How far each model is from the others, and how far models are.

    The first is the median of a model's distances to the other models, the second the median of that over the models.
    Both weigh a model by its use, so that those who hold less than half of all merging weight do not decide.

    Args:
        models: At least 2.
        use: Mean over the clients of the weight that they give each model.
    """
    others = use.repeat(len(use), 1).fill_diagonal_(0)
    typical = weighted_median(distances(models), others)
    return typical, weighted_median(typical, use)


def within_reach(models: Float[Tensor, "d P"], use: Float[Tensor, " d"], *, factor: float) -> Float[Tensor, "d P"]:
    """The models, each that is more than `factor` times further from the others than models are brought back.

    It is moved towards the mean of the others, weighted by their use, until it is `factor` times the gap of models away
    from it. Where no model is that far nothing changes, to the last bit; nor does it for fewer than 3 models, of which
    none can be said to be the remote one.

    Args:
        models: Θ, or the part of it that is trained.
        use: Mean over the clients of the weight that they give each model.
        factor: 0 switches it off.
    """
    if factor == 0 or len(models) < 3:
        return models
    typical, middle = gaps(models, use)
    far = typical > factor * middle
    if middle == 0 or not bool(far.any()):
        return models
    near = torch.where(far, 0.0, use)
    centre = (near / near.sum()) @ models.double()
    apart = models[far].double() - centre
    shrink = (factor * middle / squared_norms(apart).sqrt()).clamp_max(1.0)
    return models.index_put((far,), (centre + shrink[:, None] * apart).to(models.dtype))
