"""Right answers and losses of one model on one client's examples."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedmerge.core.ensemble import Personal, members, outputs_of
from fedmerge.core.protocol import Batches


@runtime_checkable
class Predictor(Protocol):
    """What scoring needs of a task."""

    def predict(self, params: Tensor, inputs: Tensor) -> Tensor:
        """Outputs [B, K]."""
        ...

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example [B]."""
        ...

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How right each answer is, 0..1, [B]."""
        ...


class Tally(NamedTuple):
    """Sums over one client's examples.

    Attributes:
        right: [] sum of how right the answers are, 0..1 each.
        loss: [] sum of losses in nats.
        count: [] number of examples.
    """

    right: Tensor
    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a tally


def tally(task: Predictor, model: Personal, batches: Batches) -> Tally:
    """Scores `model` on every real example of `batches` (weight > 0); sums in float64."""
    sums = torch.zeros(3, dtype=torch.float64, device=members(model)[0].device)
    for batch in batches:
        outputs = outputs_of(model, batch.inputs, task.predict)
        real = (batch.weight > 0).double()
        right = task.right(outputs, batch.targets).double()
        losses = task.losses(outputs, batch.targets).double()
        sums = sums + torch.stack([(real * right).sum(), (real * losses).sum(), real.sum()])
    return Tally(sums[0], sums[1], sums[2])
