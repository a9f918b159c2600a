"""FedProx: FedAvg with local training pulled back to the received model (Li et al., MLSys 2020, arXiv:1812.06127)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Task, Update


@algorithm("fedprox", citation="Li et al., MLSys 2020, arXiv:1812.06127")
@dataclass(frozen=True)
class FedProx:
    """FedAvg whose clients minimise their loss plus ``proximal/2 · ‖θ − θ_received‖²``.

    Note the ½, as in its paper; FedMerge's own `proximal` has none. Sends P down and P up; with proximal = 0 it is
    FedAvg.
    """

    proximal: float = option(0.01, at_least=0, help="strength of the pull, mu in the paper (with the factor 1/2)")
    server_lr: float = option(1.0, above=0, help="server step on the averaged update")
    server_momentum: float = option(0.0, at_least=0, below=1, help="momentum of the server step")

    def __post_init__(self) -> None:
        check_options(self)

    def train(
        self, down: Float[Tensor, " P"], local: tuple[()], batches: Batches, task: Task
    ) -> tuple[Update, tuple[()]]:
        """Local training with the pull."""
        return _parts.trained_update(down, batches, task, pull=self.proximal), local

    init = _parts.one_draw
    receive = _parts.federated_average
    send = _parts.to_everyone
    start = _parts.nothing_private
    personal = _parts.as_received
    cost = _parts.averaging_cost
    describe = _parts.one_model
    mixing = _parts.no_mixing
