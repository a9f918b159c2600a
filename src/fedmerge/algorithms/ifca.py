"""IFCA: each client trains the one of d models that fits it best (Ghosh et al., NeurIPS 2020, arXiv:2006.04088)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Cost, Draw, Federation, Task
from fedmerge.core.soup import shares


class Choice(NamedTuple):
    """What a client sends back.

    Attributes:
        delta: [P] before − after of the model it trained.
        model: [] which model that was.
    """

    delta: Tensor
    model: Tensor


@dataclass(frozen=True)
class Clusters:
    """Server state.

    Attributes:
        averages: One model per cluster.
        chosen: [N] each client's last choice, −1 before its first round.
    """

    averages: _parts.Models
    chosen: Int[Tensor, " N"]


@algorithm("ifca", citation="Ghosh et al., NeurIPS 2020, arXiv:2006.04088")
@dataclass(frozen=True)
class Ifca:
    """Sends all d models to every client, which trains the one with the lowest loss on its own data.

    Sends d·P down and P up, and costs d extra forward passes per training example. Clients keep nothing. With
    num_models = 1 it is FedAvg. The d models start from d different draws, as in its paper, which has no
    `server_momentum`.
    """

    num_models: int = option(5, at_least=1, help="number of clusters; this method must be told")
    server_momentum: float = option(0.0, at_least=0, below=1, help="momentum of the server step")

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, draw: Draw, federation: Federation, seed: int) -> Clusters:
        """Different draws for different models."""
        _parts.refuse_more_than_clients("ifca", self.num_models, federation.num_clients)
        models = torch.stack([draw(j) for j in range(self.num_models)])
        averages = _parts.fresh(models, federation.num_trainable)
        return Clusters(averages, torch.full((federation.num_clients,), -1))

    def send(self, state: Clusters, clients: Int[Tensor, " C"]) -> Float[Tensor, "C d P"]:
        """All models to everyone."""
        return state.averages.models.expand(len(clients), -1, -1)

    def train(
        self, down: Float[Tensor, "d P"], local: tuple[()], batches: Batches, task: Task
    ) -> tuple[Choice, tuple[()]]:
        """Chooses by loss on the examples of this round, then trains."""
        best = _best(down, batches, task)
        params = torch.index_select(down, 0, best[None])[0]
        return Choice(params - task.train(params, batches), best), local

    def personal(
        self,
        down: Float[Tensor, "d P"],
        local: tuple[()],
        batches: Batches,
        task: Task,
    ) -> Float[Tensor, " P"]:
        """The model with the lowest loss on the client's training data."""
        return torch.index_select(down, 0, _best(down, batches, task)[None])[0]

    def check_reply(self, tensors: Mapping[str, Tensor]) -> str | None:
        """The model that a client says it trained must be one of those it was sent."""
        model = int(tensors["model"])
        return None if 0 <= model < self.num_models else f"model: got {model}; expected 0..{self.num_models - 1}"

    def receive(
        self, state: Clusters, clients: Int[Tensor, " C"], update: Choice, num_examples: Int[Tensor, " C"]
    ) -> Clusters:
        """FedAvg among those who chose the same model."""
        share = shares(one_hot(update.model, self.num_models).double(), num_examples)
        averages = _parts.averaged(state.averages, share, update, momentum=self.server_momentum)
        return Clusters(averages, state.chosen.index_copy(0, clients, update.model))

    def cost(self, state: Clusters) -> Cost:
        """D vectors down, one and an index up."""
        models = state.averages.models
        size = models.shape[1] * models.element_size()
        index = state.chosen.element_size()
        kept = _parts.averaging_cost(self, state.averages).server_floats
        return Cost(len(models) * size, size + index, kept, extra_forward=len(models))

    def describe(self, state: Clusters) -> dict[str, Any]:
        """How many models are in use."""
        chosen = state.chosen[state.chosen >= 0]
        return {"num_models": self.num_models, "models_in_use": len(torch.unique(chosen))}

    def mixing(self, state: Clusters) -> Float[Tensor, "N d"]:
        """One-hot rows of the last choices; uniform before a client's first round."""
        rows = one_hot(state.chosen.clamp_min(0), self.num_models).double()
        return torch.where((state.chosen >= 0)[:, None], rows, torch.full_like(rows, 1 / self.num_models))

    start = _parts.nothing_private


def _best(models: Float[Tensor, "d P"], batches: Batches, task: Task) -> Int[Tensor, ""]:
    """Index of the model with the lowest loss; every example counts the same."""
    counts = torch.stack([(batch.weight > 0).sum() for batch in batches])
    losses = [torch.stack([task.loss(model, batch) for batch in batches]) @ counts.to(models.dtype) for model in models]
    return torch.stack(losses).argmin()
