"""Two ways to apply a client function to many clients; the function never sees the client axis.

`Sequential` is the reference and runs any module. `Vectorised` stacks clients and maps with ``torch.func.vmap``:
much cheaper for small networks, equal to rounding error in float64 (tested for every registered method).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils.rnn import pad_sequence

from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Batch, Batches, stack, take
from fedmerge.core.vector import Layout
from fedmerge.runtime.place import HERE, Place
from fedmerge.training.batches import Planned, drawn_together, step_sizes
from fedmerge.training.folded.fold import Finish, why_not
from fedmerge.training.folded.task import FoldedTask
from fedmerge.training.objective import CLASSES, Objective
from fedmerge.training.private import ExampleGradients, protected_task, refuse_protected
from fedmerge.training.sgd import Descent
from fedmerge.training.task import (
    FunctionalTask,
    ModuleTask,
    has_dropout,
    is_batch_coupled,
    measured_buffers,
    measuring_twin,
)

log = logging.getLogger(__name__)

_CHUNK_NUMBERS = 1 << 20
"""Parameters of all clients of a chunk together; measured on perceptrons of 7,000 and 51,000 parameters."""

ClientFunction = Callable[..., Any]
"""``function(task, *arguments)`` of one client; arguments are trees of tensors or steps (`Batches`, `Planned`).

Steps that are planned are drawn by the engine when it comes to the client, so that they never lie in memory for all.
"""


@runtime_checkable
class Engine(Protocol):
    """Applies a client function to every client."""

    def map(self, function: ClientFunction, clients: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One result per client, in order.

        Args:
            function: Pure in its tensors.
            clients: The arguments of each client after the task.
        """
        ...

    def measured_buffers(self, clients: Sequence[tuple[Tensor, Batches]]) -> list[Tensor]:
        """BatchNorm statistics [P − T] of each client's vector on its batches."""
        ...


class Sequential:
    """One client after another on one reused module.

    Args:
        module: The network.
        layout: Of the module.
        descent: The local optimiser.
        objective: What outputs are held against.
        place: Where clients are computed.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        descent: Descent,
        *,
        objective: Objective = CLASSES,
        place: Place = HERE,
    ) -> None:
        module, self._place = _moved(module, place), place
        self._task = ModuleTask(module, layout, descent, objective=objective)
        self._twin = self._task
        self._of_examples = cache(lambda: ExampleGradients(module, layout, objective))  # made if one asks for it
        if is_batch_coupled(module):
            self._twin = ModuleTask(measuring_twin(module), layout, descent, objective=objective)

    def map(self, function: ClientFunction, clients: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls `function` client by client; the task of a client whose examples are protected is a `PrivateTask`."""
        with self._place.computing():
            return [self._of_client(function, arguments) for arguments in clients]

    def _of_client(self, function: ClientFunction, arguments: tuple[Any, ...]) -> Any:
        arguments = _with_drawn(self._place.there(arguments))
        task = protected_task(self._task, self._of_examples, arguments)
        return self._place.back(function(task, *arguments))

    def measured_buffers(self, clients: Sequence[tuple[Tensor, Batches]]) -> list[Tensor]:
        """Statistics of each client's own batches."""
        there = (self._place.there(arguments) for arguments in clients)
        with self._place.computing():
            return [self._place.back(measured_buffers(self._twin.gradient, *arguments)) for arguments in there]


