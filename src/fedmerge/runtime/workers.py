"""The clients of one call on several workers: processes of this machine, or actors of a Ray cluster.

Numbers do not depend on it. Clients that an engine computes together stay together, whoever gets them, and results are
put in client order; who was faster decides only who gets the next clients.
"""

from __future__ import annotations

import logging
import time
import traceback
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.protocol import Batch, Batches
from fedmerge.runtime.engines import ClientFunction, Engine
from fedmerge.runtime.parcels import Known, Packed, pack
from fedmerge.training.batches import Planned, step_sizes

log = logging.getLogger(__name__)

_PIECES = 8
"""Pieces of a call for each worker: small ones even out what differs in speed, each costs a message."""
_AT_HAND = 2
"""Pieces that a worker has at most: one that it computes, and the next."""
MOST_DEATHS = 3
"""Times that the same clients may take a worker with them."""
_PATIENCE = 2
"""Calls of a function in a row that may lose time by being spread; the first one starts the workers."""
_NAMED = 10


@dataclass(frozen=True)
class Job:
    """What a worker computes in one piece.

    Attributes:
        function: Of each client; None for the engine's `measured_buffers`.
        groups: The arguments of clients that are computed together.
    """

    function: ClientFunction | None
    groups: tuple[tuple[tuple[Any, ...], ...], ...]


@dataclass(frozen=True)
class Done:
    """What a job gave.

    Attributes:
        results: Of its clients, one group after another.
        seconds: That it took.
    """

    results: list[Any]
    seconds: float


@dataclass(frozen=True)
class Failure:
    """An exception in place of a job's results.

    Attributes:
        group: Which of the job's groups raised it; None if no group did.
        error: The exception.
        trace: Where it happened.
    """

    group: int | None
    error: Exception
    trace: str


@dataclass(frozen=True)
class Death:
    """A worker is gone and with it whatever it had at hand.

    Attributes:
        reason: For example ``signal 9 (SIGKILL)``.
    """

    reason: str


def run_job(engine: Engine, job: Job) -> Done | Failure:
    """Computes a job; what a worker does.

    Args:
        engine: The worker's own.
        job: What to compute.
    """
    results: list[list[Any]] = []
    drawn, began = torch.get_rng_state(), time.perf_counter()
    try:
        for group in job.groups:
            results.append(run_clients(engine, job.function, group))  # noqa: PERF401 - tells which group it was
    except Exception as error:
        return Failure(len(results), portable(error), traceback.format_exc())
    if not torch.equal(drawn, torch.get_rng_state()):
        return Failure(None, UsageError(DRAWS), "")
    return Done([result for group in results for result in group], time.perf_counter() - began)


def portable(error: Exception) -> Exception:
    """The exception, or one of the nearest kind it is of that can be made again from its message alone."""
    found = (_made(kind, error.args) for kind in type(error).__mro__)
    again = next(each for each in found if each is not None)
    return error if type(again) is type(error) else again


def _made(kind: Any, args: tuple[Any, ...]) -> Exception | None:
    with suppress(Exception):  # an exception may ask for anything
        made = kind(*args)
        return made if made.args == args else None
    return None


DRAWS = (
    "workers: the network draws random numbers in training (dropout and the like), which would differ from those of "
    "one process; leave workers out"
)


def run_clients(engine: Engine, function: ClientFunction | None, clients: Sequence[Any]) -> list[Any]:
    """Results of a function, or of measuring buffers if there is none."""
    return engine.measured_buffers(clients) if function is None else engine.map(function, clients)


def packed_outcome(outcome: Done | Failure, known: Known) -> Packed:
    """A job's outcome for the way back; an exception that cannot be sent goes as its text in one of ours."""
    try:
        return pack(outcome, known)
    except TypeError:
        if not isinstance(outcome, Failure):
            raise
    told = FedmergeError(f"{type(outcome.error).__name__}: {outcome.error}")
    return pack(replace(outcome, error=told), known)


