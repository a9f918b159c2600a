"""Per-FedAvg: a start from which one step of each client goes far (Fallah et al., NeurIPS 2020, arXiv:2002.07948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batch, Batches, Cost, Slope, Task, Update


@algorithm("per-fedavg", citation="Fallah et al., NeurIPS 2020, arXiv:2002.07948")
@dataclass(frozen=True)
class PerFedAvg:
    """FedAvg on each client's loss after one step of its own: model-agnostic meta-learning.

    Each local step goes from w to ``w̃ = w − inner_lr·∇f(w)`` on one batch and moves w by the slope at w̃ on the next
    batch: that slope v itself ("first-order"), or ``v − inner_lr·∇²f(w)·v`` with the product taken from two more
    slopes on the first batch ("hessian-free"). Sends P numbers down and P up; the server keeps P; clients keep nothing
    and use the received model after `adapt_epochs` passes of SGD at `inner_lr`. With inner_lr = 0 it is FedAvg.

    The paper draws new batches for each of its slopes. Here a step's first batch is the second one of the step before
    (of the first step, its own), so that no step of the budget is lost; the Hessian is that of the first batch. The
    difference of slopes is taken over a distance `difference`, in the paper over `difference` times the length of v.
    """

    trains_several: ClassVar[bool] = True

    variant: Literal["first-order", "hessian-free"] = option("first-order", help="whether second derivatives count")
    inner_lr: float = option(0.1, at_least=0, help="rate of the step to the personal model, alpha in the paper")
    adapt_epochs: int = option(1, at_least=0, help="passes at inner_lr over the client's training data before use")
    difference: float = option(0.01, above=0, help="length of the shift on each side for the product with the Hessian")
    server_lr: float = option(1.0, above=0, help="server step on the averaged update")
    server_momentum: float = option(0.0, at_least=0, below=1, help="momentum of the server step")

    def __post_init__(self) -> None:
        check_options(self)

    def train(
        self, down: Float[Tensor, " P"], local: tuple[()], batches: Batches, task: Task
    ) -> tuple[Update, tuple[()]]:
        """Local training on the slope after adaptation."""
        before = iter((batches[0], *batches[:-1]))

        def slope(params: Tensor, batch: Batch) -> Slope:
            return self._meta_slope(params, next(before), batch, task)

        return Update(down - task.descend(down, batches, slope)), local

    def _meta_slope(self, params: Float[Tensor, " P"], first: Batch, second: Batch, task: Task) -> Slope:
        """Slope of ``f₂(w − inner_lr·∇f₁(w))``; buffers follow the pass at w̃ alone."""
        adapted = _shifted(params, task.gradient(params, first).gradient, -self.inner_lr)
        slope = task.gradient(adapted, second)
        if self.variant == "first-order":
            return slope
        product = self._hessian_product(params, slope.gradient, first, task)
        return slope._replace(gradient=slope.gradient - self.inner_lr * product)

    def _hessian_product(
        self, params: Float[Tensor, " P"], vector: Float[Tensor, " T"], batch: Batch, task: Task
    ) -> Float[Tensor, " T"]:
        """∇²f(w)·v ≈ ‖v‖/(2δ) · (∇f(w + δ v/‖v‖) − ∇f(w − δ v/‖v‖)), exact for a quadratic f."""
        length = torch.linalg.vector_norm(vector)
        unit = vector / torch.where(length > 0, length, torch.ones_like(length))
        ahead = task.gradient(_shifted(params, unit, self.difference), batch).gradient
        behind = task.gradient(_shifted(params, unit, -self.difference), batch).gradient
        scale: Tensor = length / (2 * self.difference)
        return scale * (ahead - behind)

    def personal(
        self, down: Float[Tensor, " P"], local: tuple[()], batches: Batches, task: Task
    ) -> Float[Tensor, " P"]:
        """The received model, adapted."""
        return task.train(down, tuple(self._at_inner_rate(batch) for batch in batches) * self.adapt_epochs)

    def _at_inner_rate(self, batch: Batch) -> Batch:
        return batch._replace(lr=torch.where(batch.lr > 0, self.inner_lr, 0.0).to(batch.lr))

    def cost(self, state: _parts.Models) -> Cost:
        """As FedAvg's, with one more slope per step, or three."""
        passes = 1 if self.variant == "first-order" else 3
        return _parts.with_extra_passes(_parts.averaging_cost(self, state), passes)

    init = _parts.one_draw
    receive = _parts.federated_average
    send = _parts.to_everyone
    start = _parts.nothing_private
    describe = _parts.one_model
    mixing = _parts.no_mixing


def _shifted(params: Float[Tensor, " P"], direction: Float[Tensor, " T"], length: float) -> Float[Tensor, " P"]:
    """The trainable part moved by ``length · direction``."""
    T = len(direction)
    return torch.cat([params[:T] + length * direction, params[T:]])
