"""FedAvg: one model for all (McMahan et al., AISTATS 2017, arXiv:1602.05629)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Task, Update
from fedmerge.core.sums import shares_of_examples


@algorithm("fedavg", citation="McMahan et al., AISTATS 2017, arXiv:1602.05629")
@dataclass(frozen=True)
class FedAvg:
    """One model for all: the average of the clients' updates, weighted by their number of examples.

    Sends P numbers down and P up; keeps P on the server and nothing at the clients. With `server_momentum` it is
    FedAvgM (Hsu et al., arXiv:1909.06335).
    """

    server_lr: float = option(1.0, above=0, help="server step on the averaged update; 1 is plain averaging")
    server_momentum: float = option(0.0, at_least=0, below=1, help="momentum of the server step")

    max_share: float = option(1.0, above=0, at_most=1, help="largest share of one client in the step")

    def __post_init__(self) -> None:
        check_options(self)

    def receive(
        self, state: _parts.Models, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> _parts.Models:
        """Θ ← Θ − η Σ_i a_i g_i with a_i = n_i / Σn, or `max_share` where that is less."""
        share = shares_of_examples(num_examples).clamp_max(self.max_share)
        return _parts.averaged(state, share, update, lr=self.server_lr, momentum=self.server_momentum)

    def train(
        self, down: Float[Tensor, " P"], local: tuple[()], batches: Batches, task: Task
    ) -> tuple[Update, tuple[()]]:
        """Plain local training from the received model."""
        return _parts.trained_update(down, batches, task), local

    init = _parts.one_draw
    send = _parts.to_everyone
    start = _parts.nothing_private
    personal = _parts.as_received
    cost = _parts.averaging_cost
    describe = _parts.one_model
    mixing = _parts.no_mixing
