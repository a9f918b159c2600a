"""Local SGD or AdamW with weight decay and a pull towards a centre, as one pure function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.core.protocol import Batch, Batches, Slope

Optimizer = Literal["sgd", "adamw"]
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class Moments(NamedTuple):
    """AdamW's memory within one round.

    Attributes:
        first: [T] running mean of the gradient.
        second: [T] running mean of its square.
        steps: [], or [T] where entries have rates of their own, real steps so far.
    """

    first: Tensor
    second: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Descent:
    """The optimiser's constants, PyTorch's convention: v ← momentum·v + g, θ ← θ − lr·v.

    AdamW (Loshchilov and Hutter, arXiv:1711.05101) with the usual constants .9, .999 and 1e-8; its moments begin empty
    in every round, so that a client carries nothing from round to round.

    Attributes:
        momentum: Within one round; every round starts from v = 0.
        weight_decay: Adds ``weight_decay · θ`` to the gradient; of AdamW to the step.
        optimizer: ``sgd`` or ``adamw``.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: Optimizer = "sgd"

    def __call__(
        self,
        params: Float[Tensor, " P"],
        batches: Batches,
        gradient: Callable[[Tensor, Batch], Slope],
        *,
        pull: float = 0.0,
        towards: Float[Tensor, " P"] | None = None,
    ) -> Float[Tensor, " P"]:
        """Descends `gradient` over `batches`; a batch with lr 0 changes nothing.

        Args:
            params: Start, [P]; the first T entries are trainable, the rest buffers that follow their batches.
            batches: One step each.
            gradient: Loss, gradient [T] and new buffers of one batch.
            pull: Adds ``pull · (θ − towards)`` to the gradient.
            towards: Centre of the pull, the start by default.
        """
        centre = params if towards is None else towards
        velocity: Tensor | None = None
        moments: Moments | None = None
        for batch in batches:
            _, slope, buffers = gradient(params, batch)
            trainable = params[: len(slope)]
            adaptive = self.optimizer == "adamw"
            if self.weight_decay and not adaptive:
                slope = torch.add(slope, trainable, alpha=self.weight_decay)
            if pull:
                slope = torch.add(slope, trainable - centre[: len(slope)], alpha=pull)
            if adaptive:
                moments = _moved_moments(moments, slope, batch.lr)
                slope = torch.add(_adam_direction(moments), trainable, alpha=self.weight_decay)
            if self.momentum:  # a step of rate 0 may stand between two real ones, and leaves no velocity behind either
                held = torch.zeros_like(slope) if velocity is None else velocity
                velocity = torch.where(batch.lr > 0, torch.add(slope, held, alpha=self.momentum), held)
            else:
                velocity = slope
            moved = torch.addcmul(trainable, batch.lr, velocity, value=-1)
            params = torch.cat([moved, buffers]) if len(buffers) else moved
        return params


class Descending:
    """`Descent` that moves a vector in place, one step at a time: the same arithmetic and bits without new vectors.

    Args:
        descent: The optimiser's constants.
        trainable: [T], or any shape, moved by every step.
        pull: Adds ``pull · (θ − towards)`` to the gradient.
        towards: [T] centre of the pull; where `trainable` stands now by default.
    """

    def __init__(
        self, descent: Descent, trainable: Float[Tensor, ...], *, pull: float = 0.0, towards: Tensor | None = None
    ) -> None:
        self._descent, self._trainable, self._pull = descent, trainable, pull
        self._centre = (trainable.clone() if towards is None else towards) if pull else None
        self._velocity: Tensor | None = None
        self._moments: Moments | None = None

    def step(self, slope: Float[Tensor, ...], lr: Tensor) -> None:
        """One step.

        Args:
            slope: Gradient; overwritten.
            lr: [], [T], or what else goes with the shape; 0 changes nothing.
        """
        descent, trainable = self._descent, self._trainable
        adaptive = descent.optimizer == "adamw"
        if descent.weight_decay and not adaptive:
            slope.add_(trainable, alpha=descent.weight_decay)
        if self._centre is not None:
            slope.add_(trainable - self._centre, alpha=self._pull)
        if adaptive:
            self._moments = _moved_moments(self._moments, slope, lr)
            slope = torch.add(_adam_direction(self._moments), trainable, alpha=descent.weight_decay)
        if descent.momentum:
            held = torch.zeros_like(slope) if self._velocity is None else self._velocity
            slope = self._velocity = torch.where(lr > 0, torch.add(slope, held, alpha=descent.momentum), held)
        trainable.addcmul_(lr, slope, value=-1)


def _moved_moments(before: Moments | None, slope: Tensor, lr: Tensor) -> Moments:
    """The moments after one more gradient; a step of rate 0 stands for none and leaves them as they are."""
    held = Moments(torch.zeros_like(slope), torch.zeros_like(slope), slope.new_zeros(())) if before is None else before
    real = (lr > 0).to(slope.dtype)
    one, two = (1 - (1 - beta) * real for beta in _BETAS)
    return Moments(
        one * held.first + (1 - one) * slope,
        two * held.second + (1 - two) * slope.square(),
        held.steps + real,
    )


def _adam_direction(moments: Moments) -> Tensor:
    steps = moments.steps.clamp_min(1)
    first = moments.first / (1 - _BETAS[0] ** steps)
    second = moments.second / (1 - _BETAS[1] ** steps)
    return first / (second.sqrt() + _EPSILON)