@runtime_checkable
class Crew(Protocol):
    """Workers that may end at any time. They are started when they get something to do.

    Attributes:
        size: How many there are.
    """

    size: int

    def send(self, worker: int, job: Job) -> None:
        """Hands a job to one of the workers, which computes what it gets in that order."""
        ...

    def events(self) -> Iterable[tuple[int, Done | Failure | Death]]:
        """Waits until a worker has computed its first job at hand or is gone."""
        ...

    def close(self) -> None:
        """Ends all workers; the next job starts new ones."""
        ...

    def processes(self) -> list[int]:
        """Process ids of those that run on this machine as children of this process."""
        ...


@dataclass(frozen=True)
class _Piece:
    """Groups of clients that go to a worker together.

    Attributes:
        groups: Places of the clients in the call.
        deaths: How many workers they have taken with them, one after another.
    """

    groups: tuple[tuple[int, ...], ...]
    deaths: int = 0

    @property
    def places(self) -> list[int]:
        return [place for group in self.groups for place in group]

    def singly(self) -> list[_Piece]:
        """Each group for itself after a death, so that the one at fault takes no other with it again."""
        return [_Piece((group,), self.deaths + 1) for group in self.groups]


@dataclass
class _Call:
    """A call as it goes.

    Attributes:
        function: As for `Job`.
        clients: The arguments of each.
        waiting: What nobody has got.
        at_hand: What each worker has got, in order.
        results: One per client, as far as they are there.
        seconds: That workers computed, all together.
    """

    function: ClientFunction | None
    clients: Sequence[tuple[Any, ...]]
    waiting: deque[_Piece]
    at_hand: list[deque[_Piece]]
    results: list[Any] = field(default_factory=list)
    seconds: float = 0.0

    def job(self, piece: _Piece) -> Job:
        return Job(self.function, tuple(tuple(self.clients[place] for place in group) for group in piece.groups))


