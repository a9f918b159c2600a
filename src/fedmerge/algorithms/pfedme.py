"""pFedMe: personalization by Moreau envelopes (T Dinh et al., NeurIPS 2020, arXiv:2006.08848)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Cost, Task, Update
from fedmerge.core.sums import shares_of_examples


@algorithm("pfedme", citation="T Dinh et al., NeurIPS 2020, arXiv:2006.08848")
@dataclass(frozen=True)
class PFedMe:
    """Each client solves for a personal model θ near its copy w of the common one; w follows θ a part of the way.

    For every batch: `inner_steps` steps on ``loss(θ) + proximal/2 · ‖θ − w‖²``, then ``w ← w − lr·proximal·(w − θ)``.
    Sends P numbers down and the change of w (P) up; the server keeps P and takes `server_mixing` of the averaged
    change; clients keep their last θ (P) and use it. It computes `inner_steps` gradients where others compute one.

    θ starts each round from the received model and each batch from where it is, as in the authors' code. Where the
    paper has two rates, both are here the training rate, the inner one times `inner_rate`; their proximal of 15 goes
    with an outer rate of 0.005, the one here with 0.03 to 0.3. ``lr · proximal`` must stay below 1 and
    ``lr · inner_rate · proximal`` well below 2. With inner_steps = 1, inner_rate = 1 and ``lr · proximal = 1`` it
    sends what FedAvg sends.
    """

    trains_several: ClassVar[bool] = True

    proximal: float = option(2.0, above=0, help="pull between θ and w, lambda in the paper (with the factor 1/2)")
    inner_steps: int = option(5, at_least=1, help="steps on one batch towards the personal model, K in the paper")
    inner_rate: float = option(1.0, above=0, help="rate of these steps as a multiple of the training rate")
    server_mixing: float = option(1.0, above=0, help="part of the averaged change the server takes, beta in the paper")

    def __post_init__(self) -> None:
        check_options(self)

    def train(
        self, down: Float[Tensor, " P"], local: _parts.Own, batches: Batches, task: Task
    ) -> tuple[Update, _parts.Own]:
        """The alternation of θ and w; w takes over the buffers of θ, which alone see data."""
        T = task.layout.num_trainable
        copy, own = down, down
        for batch in batches:
            inner = batch._replace(lr=self.inner_rate * batch.lr)
            own = task.train(own, (inner,) * self.inner_steps, pull=self.proximal, towards=copy)
            followed = copy[:T] - batch.lr * self.proximal * (copy[:T] - own[:T])
            copy = torch.cat([followed, own[T:]])
        return Update(down - copy), _parts.own_now(own, local)

    def receive(
        self, state: _parts.Models, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> _parts.Models:
        """Θ ← (1 − server_mixing)·Θ + server_mixing·(average of the w)."""
        return _parts.averaged(state, shares_of_examples(num_examples), update, lr=self.server_mixing)

    def cost(self, state: _parts.Models) -> Cost:
        """One vector each way; every example passes `inner_steps` times."""
        cost = _parts.one_vector_each_way(state.models, server_floats=state.models.numel())
        return _parts.with_extra_passes(cost, self.inner_steps - 1)

    init = _parts.one_draw
    send = _parts.to_everyone
    start = _parts.nothing_own_yet
    personal = _parts.own_model
    describe = _parts.one_model
    mixing = _parts.no_mixing
