"""Oracle clustering: FedAvg inside groups that are known, which no real server knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.errors import DataError
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Cost, Draw, Federation, Task, Update
from fedmerge.core.soup import shares


@dataclass(frozen=True)
class Groups:
    """Server state.

    Attributes:
        averages: One model per group.
        membership: [N, K] one-hot rows.
    """

    averages: _parts.Models
    membership: Float[Tensor, "N K"]


@algorithm("oracle", citation="control: FedAvg inside the true groups")
@dataclass(frozen=True)
class Oracle:
    """FedAvg inside the true groups of the partition: what perfect clustering would reach. A control, not a rival.

    Sends P down and P up; needs data whose groups are known.
    """

    server_momentum: float = option(0.0, at_least=0, below=1, help="momentum of the server step")

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, draw: Draw, federation: Federation, seed: int) -> Groups:
        """The first draw for every group.

        Raises:
            DataError: if the groups are not known.
        """
        if federation.groups is None:
            raise DataError(
                "method 'oracle' averages inside the true groups, but this data has none; "
                "use a partition with groups (class-clusters, permuted, rotations, domain) or drop 'oracle'"
            )
        group = torch.tensor(federation.groups)
        membership = one_hot(group, int(group.max()) + 1).double()
        models = draw(0).repeat(membership.shape[1], 1)
        return Groups(_parts.fresh(models, federation.num_trainable), membership)

    def send(self, state: Groups, clients: Int[Tensor, " C"]) -> Float[Tensor, "C P"]:
        """Each client its group's model."""
        return state.averages.models[state.membership[clients].argmax(dim=1)]

    def train(
        self, down: Float[Tensor, " P"], local: tuple[()], batches: Batches, task: Task
    ) -> tuple[Update, tuple[()]]:
        """Plain local training."""
        return _parts.trained_update(down, batches, task), local

    def receive(
        self, state: Groups, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> Groups:
        """FedAvg inside each group; a group without replies stays where it is."""
        share = shares(state.membership[clients], num_examples)
        return Groups(_parts.averaged(state.averages, share, update, momentum=self.server_momentum), state.membership)

    def cost(self, state: Groups) -> Cost:
        """One vector each way."""
        return _parts.averaging_cost(self, state.averages)

    def describe(self, state: Groups) -> dict[str, Any]:
        """Number of groups."""
        return {"num_models": len(state.averages.models)}

    def mixing(self, state: Groups) -> Float[Tensor, "N K"]:
        """One-hot rows."""
        return state.membership

    start = _parts.nothing_private
    personal = _parts.as_received
