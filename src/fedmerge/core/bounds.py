"""How far apart the models of a soup may come: a bound that honest clients do not feel.

A client that lies is soon alone in a model of its own, which then runs away from the others. Every client holds a
little of it, and the step of every row is ruled by it: that is how a few liars harm all. So a model that is much
further from the others than models are from each other is held back, and whoever does not favour it leaves it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedmerge.core.sums import blocks, centred_products, squared_norms, weighted_sum

LEAVE = 0.2
"""What a row takes off its logit for a remote model in a round: a step of the mirror rule."""
GONE = 10.0
"""Where rows stop: e⁻¹⁰ is 1/22,000 of a weight, and the mirror rule goes no further either."""


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
    products = centred_products(models)
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0).sqrt()


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


def mean_use(logits: Float[Tensor, "G N d"]) -> Float[Tensor, " d"]:
    """Mean over rows of the weight that they give each model, without all weights at a time."""
    total = logits.new_zeros(logits.shape[-1])
    for some in blocks(logits.shape[1]):
        total += torch.softmax(logits[:, some], dim=-1).sum(dim=(0, 1))
    return total / (logits.shape[0] * logits.shape[1])


def kept_together(
    models: Float[Tensor, "d P"], logits: Float[Tensor, "G N d"], num_trainable: int, *, factor: float
) -> tuple[Float[Tensor, "d P"], Float[Tensor, "G N d"]]:
    """Models and rows after each model more than `factor` times further from the others than models are is held back.

    The trained part of a remote model is moved towards the mean of the others, weighted by use, until it is `factor`
    times the gap of models away from it; and every row that favours another model takes `LEAVE` off its logit for the
    remote one, down to −`GONE`. So a model that only liars favour is soon theirs alone, and an honest group that is
    remote keeps its model. Nothing changes, to the last bit, where no model is that far, nor for fewer than 3 models,
    of which none can be said to be the remote one.

    Args:
        models: Θ.
        logits: W.
        num_trainable: T; the buffers behind it stay.
        factor: 0 switches it off.
    """
    if factor == 0 or len(models) < 3:
        return models, logits
    use, trained = mean_use(logits), models[:, :num_trainable]
    typical, middle = gaps(trained, use)
    remote = typical > factor * middle
    if middle == 0 or not bool(remote.any()):
        return models, logits
    near = torch.where(remote, 0.0, use)
    centre = weighted_sum((near / near.sum())[:, None], trained)
    apart = trained[remote].double() - centre
    shrink = (factor * middle / squared_norms(apart).sqrt()).clamp_max(1.0)
    models = models.clone()
    models[remote, :num_trainable] = (centre + shrink[:, None] * apart).to(models.dtype)
    return models, _left(logits, remote)


def _left(logits: Float[Tensor, "G N d"], remote: Bool[Tensor, " d"]) -> Float[Tensor, "G N d"]:
    """Rows a step further from remote models; each keeps its favourite."""
    favourite = logits.argmax(dim=-1, keepdim=True)
    leaves = (remote & (logits > -GONE)).scatter(-1, favourite, torch.zeros_like(favourite, dtype=torch.bool))
    return torch.where(leaves, logits - LEAVE, logits)
