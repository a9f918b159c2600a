"""Which entries of the vector travel and which stay with their client, for methods that share a part of the network.

A method says what stays by ``stays(parts, num_params)``; everything else travels, and nothing else is counted. A
client keeps a whole vector [P] whose travelling entries are replaced by what it receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Batches, Cost, Draw, Federation, Task, Update
from fedmerge.core.ranges import Ranges, gathered, placed, rest
from fedmerge.core.sums import shares_of_examples, weighted_sum
from fedmerge.core.vector import Layout

Parts: TypeAlias = Federation | Layout
"""What the server and what a client knows of the vector: both have `num_trainable`, `head`, `layers` and `norms`."""


@runtime_checkable
class Sharing(Protocol):
    """A method that shares a part."""

    def stays(self, parts: Parts, num_params: int) -> Ranges:
        """The entries that never leave a client."""
        ...


@dataclass(frozen=True)
class Shared:
    """Server state.

    Attributes:
        values: [S] the travelling entries, in vector order.
    """

    values: Float[Tensor, " S"]


# ---------------------------------------------------------------- which entries


def first_of_last(parts: Parts, count: int | None, name: str) -> int:
    """Where the last `count` layers begin; the head for None.

    Raises:
        UsageError: if there are fewer layers, or if the head is asked for and there is nothing before it.
    """
    if count is None:
        refuse_without_body(parts, name)
        return parts.head[0]
    if count > len(parts.layers):
        raise UsageError(f"{name}: got {count} layers; this network has {len(parts.layers)}")
    return parts.layers[-count][0] if count else parts.num_trainable


def refuse_without_body(parts: Parts, name: str) -> None:
    """Raises UsageError where the output layer is the whole network, or no part of what the method sees."""
    if parts.head[0] == parts.head[1]:
        raise UsageError(f"{name}: the clients keep the output layer already (run option `keep`); use method fedavg")
    if parts.head[0] == 0:
        raise UsageError(
            f"{name}: the network, or what clients do not keep of it, is an output layer and nothing else; "
            "expected layers before it; use a deeper network, or method fedavg or local"
        )


def travels(method: Sharing, parts: Parts, num_params: int) -> Ranges:
    """The entries that are sent."""
    return rest(method.stays(parts, num_params), num_params)


# ---------------------------------------------------------------- server


def shared_draw(self: Any, draw: Draw, federation: Federation, seed: int) -> Shared:
    """``init``: the travelling part of the first draw."""
    params = draw(0)
    return Shared(gathered(params, travels(self, federation, len(params))))


def shared_to_everyone(self: Any, state: Shared, clients: Int[Tensor, " C"]) -> Float[Tensor, "C S"]:
    """``send``: the travelling part."""
    return state.values.expand(len(clients), -1)


def shared_average(
    self: Any, state: Shared, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
) -> Shared:
    """``receive`` of FedAvg on the travelling part."""
    step = weighted_sum(shares_of_examples(num_examples), update.delta)[0]
    return Shared((state.values.double() - step).to(state.values.dtype))


def shared_cost(self: Any, state: Shared) -> Cost:
    """``cost``: the travelling part each way."""
    size = state.values.numel() * state.values.element_size()
    return Cost(bytes_down=size, bytes_up=size, server_floats=state.values.numel())


def one_shared_part(self: Any, state: Shared) -> dict[str, Any]:
    """``describe``: one model, and how much of it is shared."""
    return {"num_models": 1, "shared_numbers": state.values.numel()}


# ---------------------------------------------------------------- client


def keep_vector(self: Any, params: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """``start``: the common first draw."""
    return params


def completed(self: Any, down: Float[Tensor, " S"], local: Float[Tensor, " P"], task: Task) -> Float[Tensor, " P"]:
    """The received part with the client's own rest."""
    return placed(local, down, travels(self, task.layout, len(local)))


def completed_model(
    self: Any, down: Float[Tensor, " S"], local: Float[Tensor, " P"], batches: Batches, task: Task
) -> Float[Tensor, " P"]:
    """``personal``: the received part with the client's own rest."""
    return completed(self, down, local, task)


def shared_reply(
    self: Any, before: Float[Tensor, " P"], after: Float[Tensor, " P"], task: Task
) -> tuple[Update, Float[Tensor, " P"]]:
    """What a client sends after training, and what it keeps."""
    return Update(gathered(before - after, travels(self, task.layout, len(before)))), after


def only(batches: Batches, moving: Float[Tensor, " T"]) -> Batches:
    """Steps that move only the entries where `moving` is 1: the rate of all others is 0."""
    return tuple(batch._replace(lr=batch.lr * moving) for batch in batches)
