"""FedBN: normalisation layers stay with their client (Li et al., ICLR 2021, arXiv:2102.07623)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fedmerge.algorithms import _parts, _sharing
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.protocol import Batches, Task, Update
from fedmerge.core.ranges import Ranges


@algorithm("fedbn", citation="Li et al., ICLR 2021, arXiv:2102.07623")
@dataclass(frozen=True)
class FedBn:
    """FedAvg that never sends what belongs to normalisation layers: neither their parameters nor any buffer.

    Sends the rest down and up; the server keeps that, clients keep their normalisation layers. The paper has
    BatchNorm; GroupNorm, LayerNorm and InstanceNorm stay here too. Without such layers it is FedAvg. Under the buffer
    policy ``local`` the statistics stay as well, but not the scale and shift.
    """

    def stays(self, parts: _sharing.Parts, num_params: int) -> Ranges:
        """Parameters of normalisation layers, and the buffers."""
        return (*sorted(parts.norms), (parts.num_trainable, num_params))

    def train(
        self, down: Float[Tensor, " S"], local: Float[Tensor, " P"], batches: Batches, task: Task
    ) -> tuple[Update, Float[Tensor, " P"]]:
        """Trains everything."""
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
