"""LG-FedAvg: local representations, a shared head (Liang et al., arXiv:2001.01523)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fedmerge.algorithms import _parts, _sharing
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Task, Update
from fedmerge.core.ranges import Ranges


@algorithm("lg-fedavg", citation="Liang et al., arXiv:2001.01523")
@dataclass(frozen=True)
class LgFedAvg:
    """The last layers are averaged, the body stays with its client; each round trains both together.

    The opposite of FedPer. Sends the last layers down and up; the server keeps those, clients keep their bodies and
    their buffers. With shared_layers = 0 it is Local; with as many as the network has it is FedAvg (buffers
    included). The paper starts from a model trained by FedAvg; here both parts start from the common first draw.
    """

    shared_layers: int | None = option(None, at_least=0, help="last layers that are averaged; none: the output layer")

    def __post_init__(self) -> None:
        check_options(self)

    def stays(self, parts: _sharing.Parts, num_params: int) -> Ranges:
        """All layers but the last; buffers belong to them."""
        first = _sharing.first_of_last(parts, self.shared_layers, "lg-fedavg.shared_layers")
        return ((0, first), (parts.num_trainable, num_params)) if first else ()

    def train(
        self, down: Float[Tensor, " S"], local: Float[Tensor, " P"], batches: Batches, task: Task
    ) -> tuple[Update, Float[Tensor, " P"]]:
        """Trains the client's own body and the received last layers together."""
        params = _sharing.completed(self, down, local, task)
        return _sharing.shared_reply(self, params, task.train(params, batches), task)

    init = _sharing.shared_draw
    send = _sharing.shared_to_everyone
    receive = _sharing.shared_average
    start = _sharing.keep_vector
    personal = _sharing.completed_model
    cost = _sharing.shared_cost
    describe = _sharing.one_shared_part
    mixing = _parts.no_mixing
