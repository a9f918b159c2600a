"""CFL: clustered federated learning by splitting in two (Sattler et al., TNNLS 2020, arXiv:1910.01991)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.algorithms import _clusters, _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Cost, Draw, Federation, Update
from fedmerge.core.structure import directions, groups_of
from fedmerge.core.sums import inner_products

Linkage = Literal["complete", "single"]


@dataclass(frozen=True)
class Splits:
    """Server state.

    Attributes:
        averages: One model per cluster; d grows.
        assigned: [N] each client's cluster, −1 before its first reply.
        progress: [N, T] each client's update of the trainable part, averaged over its last replies.
        rounds: [] rounds so far.
        reach: [] length of the longest update of the first round.
    """

    averages: _parts.Models
    assigned: Int[Tensor, " N"]
    progress: Float[Tensor, "N T"]
    rounds: Int[Tensor, ""]
    reach: Float[Tensor, ""]


def _init(self: Any, draw: Draw, federation: Federation, seed: int) -> Splits:
    """One model for all."""
    first, N = draw(0), federation.num_clients
    progress = torch.zeros(N, federation.num_trainable, dtype=first.dtype)
    reach = torch.zeros((), dtype=torch.float64)
    averages = _parts.fresh(first[None], federation.num_trainable)
    return Splits(averages, torch.full((N,), -1), progress, torch.tensor(0), reach)


def _send(self: Any, state: Splits, clients: Int[Tensor, " C"]) -> Float[Tensor, "C P"]:
    """Each client its cluster's model."""
    return _clusters.received(state.averages.models, state.assigned, clients)


def _receive(
    self: Any, state: Splits, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
) -> Splits:
    """FedAvg inside the clusters, then splits those that have come to rest while their members have not."""
    state = _remembered(state, clients, update.delta[:, : state.progress.shape[1]], 1 / self.smooth_rounds)
    labels = state.assigned[clients]
    step = _clusters.means_within(labels, len(state.averages.models), update.delta, num_examples)
    averages, assigned = _parts.moved(state.averages, step, lr=1.0, momentum=self.server_momentum), state.assigned
    if int(state.rounds) > self.warmup:
        for j in _at_rest(self, state, labels, update.delta, step):
            members = torch.nonzero(state.assigned == j)[:, 0]
            leaving = members[_second_half(self, state.progress[members])]
            if len(leaving):
                assigned = assigned.index_fill(0, leaving, len(averages.models))
                averages = _parts.copies(averages, [*range(len(averages.models)), j])
    return replace(state, averages=averages, assigned=assigned)


def _cost(self: Any, state: Splits) -> Cost:
    """One vector each way; the server keeps every client's update."""
    cost = _parts.averaging_cost(self, state.averages)
    return replace(cost, server_floats=cost.server_floats + state.progress.numel())


def _describe(self: Any, state: Splits) -> dict[str, Any]:
    """How many clusters there are by now."""
    return {"num_models": len(state.averages.models)}


def _mixing(self: Any, state: Splits) -> Float[Tensor, "N d"]:
    """One-hot rows."""
    return _clusters.rows_of(state.assigned, len(state.averages.models))


def _remembered(state: Splits, clients: Int[Tensor, " C"], steps: Float[Tensor, "C T"], rate: float) -> Splits:
    """The state after it took note of the updates and found a cluster for those who replied for the first time."""
    own = state.assigned[clients]
    smoothed = torch.where((own >= 0)[:, None], torch.lerp(state.progress[clients], steps, rate), steps)
    centres = _clusters.mean_directions(state.progress, state.assigned, len(state.averages.models))
    found = torch.where(own >= 0, own, _clusters.most_alike(steps, centres))
    return replace(
        state,
        assigned=state.assigned.index_copy(0, clients, found),
        progress=state.progress.index_copy(0, clients, smoothed),
        rounds=state.rounds + 1,
        reach=torch.where(state.rounds == 0, steps.double().norm(dim=1).max(), state.reach),
    )


def _at_rest(
    self: Any,
    state: Splits,
    labels: Int[Tensor, " C"],
    deltas: Float[Tensor, "C P"],
    step: Float[Tensor, "d P"],
) -> list[int]:
    """Clusters whose mean update is short beside the longest of its members' updates, which is long still."""
    T = state.progress.shape[1]
    longest = torch.zeros(len(step), dtype=torch.float64, device=deltas.device)
    longest = longest.scatter_reduce(0, labels, deltas[:, :T].double().norm(dim=1), "amax")
    resting = step[:, :T].norm(dim=1) < self.stationary * longest
    return torch.nonzero(resting & (longest > self.activity * state.reach))[:, 0].tolist()


def _second_half(self: Any, progress: Float[Tensor, "m T"]) -> Int[Tensor, " n"]:
    """Which members leave; nobody if the two halves are too small or too alike."""
    nobody = torch.empty(0, dtype=torch.int64, device=progress.device)
    if len(progress) < 2 * self.min_size:
        return nobody
    unit = directions(progress)
    cosines = inner_products(unit, unit).cpu().numpy()
    half = bipartition(cosines, self.linkage)
    if min((half == 0).sum(), (half == 1).sum()) < self.min_size or not _are_apart(
        cosines, half, gap=self.gap, separation=self.separation
    ):
        return nobody
    return torch.from_numpy(np.flatnonzero(half == 1)).to(progress.device)


