"""FedProx: FedAvg with local training pulled back to the received model (Li et al., MLSys 2020, arXiv:1812.06127)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Draw, Federation, Task, Update
from fedmerge.core.sums import shares_of_examples


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

    def init(self, draw: Draw, federation: Federation, seed: int) -> _parts.Models:
        """The first draw."""
        return _parts.fresh(draw(0)[None], federation.num_trainable)

    def train(
        self, down: Float[Tensor, " P"], local: tuple[()], batches: Batches, task: Task
    ) -> tuple[Update, tuple[()]]:
        """Local training with the pull."""
        return _parts.trained_update(down, batches, task, pull=self.proximal), local

    def receive(
        self,
        state: _parts.Models,
        clients: Int[Tensor, " C"],
        update: Update,
        num_examples: Int[Tensor, " C"],
    ) -> _parts.Models:
        """As FedAvg."""
        return _parts.averaged(
            state, shares_of_examples(num_examples), update, lr=self.server_lr, momentum=self.server_momentum
        )

    send = _parts.to_everyone
    start = _parts.nothing_private
    personal = _parts.as_received
    cost = _parts.averaging_cost
    describe = _parts.one_model
    mixing = _parts.no_mixing
