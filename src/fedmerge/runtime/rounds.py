"""One round, one evaluation, one fine-tuning, each over an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from fedmerge.core import completing
from fedmerge.core.ensemble import Personal, members, with_members
from fedmerge.core.errors import DivergedError
from fedmerge.core.protocol import Algorithm, Batches, Slope, Task, deliver, take, tree_bytes
from fedmerge.core.replies import (
    Expected,
    Refusal,
    Reply,
    Template,
    admit,
    check_of,
    named_tensors,
    stacked_updates,
    template_of,
)
from fedmerge.runtime.engines import Engine
from fedmerge.training.batches import Planned
from fedmerge.training.scores import Tally, tally

BufferPolicy = Literal["merge", "local", "recalibrate"]


@dataclass(frozen=True)
class BufferRules:
    """Whose buffers (BatchNorm statistics) a client's model has.

    Attributes:
        policy: ``merge`` averages them like parameters, ``local`` never sends them, ``recalibrate`` measures them on
            the client's training data before the model is used.
        num_trainable: T; entries T..P of a vector are buffers.
    """

    policy: BufferPolicy
    num_trainable: int

    def own_task(self, task: Task, buffers: Tensor) -> _OwnBuffers | None:
        """The task on a client's own buffers under policy ``local``; None where there are none to keep."""
        if self.policy != "local" or not len(buffers):
            return None
        return _OwnBuffers(task, buffers, self.num_trainable)


@dataclass(frozen=True)
class Fleet:
    """What the clients keep, apart from their data.

    Attributes:
        private: Each client's private state of the method, in client-id order.
        buffers: [N][P − T] each client's own buffers (BatchNorm statistics).
        policy: Whose buffers a client's model has, see `BufferRules`.
        num_trainable: T.
    """

    private: tuple[Any, ...]
    buffers: tuple[Tensor, ...]
    policy: BufferPolicy
    num_trainable: int

    @property
    def rules(self) -> BufferRules:
        """What becomes of buffers, without what the clients keep."""
        return BufferRules(self.policy, self.num_trainable)

    def own_buffers(self, model: Personal, client: int) -> Personal:
        """A model with the client's own buffers in place of its own, under policy ``local``."""
        own = self.buffers[client]
        if self.policy != "local" or not len(own):
            return model
        return with_members(model, [torch.cat([vector[: self.num_trainable], own]) for vector in members(model)])


def first_fleet(
    algorithm: Algorithm[Any], start: Tensor, num_clients: int, num_trainable: int, policy: BufferPolicy
) -> Fleet:
    """The clients before their first round: each keeps what the method starts with, and the buffers of `start` [P]."""
    return Fleet(
        private=(algorithm.start(start),) * num_clients,
        buffers=(start[num_trainable:],) * num_clients,
        policy=policy,
        num_trainable=num_trainable,
    )


@dataclass(frozen=True)
class Meeting:
    """Who takes part in a round and what becomes of the replies on their way.

    Attributes:
        cohort: [C] clients that were asked, ascending.
        trained: [K] those of them that train; the others have dropped out and send nothing.
        late: Those that answer after the deadline: their replies are refused.
        quorum: Replies that must be admitted, below which the round is abandoned.
        run: Identity of the run.
        number: Of the round, from 1.
        transit: What happens to the replies between clients and server: attackers change theirs, the network mixes the
            order. None: nothing.
    """

    cohort: Int[Tensor, " C"]
    trained: Int[Tensor, " K"]
    late: frozenset[int] = frozenset()
    quorum: int = 1
    run: str = ""
    number: int = 1
    transit: Callable[[Sequence[Reply]], Sequence[Reply]] | None = None


def everyone(cohort: Int[Tensor, " C"]) -> Meeting:
    """A round in which every client that was asked answers in time."""
    return Meeting(cohort, cohort)


