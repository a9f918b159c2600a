"""One round, one evaluation, one fine-tuning, each over an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from fedmerge.core import completing
from fedmerge.core.ensemble import Personal, members, with_members
from fedmerge.core.protocol import Algorithm, Batch, Batches, Slope, Task, deliver, stack, take, tree_bytes
from fedmerge.runtime.engines import Engine
from fedmerge.training.scores import Tally, tally

BufferPolicy = Literal["merge", "local", "recalibrate"]


@dataclass(frozen=True)
class Fleet:
    """What the clients keep, apart from their data.

    Attributes:
        private: Each client's private state of the method, in client-id order.
        buffers: [N][P − T] each client's own buffers (BatchNorm statistics).
        policy: Whose buffers a client's model has: ``merge`` averages them like parameters, ``local`` never sends
            them, ``recalibrate`` measures them on the client's training data before the model is used.
        num_trainable: T.
    """

    private: tuple[Any, ...]
    buffers: tuple[Tensor, ...]
    policy: BufferPolicy
    num_trainable: int

    def own_buffers(self, model: Personal, client: int) -> Personal:
        """A model with the client's own buffers in place of its own, under policy ``local``."""
        own = self.buffers[client]
        if self.policy != "local" or not len(own):
            return model
        return with_members(model, [torch.cat([vector[: self.num_trainable], own]) for vector in members(model)])

    def own_task(self, task: Task, buffers: Tensor) -> _OwnBuffers | None:
        """The task on a client's own buffers under policy ``local``; None where there are none to keep."""
        if self.policy != "local" or not len(buffers):
            return None
        return _OwnBuffers(task, buffers, self.num_trainable)


@dataclass(frozen=True)
class RoundResult:
    """A round's outcome.

    Attributes:
        state: The server's.
        fleet: The clients'.
        bytes_down: To the whole cohort, as counted from the tensors sent.
        bytes_up: From the whole cohort.
    """

    state: Any
    fleet: Fleet
    bytes_down: int
    bytes_up: int


def run_round(
    algorithm: Algorithm[Any],
    state: Any,
    fleet: Fleet,
    cohort: Int[Tensor, " C"],
    batches: Sequence[Batches],
    num_examples: Int[Tensor, " C"],
    engine: Engine,
) -> RoundResult:
    """Send → train → receive.

    Args:
        algorithm: The method.
        state: The server's.
        fleet: The clients'.
        cohort: Client indices of this round, ascending.
        batches: Each client's steps.
        num_examples: Training examples of each client, its weight in averages.
        engine: Runs the clients.
    """
    clients = cohort.tolist()
    down = algorithm.send(state, cohort)
    downs = [take(down, place) for place in range(len(clients))]
    trained = engine.map(
        lambda task, received, private, steps, buffers: _train(
            algorithm, fleet, task, received, private, steps, buffers
        ),
        [(downs[k], fleet.private[i], batches[k], fleet.buffers[i]) for k, i in enumerate(clients)],
    )
    update = stack([reply for reply, _, _ in trained])
    after = deliver(algorithm, state, cohort, update, num_examples)
    private, buffers = list(fleet.private), list(fleet.buffers)
    for i, (_, own, kept) in zip(clients, trained, strict=True):
        private[i], buffers[i] = own, kept
    return RoundResult(
        state=after,
        fleet=replace(fleet, private=tuple(private), buffers=tuple(buffers)),
        bytes_down=sum(tree_bytes(received) for received in downs),
        bytes_up=tree_bytes(update),
    )


class _OwnBuffers:
    """A task whose every pass reads and moves the client's own buffers; those of a vector it is given never change."""

    def __init__(self, task: Task, buffers: Tensor, num_trainable: int) -> None:
        self._task, self._num_trainable = task, num_trainable
        self.layout, self.losses, self.right = task.layout, task.losses, task.right
        self.buffers = buffers

    def _completed(self, params: Tensor) -> Tensor:
        return torch.cat([params[: self._num_trainable], self.buffers])

    def _noted(self, slope: Slope, params: Tensor) -> Slope:
        self.buffers = slope.buffers
        return slope._replace(buffers=params[self._num_trainable :])

    def descend(
        self,
        params: Tensor,
        batches: Batches,
        gradient: Callable[[Tensor, Batch], Slope],
        *,
        pull: float = 0.0,
        towards: Tensor | None = None,
    ) -> Tensor:
        """As of the task."""
        return self._task.descend(params, batches, gradient, pull=pull, towards=towards)

    def train(self, params: Tensor, batches: Batches, *, pull: float = 0.0, towards: Tensor | None = None) -> Tensor:
        """As of the task, on own buffers."""
        return self._task.descend(params, batches, self.gradient, pull=pull, towards=towards)

    gradient = completing.gradient
    slope_through = completing.slope_through
    features = completing.features
    predict = completing.predict
    loss = completing.loss


def _train(
    algorithm: Algorithm[Any], fleet: Fleet, task: Task, received: Any, private: Any, steps: Batches, buffers: Tensor
) -> tuple[Any, Any, Tensor]:
    """One client's reply, its new private state, and the buffers it keeps."""
    own = fleet.own_task(task, buffers)
    reply, private = algorithm.train(received, private, steps, own or task)
    return reply, private, own.buffers if own else buffers


def personal_models(
    algorithm: Algorithm[Any], state: Any, fleet: Fleet, train: Sequence[Batches], engine: Engine
) -> list[Personal]:
    """The model every client would use now, buffers included.

    Args:
        algorithm: The method.
        state: The server's.
        fleet: The clients'.
        train: One pass over each client's training examples.
        engine: Runs the clients.
    """
    everyone = torch.arange(len(train))
    down = algorithm.send(state, everyone)
    models: list[Personal] = engine.map(
        lambda task, received, private, batches, buffers: algorithm.personal(
            received, private, batches, fleet.own_task(task, buffers) or task
        ),
        [(take(down, i), fleet.private[i], train[i], fleet.buffers[i]) for i in range(len(train))],
    )
    if fleet.policy == "recalibrate" and len(fleet.buffers[0]):
        return _recalibrated(models, train, fleet.num_trainable, engine)
    return [fleet.own_buffers(model, i) for i, model in enumerate(models)]


def _recalibrated(
    models: Sequence[Personal], train: Sequence[Batches], num_trainable: int, engine: Engine
) -> list[Personal]:
    """The models with statistics measured on their clients' batches."""
    vectors = [(vector, steps) for model, steps in zip(models, train, strict=True) for vector in members(model)]
    measured = iter(engine.measured_buffers(vectors))
    return [
        with_members(model, [torch.cat([vector[:num_trainable], next(measured)]) for vector in members(model)])
        for model in models
    ]


def score(models: Sequence[Personal], batches: Sequence[Batches], engine: Engine) -> list[Tally]:
    """Right answers and loss of each client's model on its own examples; a client without examples counts 0."""
    with_examples = [i for i, steps in enumerate(batches) if steps]
    found = engine.map(tally, [(models[i], batches[i]) for i in with_examples])
    nothing = torch.zeros((), dtype=torch.float64)
    tallies = [Tally(nothing, nothing, nothing)] * len(models)
    for i, result in zip(with_examples, found, strict=True):
        tallies[i] = result
    return tallies


def finetuned(models: Sequence[Tensor], batches: Sequence[Batches], engine: Engine) -> list[Tensor]:
    """Each client's model after plain local training on its own examples."""
    return engine.map(lambda task, params, steps: task.train(params, steps), list(zip(models, batches, strict=True)))
