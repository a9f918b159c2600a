"""Pieces that several methods are put together from. No method imports another; all may import these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Batches, Cost, Draw, Federation, Task, Update
from fedmerge.core.sums import blocks, shares_of_examples, weighted_sum


@dataclass(frozen=True)
class Models:
    """Server state of the averaging methods.

    Attributes:
        models: [d, P] the server's models; d = 1 for methods with one.
        velocity: [d, T] server momentum of the trainable part.
    """

    models: Float[Tensor, "d P"]
    velocity: Float[Tensor, "d T"]


def fresh(models: Float[Tensor, "d P"], num_trainable: int) -> Models:
    """Models at rest."""
    return Models(models, torch.zeros_like(models[:, :num_trainable]))


def copies(state: Models, which: list[int]) -> Models:
    """The models of these numbers, each with its velocity."""
    return Models(state.models[which], state.velocity[which])


def noisy_draws(draw: Draw, count: int, num_trainable: int, noise: float) -> Float[Tensor, "d P"]:
    """The first draw `count` times, each with a share `noise` of a fresh draw on its trainable part."""
    models = draw(0).repeat(count, 1)
    fresh = torch.stack([draw(j + 1) for j in range(count)])
    models[:, :num_trainable] += noise * fresh[:, :num_trainable]
    return models


def moved(state: Models, step: Float[Tensor, "d P"], *, lr: float, momentum: float) -> Models:
    """Server step: V ← momentum·V + step, Θ ← Θ − lr·V, in float64 and back to the models' dtype.

    Buffers take `step` as it is: with momentum or a rate above 1 a running variance could fall below zero.
    """
    T = state.velocity.shape[1]
    models, velocity = torch.empty_like(state.models), torch.empty_like(state.velocity)
    for some in blocks(T):
        speed = momentum * state.velocity[:, some].double() + step[:, some]
        velocity[:, some] = speed
        models[:, some] = state.models[:, some].double() - lr * speed
    models[:, T:] = state.models[:, T:].double() - step[:, T:]
    return Models(models, velocity)


def refuse_more_than_clients(method: str, count: int | None, num_clients: int, what: str = "model") -> None:
    """Raises UsageError if `num_models` of a method, a number of `what`, is above the number of clients."""
    if count is not None and count > num_clients:
        raise UsageError(
            f"{method}.num_models: got {count} {what}s for {num_clients} clients; "
            f"expected at most one {what} per client"
        )


def one_draw(self: Any, draw: Draw, federation: Federation, seed: int) -> Models:
    """``init`` of a method with one model: the first draw."""
    return fresh(draw(0)[None], federation.num_trainable)


def federated_average(
    self: Any, state: Models, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
) -> Models:
    """``receive`` of FedAvg: Θ ← Θ − η Σ_i (n_i/Σn) g_i, with the method's `server_lr` and `server_momentum`."""
    share = shares_of_examples(num_examples)
    return averaged(state, share, update, lr=self.server_lr, momentum=self.server_momentum)


def averaged(
    state: Models, share: Float[Tensor, "C d"], update: Any, *, lr: float = 1.0, momentum: float = 0.0
) -> Models:
    """The models after each took the weighted sum of the updates, with weights `share`."""
    return moved(state, weighted_sum(share, update.delta), lr=lr, momentum=momentum)


def nothing_private(self: Any, params: Float[Tensor, " P"]) -> tuple[()]:
    """``start`` of a method whose clients keep nothing between rounds."""
    return ()


def as_received(self: Any, down: Tensor, local: Any, batches: Batches, task: Task) -> Tensor:
    """``personal`` of a method whose clients use the model that they receive."""
    return down


def no_mixing(self: Any, state: Any) -> None:
    """``mixing`` of a method with one model, or without server models."""


def one_model(self: Any, state: Models) -> dict[str, Any]:
    """``describe`` of a method with one model."""
    return {"num_models": len(state.models)}


def to_everyone(self: Any, state: Any, clients: Int[Tensor, " C"]) -> Float[Tensor, "C P"]:
    """``send`` of a method with one model, ``state.models`` [1, P]."""
    models: Tensor = state.models
    return models.expand(len(clients), -1)


def trained_update(params: Float[Tensor, " P"], batches: Batches, task: Task, *, pull: float = 0.0) -> Update:
    """Trains from `params` and reports before − after."""
    return Update(params - task.train(params, batches, pull=pull))


def one_vector_each_way(models: Float[Tensor, "d P"], *, server_floats: int, extra_up: int = 0) -> Cost:
    """Cost of a method that sends one vector down and one up."""
    size = models.shape[1] * models.element_size()
    return Cost(bytes_down=size, bytes_up=size + extra_up, server_floats=server_floats)


def averaging_cost(self: Any, state: Models) -> Cost:
    """``cost`` of the averaging methods; the velocity counts where there is momentum to keep it for."""
    kept = state.velocity.numel() if self.server_momentum else 0
    return one_vector_each_way(state.models, server_floats=state.models.numel() + kept)


def plain_training(
    self: Any, down: Float[Tensor, " P"], local: tuple[()], batches: Batches, task: Task
) -> tuple[Update, tuple[()]]:
    """``train`` of a method whose clients do what FedAvg's do."""
    return trained_update(down, batches, task), local


def pulled_training(
    self: Any, down: Float[Tensor, " P"], local: tuple[()], batches: Batches, task: Task
) -> tuple[Update, tuple[()]]:
    """Local training, pulled towards the received model by ``proximal · ‖θ − θ_received‖²``."""
    return trained_update(down, batches, task, pull=2 * self.proximal), local


class Own(NamedTuple):
    """What a client with a model of its own keeps.

    Attributes:
        model: [P] its model; without meaning before it first takes part.
        joined: [] whether it has taken part.
    """

    model: Tensor
    joined: Tensor


def nothing_own_yet(self: Any, params: Float[Tensor, " P"]) -> Own:
    """``start`` of a method whose clients begin their own model with the one they first receive."""
    return Own(params, params.new_zeros((), dtype=torch.bool))


def own_now(model: Float[Tensor, " P"], before: Own) -> Own:
    """The private state after a round."""
    return Own(model, torch.ones_like(before.joined))


def own_or_received(down: Float[Tensor, " P"], local: Own) -> Float[Tensor, " P"]:
    """The client's own model, or what it receives before it has one."""
    return torch.where(local.joined, local.model, down)


def own_model(self: Any, down: Float[Tensor, " P"], local: Own, batches: Batches, task: Task) -> Float[Tensor, " P"]:
    """``personal`` of a method whose clients use their own model."""
    return own_or_received(down, local)


def with_extra_passes(cost: Cost, passes: float) -> Cost:
    """The cost of a method that goes `passes` more times forward and backward over every training example."""
    return replace(cost, extra_forward=passes, extra_backward=passes)
