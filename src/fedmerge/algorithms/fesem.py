"""FeSEM: multi-center federated learning (Xie et al., arXiv:2005.01026; Long et al., World Wide Web 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from fedmerge.algorithms import _clusters, _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Cost, Draw, Federation, Task, Update
from fedmerge.core.randomness import generator
from fedmerge.core.soup import shares
from fedmerge.core.structure import kmeans


@dataclass(frozen=True)
class Centres:
    """Server state.

    Attributes:
        averages: One model per centre.
        assigned: [N] each client's centre, −1 before its first reply.
        seed: [] for the one-time k-means.
    """

    averages: _parts.Models
    assigned: Int[Tensor, " N"]
    seed: Int[Tensor, ""]


@algorithm("fesem", citation="Xie et al., arXiv:2005.01026; Long et al., World Wide Web 2023")
@dataclass(frozen=True)
class FeSem:
    """Clusters clients by the distance of their trained models to d centres; a centre is the average of its members.

    Sends P down and P up; clients keep nothing. All centres start from one draw; k-means over the first round's
    trained models tells them apart. A client that has not replied yet receives the mean of the centres. With
    num_models = 1 it is FedAvg. Its paper has no `server_momentum`.
    """

    num_models: int = option(5, at_least=1, help="number of centres; this method must be told")
    server_momentum: float = option(0.0, at_least=0, below=1, help="momentum of the server step")

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, draw: Draw, federation: Federation, seed: int) -> Centres:
        """One draw for all centres."""
        _parts.refuse_more_than_clients("fesem", self.num_models, federation.num_clients, "centre")
        models = draw(0).repeat(self.num_models, 1)
        averages = _parts.fresh(models, federation.num_trainable)
        return Centres(averages, torch.full((federation.num_clients,), -1), torch.tensor(seed))

    def send(self, state: Centres, clients: Int[Tensor, " C"]) -> Float[Tensor, "C P"]:
        """Each client its centre."""
        models, assigned = state.averages.models, state.assigned[clients]
        common = models.double().mean(dim=0).to(models.dtype)
        return torch.where((assigned >= 0)[:, None], models[assigned.clamp_min(0)], common)

    def train(
        self, down: Float[Tensor, " P"], local: tuple[()], batches: Batches, task: Task
    ) -> tuple[Update, tuple[()]]:
        """Plain local training."""
        return _parts.trained_update(down, batches, task), local

    def receive(
        self, state: Centres, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> Centres:
        """Assigns every reply to its nearest centre, then moves each centre to the average of its members."""
        trained = self.send(state, clients) - update.delta
        first_round = bool((state.assigned < 0).all())
        centres = state.averages.models
        nearest = self._first_groups(state, trained) if first_round else _clusters.nearest(trained, centres)
        share = shares(one_hot(nearest, self.num_models).double(), num_examples)
        away = centres[nearest] - trained
        averages = _parts.averaged(state.averages, share, Update(away), momentum=self.server_momentum)
        return Centres(averages, state.assigned.index_copy(0, clients, nearest), state.seed)

    def _first_groups(self, state: Centres, trained: Float[Tensor, "C P"]) -> Int[Tensor, " C"]:
        if len(trained) < self.num_models:
            raise UsageError(
                f"fesem.num_models: got {self.num_models} centres but only {len(trained)} clients in the first round; "
                "lower num_models or let more clients take part"
            )
        labels = kmeans(trained, self.num_models, generator(int(state.seed), "fesem"))
        return torch.from_numpy(labels).to(trained.device)

    def cost(self, state: Centres) -> Cost:
        """One vector each way."""
        return _parts.averaging_cost(self, state.averages)

    def describe(self, state: Centres) -> dict[str, Any]:
        """How many centres have members."""
        return {"num_models": self.num_models, "models_in_use": len(torch.unique(state.assigned[state.assigned >= 0]))}

    def mixing(self, state: Centres) -> Float[Tensor, "N d"]:
        """One-hot rows; uniform before a client's first reply."""
        rows = one_hot(state.assigned.clamp_min(0), self.num_models).double()
        return torch.where((state.assigned >= 0)[:, None], rows, torch.full_like(rows, 1 / self.num_models))

    start = _parts.nothing_private
    personal = _parts.as_received