@dataclass(frozen=True)
class RoundResult:
    """A round's outcome.

    Attributes:
        state: The server's; as before in an abandoned round.
        fleet: The clients'; those without an admitted reply are as before.
        bytes_down: To the whole cohort, as counted from the tensors sent.
        bytes_up: From those that trained.
        admitted: Clients whose replies counted, ascending.
        refusals: Of the others that arrived.
        abandoned: Whether there were too few replies.
    """

    state: Any
    fleet: Fleet
    bytes_down: int
    bytes_up: int
    admitted: tuple[int, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    abandoned: bool = False


def run_round(
    algorithm: Algorithm[Any],
    state: Any,
    fleet: Fleet,
    cohort: Int[Tensor, " C"] | Meeting,
    batches: Sequence[Batches | Planned],
    num_examples: Int[Tensor, " K"],
    engine: Engine,
) -> RoundResult:
    """Send → train → gate → receive.

    Args:
        algorithm: The method.
        state: The server's.
        fleet: The clients'.
        cohort: Client indices of this round, ascending, or more that is to be said of it.
        batches: Steps of each client that trains, drawn or to be drawn.
        num_examples: Training examples of each client that trains, its weight in averages.
        engine: Runs the clients.

    Raises:
        FedmergeError: if more than half of the replies hold NaN or infinite values: the training diverges.
    """
    meeting = cohort if isinstance(cohort, Meeting) else everyone(cohort)
    down = algorithm.send(state, meeting.cohort)
    bytes_down = tree_bytes(down)
    clients = meeting.trained.tolist()
    places = torch.searchsorted(meeting.cohort, meeting.trained).tolist()
    trained = engine.map(
        ClientRound(algorithm, fleet.rules),
        [
            (take(down, place), fleet.private[i], batches[k], fleet.buffers[i])
            for k, (place, i) in enumerate(zip(places, clients, strict=True))
        ],
    )
    if not trained:
        return unanswered(algorithm, RoundResult(state, fleet, bytes_down, 0), meeting.quorum)
    template = template_of(trained[0][0])  # made here, by the method's own code, and not by whoever may have changed it
    replies = [
        Reply(meeting.run, meeting.number, i, count, named_tensors(update))
        for i, count, (update, _, _) in zip(clients, num_examples.tolist(), trained, strict=True)
    ]
    arrived = replies if meeting.transit is None else meeting.transit(replies)
    asked = frozenset(meeting.cohort.tolist())
    expected = Expected(meeting.run, meeting.number, asked, template, meeting.late, further=check_of(algorithm))
    admission = admit(arrived, expected)
    refuse_divergence(admission.refusals, len(replies))
    kept = dict(zip(clients, ((own, buffers) for _, own, buffers in trained), strict=True))
    after = RoundResult(
        state,
        fleet,
        bytes_down,
        sum(tree_bytes(update) for update, _, _ in trained),
        tuple(reply.client for reply in admission.admitted),
        admission.refusals,
    )
    return _closed(algorithm, after, admission.admitted, template, kept, meeting.quorum)


def _closed(
    algorithm: Algorithm[Any],
    result: RoundResult,
    admitted: Sequence[Reply],
    template: Template,
    kept: Mapping[int, tuple[Any, Tensor]],
    quorum: int,
) -> RoundResult:
    """The round with what was admitted taken in; abandoned, with nothing changed, below the quorum."""
    if not admitted:
        return unanswered(algorithm, result, quorum)
    if len(admitted) < quorum:
        return replace(result, abandoned=True)
    clients = torch.tensor(result.admitted)
    counts = torch.tensor([reply.num_examples for reply in admitted])
    after = deliver(algorithm, result.state, clients, stacked_updates(admitted, template), counts)
    private, buffers = list(result.fleet.private), list(result.fleet.buffers)
    for i in result.admitted:
        private[i], buffers[i] = kept[i]
    return replace(result, state=after, fleet=replace(result.fleet, private=tuple(private), buffers=tuple(buffers)))


def unanswered(algorithm: Algorithm[Any], result: RoundResult, quorum: int) -> RoundResult:
    """A round that nobody answered: abandoned, unless the method says what becomes of it (``silence(state)``).

    A private method does, because that nobody took part must not show. A quorum of 1 is none.
    """
    silence = getattr(algorithm, "silence", None)
    if silence is None or quorum > 1:
        return replace(result, abandoned=True)
    return replace(result, state=silence(result.state))


def refuse_divergence(refusals: Sequence[Refusal], expected: int) -> None:
    """One client that sends NaN is left out; where most do, the training itself is at fault.

    Args:
        refusals: Of a round.
        expected: Replies of that round.

    Raises:
        DivergedError: naming the clients.
    """
    lost = sorted(refusal.client for refusal in refusals if refusal.reason == "values" and refusal.client is not None)
    if 2 * len(lost) > expected:
        raise DivergedError(
            f"clients {lost} sent NaN or infinite values: their training diverged; "
            "lower the learning rate (training.lr) or check their data"
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

    train = completing.train
    descend = completing.descend
    gradient = completing.gradient
    slope_through = completing.slope_through
    features = completing.features
    predict = completing.predict
    loss = completing.loss


@dataclass(frozen=True)
class ClientRound:
    """What a client does in a round. A plain value, so that it can be sent to other processes.

    Attributes:
        algorithm: The method.
        rules: What becomes of buffers.
    """

    algorithm: Algorithm[Any]
    rules: BufferRules

    def __call__(
        self, task: Task, received: Any, private: Any, steps: Batches, buffers: Tensor
    ) -> tuple[Any, Any, Tensor]:
        """One client's reply, its new private state, and the buffers it keeps."""
        own = self.rules.own_task(task, buffers)
        reply, private = self.algorithm.train(received, private, steps, own or task)
        return reply, private, own.buffers if own else buffers


@dataclass(frozen=True)
class ClientModel:
    """Which model a client would use now; a plain value like `ClientRound`."""

    algorithm: Algorithm[Any]
    rules: BufferRules

    def __call__(self, task: Task, received: Any, private: Any, batches: Batches, buffers: Tensor) -> Personal:
        """The client's model."""
        return self.algorithm.personal(received, private, batches, self.rules.own_task(task, buffers) or task)


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
    down = algorithm.send(state, torch.arange(len(train)))
    return models_received(algorithm, [take(down, i) for i in range(len(train))], fleet, train, engine)


def models_received(
    algorithm: Algorithm[Any], received: Sequence[Any], fleet: Fleet, train: Sequence[Batches], engine: Engine
) -> list[Personal]:
    """`personal_models` of clients that have received what the server sent.

    Args:
        algorithm: The method.
        received: Of each client, from ``send``.
        fleet: The clients'.
        train: One pass over each client's training examples.
        engine: Runs the clients.
    """
    models: list[Personal] = engine.map(
        ClientModel(algorithm, fleet.rules),
        list(zip(received, fleet.private, train, fleet.buffers, strict=True)),
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


def plain_training(task: Task, params: Tensor, steps: Batches) -> Tensor:
    """A client's vector after local training without any method."""
    return task.train(params, steps)


def finetuned(models: Sequence[Tensor], batches: Sequence[Batches | Planned], engine: Engine) -> list[Tensor]:
    """Each client's model after plain local training on its own examples."""
    return engine.map(plain_training, list(zip(models, batches, strict=True)))
