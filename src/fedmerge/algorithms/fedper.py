"""FedPer: a shared body, personal last layers (Arivazhagan et al., arXiv:1912.00818)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fedmerge.algorithms import _parts, _sharing
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Task, Update
from fedmerge.core.ranges import Ranges


@algorithm("fedper", citation="Arivazhagan et al., arXiv:1912.00818")
@dataclass(frozen=True)
class FedPer:
    """The last layers stay with their client, all others are averaged; each round trains both together.

    Sends the shared entries down and up; the server keeps those, clients keep their own last layers. With
    personal_layers = 0 it is FedAvg; with as many as the network has it is Local. Buffers are shared as long as the
    first layer is. Until a client first takes part, its last layers are those of the common first draw.
    """

    personal_layers: int | None = option(
        None, at_least=0, help="last layers that stay with the client; none: the output layer"
    )

    def __post_init__(self) -> None:
        check_options(self)

    def stays(self, parts: _sharing.Parts, num_params: int) -> Ranges:
        """The last layers; the buffers too where no layer is shared."""
        first = _sharing.first_of_last(parts, self.personal_layers, "fedper.personal_layers")
        return ((first, parts.num_trainable if first else num_params),)

    def train(
        self, down: Float[Tensor, " S"], local: Float[Tensor, " P"], batches: Batches, task: Task
    ) -> tuple[Update, Float[Tensor, " P"]]:
        """Trains the received body and the client's own last layers together."""
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