class Workers:
    """An engine whose clients are spread over a crew.

    A worker that dies is replaced and its clients are run again; an exception of a client ends the call. Computed here
    are calls that cannot be divided, and functions that workers were no help with: twice they computed for a shorter
    time, all together, than the call took. That may depend on the machine's mood, because the numbers do not.

    Args:
        inner: The engine of this process; every worker has one like it.
        crew: The workers.
    """

    def __init__(self, inner: Engine, crew: Crew) -> None:
        self.inner, self._crew = inner, crew
        self._lost: Counter[str] = Counter()
        weakref.finalize(self, crew.close)

    def map(self, function: ClientFunction, clients: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One result per client, in order: those of the inner engine, bit for bit.

        Raises:
            FedmergeError: if a client's function raises one, or clients took several workers with them.
        """
        return self._spread(function, clients)

    def measured_buffers(self, clients: Sequence[tuple[Tensor, Batches]]) -> list[Tensor]:
        """Statistics of each client's own batches."""
        return self._spread(None, clients)

    def close(self) -> None:
        """Ends the workers; a later call starts them again."""
        self._crew.close()

    def processes(self) -> list[int]:
        """Process ids of the workers on this machine, as far as they are started."""
        return self._crew.processes()

    def _spread(self, function: ClientFunction | None, clients: Sequence[tuple[Any, ...]]) -> list[Any]:
        groups, name = _groups(self.inner, clients), _name_of(function)
        if len(groups) < 2 or self._lost[name] >= _PATIENCE:
            return run_clients(self.inner, function, clients)
        pieces = _cut(groups, [sum(_work(clients[place]) for place in group) for group in groups], self._crew.size)
        idle: list[deque[_Piece]] = [deque() for _ in range(self._crew.size)]
        call = _Call(function, clients, deque(pieces), idle, [None] * len(clients))
        began = time.perf_counter()
        try:
            self._run(call)
        except BaseException:
            self._crew.close()  # whatever they compute now, nobody waits for it any more
            raise
        if call.seconds < time.perf_counter() - began:
            self._lost[name] += 1
        else:
            del self._lost[name]
        return call.results

    def _run(self, call: _Call) -> None:
        while True:
            self._hand_out(call)
            if not any(call.at_hand):
                return
            for worker, outcome in self._crew.events():
                _take_in(call, worker, outcome)

    def _hand_out(self, call: _Call) -> None:
        """One piece to everyone who has none, then a second one as long as there are many."""
        for most in range(1, _AT_HAND + 1):
            for worker, own in enumerate(call.at_hand):
                if len(own) < most and len(call.waiting) > (most - 1) * len(call.at_hand):
                    own.append(call.waiting.popleft())
                    self._crew.send(worker, call.job(own[-1]))


def _name_of(function: ClientFunction | None) -> str:
    """Of the function, or of its type where it is a value with options."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _take_in(call: _Call, worker: int, outcome: Done | Failure | Death) -> None:
    own = call.at_hand[worker]
    if isinstance(outcome, Failure):
        raise _raised(outcome, call, own[0]) from _Elsewhere(outcome.trace)
    if isinstance(outcome, Death):
        _mourn(call, own, outcome)
        return
    call.seconds += outcome.seconds
    for place, result in zip(own.popleft().places, outcome.results, strict=True):
        call.results[place] = result


def _mourn(call: _Call, own: deque[_Piece], death: Death) -> None:
    """Puts back what a dead worker had at hand; what it computed is charged with the death."""
    if not own:
        return
    again = own[0].singly()
    who = _names(call.clients, own[0].places)
    if again[0].deaths >= MOST_DEATHS:
        raise FedmergeError(
            f"{who}: their worker died {MOST_DEATHS} times in a row while it computed them, last by {death.reason}; "
            "is memory short? Try fewer workers, or workers=1 to see the fault itself"
        )
    log.warning("a worker died by %s; %s and what else it had at hand are run again", death.reason, who)
    call.waiting.extendleft(reversed([*again, *list(own)[1:]]))
    own.clear()


class _Elsewhere(Exception):  # noqa: N818 - shown as the cause of an error, never raised
    """An exception as it was told in the worker."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _raised(failure: Failure, call: _Call, piece: _Piece) -> Exception:
    """The exception of a worker; one of ours says at which client it happened."""
    error = failure.error
    if failure.group is not None and isinstance(error, FedmergeError) and error.args:
        who = _names(call.clients, piece.groups[failure.group])
        error.args = (f"{error.args[0]} (at {who})", *error.args[1:])
    return error


def _names(clients: Sequence[tuple[Any, ...]], places: Sequence[int]) -> str:
    """Clients by their number in the federation where their steps tell it, else by their place in the call."""
    numbers = [
        next((argument.client for argument in clients[place] if isinstance(argument, Planned)), place)
        for place in places
    ]
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"client{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:_NAMED]))}{more}"


def _groups(engine: Engine, clients: Sequence[tuple[Any, ...]]) -> list[tuple[int, ...]]:
    """Places of clients that the engine computes together: its `chunks`, if it has such, else every one alone."""
    chunks = getattr(engine, "chunks", None)
    if chunks is None:
        return [(place,) for place in range(len(clients))]
    return [tuple(chunk) for chunk in chunks(clients)]


def _work(arguments: tuple[Any, ...]) -> int:
    """Examples that a client goes through, and one for whatever else it does."""
    return 1 + sum(sum(step_sizes(argument)) for argument in arguments if _are_steps(argument))


def _are_steps(argument: Any) -> bool:
    return isinstance(argument, Planned) or (
        isinstance(argument, tuple) and len(argument) > 0 and isinstance(argument[0], Batch)
    )


def _cut(groups: Sequence[tuple[int, ...]], work: Sequence[int], workers: int) -> list[_Piece]:
    """Pieces of about equal work, those with the largest groups first."""
    most = sum(work) / (_PIECES * workers)
    pieces: list[_Piece] = []
    room = 0.0
    for number in sorted(range(len(groups)), key=lambda number: -work[number]):
        if pieces and work[number] <= room:
            pieces[-1] = replace(pieces[-1], groups=(*pieces[-1].groups, groups[number]))
        else:
            pieces.append(_Piece((groups[number],)))
            room = most
        room -= work[number]
    return pieces
