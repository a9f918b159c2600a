"""FedBABU: only the body is trained together, under a random head (Oh et al., ICLR 2022, arXiv:2106.06042)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from fedmerge.algorithms import _parts, _sharing
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Task, Update
from fedmerge.core.ranges import Ranges, mask


@algorithm("fedbabu", citation="Oh et al., ICLR 2022, arXiv:2106.06042")
@dataclass(frozen=True)
class FedBabu:
    """Averages bodies that are trained under one random head, which never moves; a client fine-tunes what it uses.

    Sends the body down and up; the server keeps it, clients keep the common first head and nothing of their own. The
    model a client uses is fine-tuned for `finetune_epochs` passes of local SGD from the received body, whether it has
    taken part or not; 0 gives the one common model. The body's updates are FedAvg's on a network with a frozen head.
    """

    finetune_epochs: int = option(5, at_least=0, help="passes over the client's training data before its model is used")
    finetune_part: Literal["all", "head", "body"] = option("all", help="what these passes move")

    def __post_init__(self) -> None:
        check_options(self)

    def stays(self, parts: _sharing.Parts, num_params: int) -> Ranges:
        """The head."""
        _sharing.refuse_without_body(parts, "fedbabu")
        return (parts.head,)

    def train(
        self, down: Float[Tensor, " S"], local: Float[Tensor, " P"], batches: Batches, task: Task
    ) -> tuple[Update, Float[Tensor, " P"]]:
        """Trains the body under the fixed head."""
        params = _sharing.completed(self, down, local, task)
        after = _train_part("body", params, batches, task)
        return _sharing.shared_reply(self, params, after, task)[0], local

    def personal(
        self, down: Float[Tensor, " S"], local: Float[Tensor, " P"], batches: Batches, task: Task
    ) -> Float[Tensor, " P"]:
        """The common model after fine-tuning."""
        params = _sharing.completed(self, down, local, task)
        return _train_part(self.finetune_part, params, batches * self.finetune_epochs, task)

    init = _sharing.shared_draw
    send = _sharing.shared_to_everyone
    receive = _sharing.shared_average
    start = _sharing.keep_vector
    cost = _sharing.shared_cost
    describe = _sharing.one_shared_part
    mixing = _parts.no_mixing


def _train_part(
    part: Literal["all", "head", "body"], params: Float[Tensor, " P"], batches: Batches, task: Task
) -> Float[Tensor, " P"]:
    if part == "all":
        return task.train(params, batches)
    trainable = params[: task.layout.num_trainable]
    head = mask((task.layout.head,), trainable)
    moving = head if part == "head" else 1 - head
    return task.train(params, _sharing.only(batches, moving))
