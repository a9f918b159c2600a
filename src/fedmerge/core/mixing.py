"""The rules that move the merging logits W, one named function each.

All take the rows of this round's clients and return new rows; none changes its arguments. ``along`` is
q_ij = ⟨Θ_j − θ_i, g_i⟩ from `fedmerge.core.sums.along`; the gradient of the objective is p_i A_ij q_ij.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

OFFICIAL_INNER_STEP = 0.01
OFFICIAL_MAX_REPEATS = 10_001


def official_step(
    logits: Float[Tensor, "C d"], slope: Float[Tensor, "C d"], proportions: Float[Tensor, " C"], *, lr: float
) -> Float[Tensor, "C d"]:
    """The authors' step: W ← W − 0.01 p_i r_ij, repeated until a logit has moved more than `lr`.

    r is ``slope`` divided by its L1 norm over all clients and models. The repetition stops after 10,001 times and
    has a closed form, because r does not change inside it. Bit-faithful to the authors' published code, faults
    included: one client's reply moves every other client's row. A slope of zero everywhere, where their code
    divides by zero, changes nothing here.

    Args:
        logits: W, rows of this round's clients.
        slope: A_ij q_ij.
        proportions: p_i = n_i / Σ n.
        lr: Largest change of any logit at which the repetition stops (0.01 in the paper).
    """
    total = slope.abs().sum()
    if total == 0:
        return logits.clone()
    step = OFFICIAL_INNER_STEP * proportions.double()[:, None] * slope / total
    largest = float(step.abs().max())
    repeats = OFFICIAL_MAX_REPEATS if largest == 0 else min(int(lr // largest) + 1, OFFICIAL_MAX_REPEATS)
    return logits - repeats * step


def gradient_step(logits: Float[Tensor, "C d"], gradient: Float[Tensor, "C d"], *, lr: float) -> Float[Tensor, "C d"]:
    """Plain gradient descent on the objective: W ← W − lr ∂F/∂W."""
    return logits - lr * gradient


class Moments(NamedTuple):
    """Adam's memory, one row per client.

    Attributes:
        first: Mean of gradients.
        second: Mean of squared gradients.
        steps: [C] how often each row has moved.
    """

    first: Float[Tensor, "C d"]
    second: Float[Tensor, "C d"]
    steps: Int[Tensor, " C"]


def adam_step(
    logits: Float[Tensor, "C d"],
    gradient: Float[Tensor, "C d"],
    moments: Moments,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
) -> tuple[Float[Tensor, "C d"], Moments]:
    """Adam per row (Kingma and Ba, arXiv:1412.6980): rows that take part rarely keep their own step count."""
    steps = moments.steps + 1
    first = beta1 * moments.first + (1 - beta1) * gradient
    second = beta2 * moments.second + (1 - beta2) * gradient.square()
    count = steps.double()[:, None]
    scale = torch.sqrt(second / (1 - beta2**count)) + 1e-12
    return logits - lr * first / (1 - beta1**count) / scale, Moments(first, second, steps)


def mirror_step(
    logits: Float[Tensor, "C d"],
    along: Float[Tensor, "C d"],
    scale: Float[Tensor, " C"],
    *,
    lr: float,
    decay: float,
    floor: float = 1e-6,
) -> Float[Tensor, "C d"]:
    """Mirror descent on the simplex, per client: W_i ← (1 − decay)(W_i − lr q_i / max_j |q_ij|).

    Exponentiated gradient without the factor A_ij, so that a model which is hardly used can come back. Each row's
    step depends on its own reply only, and its size does not depend on how long the update is.

    Args:
        logits: W, rows of this round's clients.
        along: q_ij with Σ_j A_ij q_ij = 0.
        scale: [C] from `fedmerge.core.sums.Compared.reach`.
        lr: Largest change of a logit before decay.
        decay: Pull of the logits towards uniform merging at every step.
        floor: A row whose q is below this fraction of `scale` is rounding noise and does not move.
    """
    largest = along.abs().amax(dim=1)
    moves = largest > floor * scale
    direction = along / torch.where(moves, largest, torch.ones_like(largest))[:, None]
    return torch.where(moves[:, None], (1 - decay) * (logits - lr * direction), logits)
