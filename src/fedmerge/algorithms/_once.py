"""FedAvg for some rounds, then groups from the clients' updates, once, then FedAvg inside the groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _clusters, _parts
from fedmerge.core.protocol import Cost, Draw, Federation, Update

Grouping = Callable[[Float[Tensor, "n T"]], Int[Tensor, " n"]]
"""Group number, from 0, of each update."""


@dataclass(frozen=True)
class Groups:
    """Server state.

    Attributes:
        averages: One model before the groups are made, then one per group.
        assigned: [N] each client's group, −1 as long as it has none.
        progress: [N, T] each client's latest update of the trainable part; [0, T] once there are groups.
        heard: [N] how often each client replied.
        centres: [0, T], then [d, T] the mean direction of each group's updates when it was made.
        rounds: [] rounds so far.
        seed: [] for the grouping.
    """

    averages: _parts.Models
    assigned: Int[Tensor, " N"]
    progress: Float[Tensor, "kept T"]
    heard: Int[Tensor, " N"]
    centres: Float[Tensor, "groups T"]
    rounds: Int[Tensor, ""]
    seed: Int[Tensor, ""]


def begin(draw: Draw, federation: Federation, seed: int) -> Groups:
    """One model, nobody heard."""
    first, N = draw(0), federation.num_clients
    progress = torch.zeros(N, federation.num_trainable, dtype=first.dtype)
    unknown, heard = torch.full((N,), -1), torch.zeros(N, dtype=torch.int64)
    averages = _parts.fresh(first[None], federation.num_trainable)
    return Groups(averages, unknown, progress, heard, progress[:0], torch.tensor(0), torch.tensor(seed))


def with_reply(state: Groups, clients: Int[Tensor, " C"], update: Update) -> Groups:
    """The state with these updates noted; clients without a group join the most similar one if there are any."""
    steps, progress, assigned = update.delta[:, : state.progress.shape[1]], state.progress, state.assigned
    if len(state.centres):
        own = assigned[clients]
        found = torch.where(own >= 0, own, _clusters.most_alike(steps, state.centres))
        assigned = assigned.index_copy(0, clients, found)
    else:
        progress = progress.index_copy(0, clients, steps)
    heard = state.heard.index_add(0, clients, torch.ones_like(clients))
    return replace(state, assigned=assigned, progress=progress, heard=heard, rounds=state.rounds + 1)


def grouped(state: Groups, grouping: Grouping) -> Groups:
    """The state with everyone who was heard in a group, and a copy of the model for each group."""
    members = torch.nonzero(state.heard > 0)[:, 0]
    labels = grouping(state.progress[members])
    count = int(labels.max()) + 1
    centres = _clusters.mean_directions(state.progress[members], labels, count).to(state.progress.dtype)
    return replace(
        state,
        averages=_parts.copies(state.averages, [0] * count),
        assigned=state.assigned.index_copy(0, members, labels),
        progress=state.progress[:0],
        centres=centres,
    )


def averaged(
    state: Groups,
    clients: Int[Tensor, " C"],
    update: Update,
    num_examples: Int[Tensor, " C"],
    *,
    momentum: float,
) -> Groups:
    """FedAvg inside the groups, or over all as long as there are none."""
    labels = state.assigned[clients].clamp_min(0)
    step = _clusters.means_within(labels, len(state.averages.models), update.delta, num_examples)
    return replace(state, averages=_parts.moved(state.averages, step, lr=1.0, momentum=momentum))


def send(self: Any, state: Groups, clients: Int[Tensor, " C"]) -> Float[Tensor, "C P"]:
    """Each client its group's model."""
    return _clusters.received(state.averages.models, state.assigned, clients)


def cost(self: Any, state: Groups) -> Cost:
    """One vector each way; before there are groups the server keeps every client's update."""
    cost = _parts.averaging_cost(self, state.averages)
    return replace(cost, server_floats=cost.server_floats + state.progress.numel() + state.centres.numel())


def describe(self: Any, state: Groups) -> dict[str, Any]:
    """How many groups were made; 1 before."""
    return {"num_models": len(state.averages.models)}


def mixing(self: Any, state: Groups) -> Float[Tensor, "N d"]:
    """One-hot rows."""
    return _clusters.rows_of(state.assigned, len(state.averages.models))
