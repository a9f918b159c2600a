"""Ditto: a model of one's own, held close to the common one (Li et al., ICML 2021, arXiv:2012.04221)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Cost, Task, Update


@algorithm("ditto", citation="Li et al., ICML 2021, arXiv:2012.04221")
@dataclass(frozen=True)
class Ditto:
    """FedAvg beside which each client trains its own model with a pull ``proximal/2 · ‖v − θ_received‖²``.

    Sends P numbers down and P up; the server keeps P; clients keep their own model (P), which begins as the first
    model they receive (the paper leaves its start open). The own model takes the same steps as the common one, on the
    same batches, which doubles the computation. The common part is FedAvg; with proximal = 0 and everyone taking part
    the own models are those of Local.
    """

    trains_several: ClassVar[bool] = True

    proximal: float = option(0.1, at_least=0, help="pull of the own model towards the common one, lambda in the paper")
    server_lr: float = option(1.0, above=0, help="server step on the averaged update")
    server_momentum: float = option(0.0, at_least=0, below=1, help="momentum of the server step")

    def __post_init__(self) -> None:
        check_options(self)

    def train(
        self, down: Float[Tensor, " P"], local: _parts.Own, batches: Batches, task: Task
    ) -> tuple[Update, _parts.Own]:
        """Trains the common model, then the client's own one."""
        update = _parts.trained_update(down, batches, task)
        own = task.train(_parts.own_or_received(down, local), batches, pull=self.proximal, towards=down)
        return update, _parts.own_now(own, local)

    def cost(self, state: _parts.Models) -> Cost:
        """As FedAvg's, with a second model trained."""
        return _parts.with_extra_passes(_parts.averaging_cost(self, state), 1)

    init = _parts.one_draw
    receive = _parts.federated_average
    send = _parts.to_everyone
    start = _parts.nothing_own_yet
    personal = _parts.own_model
    describe = _parts.one_model
    mixing = _parts.no_mixing