def bipartition(cosines: NDArray[np.float64], linkage: Linkage) -> NDArray[np.int64]:
    """Cuts a matrix of cosines [m, m] into halves 0 and 1; all 0 if they are all the same.

    ``single`` linkage gives the bipartition with the smallest largest cosine across the cut (the paper's algorithm).
    """
    from scipy.cluster.hierarchy import linkage as tree_of  # noqa: PLC0415 - only the server needs scipy
    from scipy.spatial.distance import squareform  # noqa: PLC0415

    distances = np.maximum(1 - (cosines + cosines.T) / 2, 0)
    np.fill_diagonal(distances, 0)
    return groups_of(tree_of(squareform(distances, checks=False), method=linkage), 2)


def _are_apart(cosines: NDArray[np.float64], half: NDArray[np.int64], *, gap: float, separation: float) -> bool:
    """Whether cosines within the halves exceed those across by `gap`, and the paper's bound holds for `separation`."""
    same = half[:, None] == half[None, :]
    pairs = ~np.eye(len(half), dtype=bool)
    within, across = cosines[same & pairs], cosines[~same]
    bound = np.sqrt(max(1 - float(across.max()), 0) / 2)
    between = float(within.mean()) - float(across.mean()) if len(within) else np.inf
    return bool(between > gap and bound > separation)


@algorithm("cfl", citation="Sattler et al., TNNLS 2020, arXiv:1910.01991")
@dataclass(frozen=True)
class Cfl:
    """Starts as FedAvg and splits a cluster in two where its model is at rest though its members pull apart.

    Halves come from the cosines between the members' updates of the last round. Sends P down and P up; the server
    keeps d·P and every client's update, N·T numbers; clients keep nothing. As long as nothing splits it is FedAvg.

    The paper splits when ‖mean update‖ < ε1 and the longest update > ε2, with thresholds tuned for each network (0.4
    and 1.6 in its published experiments). Here ε2 is `activity` times the longest update of the first round, and
    ‖mean‖ < `stationary` · longest; so neither depends on the size of the network, but splitting ends later than with
    an ε1 that does not shrink. The published code splits clusters of more than two; `min_size` is for both halves. The
    paper's text cuts by single linkage and its published code by complete linkage; both are there. It needs all
    clients in every round; here those who did not reply count with their latest update, and a client that was never
    heard receives the mean of the models and joins, with its first reply, the cluster whose updates have the most
    similar direction.
    """

    server_momentum: ClassVar[float] = 0.0
    stationary: float = option(0.25, above=0, at_most=1, help="split where |mean update| < this x the longest update")
    activity: float = option(0.75, at_least=0, help="and the longest is > this x the longest of the first round")
    warmup: int = option(20, at_least=0, help="rounds before the first split")
    min_size: int = option(2, at_least=1, help="smallest cluster that a split may leave")
    linkage: Linkage = option("complete", help="how halves are found: as in the published code, or as in the text")
    gap: float = option(0.0, at_least=0, help="smallest difference of mean cosines within and across the halves")
    separation: float = option(0.0, at_least=0, below=1, help="gamma_max of the paper: bound on the closest pair")
    smooth_rounds: float = option(1.0, at_least=1, help="replies that a client's update is averaged over")

    def __post_init__(self) -> None:
        check_options(self)

    init = _init
    send = _send
    train = _parts.plain_training
    receive = _receive
    start = _parts.nothing_private
    personal = _parts.as_received
    cost = _cost
    describe = _describe
    mixing = _mixing


@algorithm("cfl-smoothed", citation="CFL (Sattler et al., TNNLS 2020, arXiv:1910.01991) on averaged updates")
@dataclass(frozen=True)
class SmoothedCfl:
    """CFL that compares updates averaged over ten rounds, and splits only where a clear gap shows.

    One round's cosines are mostly noise: CFL as published splits clients that are alike. An exponential mean over
    `smooth_rounds` replies and a `gap` of cosines within over cosines across the halves prevent it. Sends P down and
    P up; the server keeps d·P and N·T numbers; clients keep nothing. With smooth_rounds = 1, gap = 0 and CFL's other
    defaults but activity = 0 it is CFL; as long as nothing splits it is FedAvg. A new cluster begins with the
    velocity of the one that it leaves.
    """

    activity: ClassVar[float] = 0.0
    stationary: float = option(0.5, above=0, at_most=1, help="split where |mean update| < this x the longest update")
    warmup: int = option(10, at_least=0, help="rounds before the first split")
    min_size: int = option(3, at_least=1, help="smallest cluster that a split may leave")
    linkage: Linkage = option("complete", help="how halves are found: as in the published code, or as in the text")
    gap: float = option(0.2, at_least=0, help="smallest difference of mean cosines within and across the halves")
    separation: float = option(0.0, at_least=0, below=1, help="gamma_max of the paper: bound on the closest pair")
    smooth_rounds: float = option(10.0, at_least=1, help="replies that a client's update is averaged over")
    server_momentum: float = option(0.0, at_least=0, below=1, help="momentum of the server step")

    def __post_init__(self) -> None:
        check_options(self)

    init = _init
    send = _send
    train = _parts.plain_training
    receive = _receive
    start = _parts.nothing_private
    personal = _parts.as_received
    cost = _cost
    describe = _describe
    mixing = _mixing
