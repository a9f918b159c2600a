"""FedALA: each client learns how much of the received last layers to take (Zhang et al., AAAI 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _parts, _sharing
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batch, Batches, Cost, Draw, Federation, Task, Update
from fedmerge.core.ranges import mask
from fedmerge.core.sums import shares_of_examples


class Adapting(NamedTuple):
    """What a client keeps.

    Attributes:
        model: [P] its model after its last round.
        weights: [P] how much of each received number it takes; only those of the last layers count.
        joined: [] whether it has taken part.
        learnt: [] whether its weights have had their long first learning.
    """

    model: Tensor
    weights: Tensor
    joined: Tensor
    learnt: Tensor


@algorithm("fedala", citation="Zhang et al., AAAI 2023, arXiv:2212.01197")
@dataclass(frozen=True)
class FedAla:
    """FedAvg whose clients start from ``own + (received − own) · w`` in the last layers, with learnt w in [0, 1].

    Before a round's training every number of w descends the loss of the merged model on a share of the round's
    mini-batches: for `first_passes` passes the first time, for `passes` later; w is kept between rounds and begins
    at 1. The other layers and the buffers are the received ones. A client uses its merged model, not yet trained on.
    Sends P down and P up; the server keeps P, clients keep 2·P. With ala_lr = 0 it is FedAvg. The paper learns w the
    first time until its loss settles, at rate 1; here that is a fixed number of passes, at a rate of 10 to make up for
    their number. The simulation computes the first passes in every round (later ones without effect), so it takes
    longer than `cost` says. With BatchNorm under the buffer policy ``local``, learning w moves the statistics too.
    """

    trains_several: ClassVar[bool] = True

    layers: int = option(1, at_least=0, help="last layers that are merged with the client's own, p in the paper")
    ala_lr: float = option(10.0, at_least=0, help="rate of the merging weights, eta in the paper")
    sample: float = option(0.4, above=0, at_most=1, help="share of a round's mini-batches that w is learnt on")
    passes: int = option(1, at_least=1, help="passes over the sample per round")
    first_passes: int = option(2, at_least=1, help="passes over the sample the first time")

    def __post_init__(self) -> None:
        check_options(self)
        if self.first_passes < self.passes:
            raise UsageError(
                f"FedAla.first_passes: got {self.first_passes} with passes = {self.passes}; "
                "expected at least as many the first time"
            )

    def init(self, draw: Draw, federation: Federation, seed: int) -> _parts.Models:
        """The first draw."""
        _sharing.first_of_last(federation, self.layers, "fedala.layers")
        return _parts.fresh(draw(0)[None], federation.num_trainable)

    def start(self, params: Float[Tensor, " P"]) -> Adapting:
        """All of the received model."""
        never = torch.zeros((), dtype=torch.bool, device=params.device)
        return Adapting(params, torch.ones_like(params), never, never)

    def train(
        self, down: Float[Tensor, " P"], local: Adapting, batches: Batches, task: Task
    ) -> tuple[Update, Adapting]:
        """Learns the weights, merges, trains, and reports received − trained."""
        weights = self._learnt(down, local, batches, task, self.sample)
        after = task.train(self._merged(down, local, weights, task), batches)
        return Update(down - after), Adapting(after, weights, torch.ones_like(local.joined), local.joined)

    def personal(self, down: Float[Tensor, " P"], local: Adapting, batches: Batches, task: Task) -> Float[Tensor, " P"]:
        """The merged model after learning on one pass over the data."""
        return self._merged(down, local, self._learnt(down, local, batches, task, 1.0), task)

    def receive(
        self, state: _parts.Models, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> _parts.Models:
        """FedAvg."""
        return _parts.averaged(state, shares_of_examples(num_examples), update)

    def cost(self, state: _parts.Models) -> Cost:
        """One vector each way, and the later passes over the sample."""
        once = _parts.one_vector_each_way(state.models, server_floats=state.models.numel())
        return _parts.with_extra_passes(once, self.sample * self.passes if self.ala_lr else 0)

    def _last(self, task: Task) -> tuple[int, int]:
        return _sharing.first_of_last(task.layout, self.layers, "fedala.layers"), task.layout.num_trainable

    def _merged(
        self, down: Float[Tensor, " P"], local: Adapting, weights: Float[Tensor, " P"], task: Task
    ) -> Float[Tensor, " P"]:
        """Own + (received − own)·w in the last layers; all received before the client has a model of its own."""
        last = mask((self._last(task),), down)
        return down + torch.where(local.joined, last * (1 - weights) * (local.model - down), 0)

    def _learnt(
        self, down: Float[Tensor, " P"], local: Adapting, batches: Batches, task: Task, sample: float
    ) -> Float[Tensor, " P"]:
        """The merging weights after learning on a share of the batches."""
        if not self.ala_lr:
            return local.weights
        weights, wanted = local.weights, _in_sample(batches, sample)
        for turn in range(self.first_passes):
            now = local.joined & (torch.logical_not(local.learnt) | (turn < self.passes))
            for k, batch in enumerate(batches[: max(1, math.floor(sample * len(batches) + 0.5))]):
                stepped = self._step(down, local, weights, batch, task)
                weights = torch.where(now & (k < wanted), stepped, weights)
        return weights

    def _step(
        self, down: Float[Tensor, " P"], local: Adapting, weights: Float[Tensor, " P"], batch: Batch, task: Task
    ) -> Float[Tensor, " P"]:
        """One step of the weights: the slope on w is the slope on the merged number times (received − own)."""
        (start, stop), merged = self._last(task), self._merged(down, local, weights, task)
        slope = task.gradient(merged, batch).gradient[start:stop] * (down - local.model)[start:stop]
        moved = (weights[start:stop] - self.ala_lr * slope).clamp(0, 1)
        return torch.cat([weights[:start], moved, weights[stop:]])

    send = _parts.to_everyone
    describe = _parts.one_model
    mixing = _parts.no_mixing


def _in_sample(batches: Batches, sample: float) -> Int[Tensor, ""]:
    """A share of the real steps: padded ones, which come last, do not count."""
    real = torch.stack([batch.weight.sum() > 0 for batch in batches]).sum()
    return torch.floor(sample * real.double() + 0.5).clamp_min(1).long()