class Vectorised:
    """Many clients at once.

    Clients of unequal size are sorted into chunks and padded with examples of weight 0 and steps of learning rate 0.
    Networks with BatchNorm cannot be padded: there, only clients with equally many examples share a chunk. Other
    layers that look across a batch are not recognised; use `Sequential` for them.

    Args:
        module: The network; without dropout.
        layout: Of the module.
        descent: The local optimiser.
        objective: What outputs are held against.
        most: Clients in one chunk at most; by default 16 to 64, so that their vectors stay near the processor's caches.
            Where memory does not suffice, chunks are halved.
        place: Where clients are computed.

    Raises:
        UsageError: for a network with dropout, whose draws would differ from the sequential ones.
    """

    name = "vectorised"

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        descent: Descent,
        *,
        objective: Objective = CLASSES,
        most: int | None = None,
        place: Place = HERE,
    ) -> None:
        self._refuse(module, layout)
        module, self._place = _moved(module, place), place
        self._task = self._made(module, layout, descent, objective)
        self._paddable, self._twin = not is_batch_coupled(module), self._task
        if not self._paddable:
            self._twin = self._made(measuring_twin(module), layout, descent, objective)
        self._most = most or max(16, min(64, _CHUNK_NUMBERS // layout.num_params))

    def _made(self, module: nn.Module, layout: Layout, descent: Descent, objective: Objective) -> FunctionalTask:
        return FunctionalTask(module, layout, descent, objective=objective)

    def _refuse(self, module: nn.Module, layout: Layout) -> None:
        """Raises UsageError for a network that cannot run here."""
        del layout
        if has_dropout(module):
            raise UsageError(
                f"runtime {self.name!r} cannot reproduce dropout (every client would draw another mask than alone); "
                "use runtime 'sequential'"
            )

    def map(self, function: ClientFunction, clients: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Maps `function` over chunks of clients."""
        return self._mapped(self._task, function, clients)

    def _mapped(self, task: FunctionalTask, function: ClientFunction, clients: Sequence[tuple[Any, ...]]) -> list[Any]:
        results: list[Any] = [None] * len(clients)
        with self._place.computing():
            for chunk in self.chunks(clients):
                for part, outputs in self._of_chunk(task, function, clients, chunk):
                    for k, i in enumerate(part):
                        results[i] = take(outputs, k)
        return results

    def _of_chunk(
        self, task: FunctionalTask, function: ClientFunction, clients: Sequence[tuple[Any, ...]], chunk: list[int]
    ) -> Iterator[tuple[list[int], Any]]:
        """Which clients ran together, and what they gave; both halves of a chunk for which memory does not suffice."""
        try:
            stacked = self._place.there(_stacked([self._place.with_examples(clients[i]) for i in chunk]))
            outputs = self._place.back(vmap(lambda arguments: function(task, *arguments))(stacked))
        except torch.cuda.OutOfMemoryError:
            if len(chunk) == 1:
                raise
            outputs = None  # what it holds is given back before the halves begin
        if outputs is not None:
            yield chunk, outputs
            return
        half = self._most = len(chunk) // 2
        log.warning("memory does not suffice for %d clients at once; going on with %d", len(chunk), half)
        for part in (chunk[:half], chunk[half:]):
            yield from self._of_chunk(task, function, clients, part)

    def measured_buffers(self, clients: Sequence[tuple[Tensor, Batches]]) -> list[Tensor]:
        """Statistics of each client's own batches."""
        return self._mapped(
            self._twin, lambda task, params, batches: measured_buffers(task.gradient, params, batches), clients
        )

    def chunks(self, clients: Sequence[tuple[Any, ...]]) -> Iterator[list[int]]:
        """Client indices that run together: alike in number of examples, `most` at a time."""
        sizes = [tuple(_sizes(arguments)) for arguments in clients]
        order = sorted(range(len(clients)), key=lambda i: (sum(sizes[i]), sizes[i], i))
        chunk: list[int] = []
        for i in order:
            if chunk and (len(chunk) == self._most or not self._fits(sizes[chunk[0]], sizes[i])):
                yield chunk
                chunk = []
            chunk.append(i)
        if chunk:
            yield chunk

    def _fits(self, smallest: tuple[int, ...], size: tuple[int, ...]) -> bool:
        """At most twice the examples of the smallest of the chunk, about, where padding is possible at all.

        Measured on 50 clients of 5 to 207 examples and a perceptron of 6,000 parameters: a bound of 1.25 takes 1.4 ×
        the time of 2, a bound of 3 takes 1.06 ×.
        """
        return sum(size) <= 2 * sum(smallest) + 32 if self._paddable else size == smallest


class Folded(Vectorised):
    """Many clients at once in one network whose layers do the work of all of them (see `training.folded`).

    Args:
        module: The network; without dropout, and with all its travelling tensors in layers that can be folded.
        layout: Of the module.
        descent: The local optimiser.
        objective: What outputs are held against.
        most: Clients in one chunk at most; as for `Vectorised` by default.
        place: Where clients are computed.
        finish: What is made of each folded network, for example one with compiled kernels.

    Raises:
        UsageError: for a network that cannot be folded, with the reason.
    """

    name = "folded"

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        descent: Descent,
        *,
        objective: Objective = CLASSES,
        most: int | None = None,
        place: Place = HERE,
        finish: Finish | None = None,
    ) -> None:
        self._finish = finish
        super().__init__(module, layout, descent, objective=objective, most=most, place=place)

    def _made(self, module: nn.Module, layout: Layout, descent: Descent, objective: Objective) -> FunctionalTask:
        return FoldedTask(module, layout, descent, objective=objective, finish=self._finish)

    def _refuse(self, module: nn.Module, layout: Layout) -> None:
        super()._refuse(module, layout)
        reason = why_not(module, layout)
        if reason is not None:
            raise UsageError(
                f"runtime 'folded' cannot run {type(module).__name__}: {reason}; use runtime 'auto' or 'sequential'"
            )


def _moved(module: nn.Module, place: Place) -> nn.Module:
    """The module itself, or a copy where clients are computed."""
    return module if place.is_here else copy.deepcopy(module).to(place.device)


def _are_batches(argument: Any) -> bool:
    return isinstance(argument, tuple) and len(argument) > 0 and isinstance(argument[0], Batch)


def _with_drawn(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with planned steps drawn."""
    return tuple(argument.drawn() if isinstance(argument, Planned) else argument for argument in arguments)


def _sizes(arguments: tuple[Any, ...]) -> Iterator[int]:
    for argument in arguments:
        if isinstance(argument, Planned) or _are_batches(argument):
            yield from step_sizes(argument)


def _stacked(clients: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The arguments with a leading client axis; steps are drawn, and padded to one shape."""
    refuse_protected(clients)
    return tuple(_column(column) for column in zip(*clients, strict=True))


def _column(column: Sequence[Any]) -> Any:
    """One argument of all clients."""
    if isinstance(column[0], Planned):
        return drawn_together(column)
    return _padded(column) if _are_batches(column[0]) else stack(column)


def _padded(column: Sequence[Batches]) -> Batches:
    """Batches of all clients side by side: examples of weight 0 and steps of rate 0 make up for what some lack."""
    steps = max(len(batches) for batches in column)
    return tuple(
        _side_by_side([batches[s] if s < len(batches) else _empty(batches[0]) for batches in column])
        for s in range(steps)
    )


def _side_by_side(batches: Sequence[Batch]) -> Batch:
    return Batch(
        pad_sequence([batch.inputs for batch in batches], batch_first=True),
        pad_sequence([batch.targets for batch in batches], batch_first=True),
        pad_sequence([batch.weight for batch in batches], batch_first=True),
        torch.stack([batch.lr for batch in batches]),
    )


def _empty(batch: Batch) -> Batch:
    """A step without examples whose learning rate is 0."""
    return Batch(batch.inputs[:0], batch.targets[:0], batch.weight[:0], torch.zeros_like(batch.lr))
