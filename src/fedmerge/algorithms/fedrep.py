"""FedRep: a shared representation under personal heads (Collins et al., ICML 2021, arXiv:2102.07078)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.algorithms import _parts, _sharing
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Task, Update
from fedmerge.core.ranges import Ranges, mask


@algorithm("fedrep", citation="Collins et al., ICML 2021, arXiv:2102.07078")
@dataclass(frozen=True)
class FedRep:
    """Each round fits the client's own head to the received body, then the body to that head; bodies are averaged.

    Sends the body down and up; the server keeps it, clients keep their heads. The paper gives the head many passes
    and the body one or a few; here both share the steps of one round, so that every method has the same budget. The
    head gets the first `head_share` of them, rounded to the nearest whole step. With nothing personal
    (personal_layers = 0, head_share = 0) it is FedAvg.
    """

    head_share: float = option(0.5, at_least=0, at_most=1, help="share of a round's steps that train the head alone")
    personal_layers: int | None = option(
        None, at_least=0, help="last layers that stay with the client; none: the output layer"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.personal_layers == 0 and self.head_share > 0:
            raise UsageError(
                f"FedRep.head_share: got {self.head_share} with personal_layers = 0, so those steps would train "
                "nothing; set head_share = 0 or keep a layer"
            )

    def stays(self, parts: _sharing.Parts, num_params: int) -> Ranges:
        """The last layers; the buffers too where no layer is shared."""
        first = _sharing.first_of_last(parts, self.personal_layers, "fedrep.personal_layers")
        return ((first, parts.num_trainable if first else num_params),)

    def train(
        self, down: Float[Tensor, " S"], local: Float[Tensor, " P"], batches: Batches, task: Task
    ) -> tuple[Update, Float[Tensor, " P"]]:
        """First the head with the body fixed, then the body with the head fixed."""
        params = _sharing.completed(self, down, local, task)
        trainable = params[: task.layout.num_trainable]
        head = mask(((self.stays(task.layout, len(params))[0][0], len(trainable)),), trainable)
        real_steps = torch.stack([batch.lr > 0 for batch in batches]).sum()  # padding comes last
        head_steps = torch.floor(self.head_share * real_steps.double() + 0.5)
        steps = [
            step
            for k, batch in enumerate(batches)
            for step in _sharing.only((batch,), torch.where(k < head_steps, head, 1 - head))
        ]
        return _sharing.shared_reply(self, params, task.train(params, tuple(steps)), task)

    init = _sharing.shared_draw
    send = _sharing.shared_to_everyone
    receive = _sharing.shared_average
    start = _sharing.keep_vector
    personal = _sharing.completed_model
    cost = _sharing.shared_cost
    describe = _sharing.one_shared_part
    mixing = _parts.no_mixing
