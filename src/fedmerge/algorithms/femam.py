"""FeMAM: a sum of models, one for each level of detail (Chen et al., arXiv:2405.16472)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from fedmerge.algorithms import _clusters, _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.ensemble import Additive
from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Cost, Draw, Federation, Slope, Task, Update
from fedmerge.core.randomness import generator
from fedmerge.core.soup import shares
from fedmerge.core.structure import directions, kmeans
from fedmerge.core.sums import shares_of_examples, weighted_sum


class Levels(NamedTuple):
    """What a client receives.

    Attributes:
        finished: [L, P] the client's models of the levels that train no more.
        current: [1, P] its model of the level in training; [0, P] where that level is the client's own.
    """

    finished: Tensor
    current: Tensor


@dataclass(frozen=True)
class Tower:
    """Server state.

    Attributes:
        shared: [P] the model of the first level.
        clusters: [d, P] the models of the second level; [0, P] before it begins.
        assigned: [N] each client's cluster, −1 before its first reply in the second level.
        rounds: [] rounds so far.
        seed: [] for k-means.
        head: [2] range of the output layer.
    """

    shared: Float[Tensor, " P"]
    clusters: Float[Tensor, "d P"]
    assigned: Int[Tensor, " N"]
    rounds: Int[Tensor, ""]
    seed: Int[Tensor, ""]
    head: Int[Tensor, " ends"]


@algorithm("femam", citation="Chen et al., arXiv:2405.16472")
@dataclass(frozen=True)
class FeMam:
    """Predicts with the sum of a global, a cluster and a private model, trained one after another.

    First FedAvg; after `rounds_per_level` rounds d cluster models learn what the global model left over, with its
    outputs added to theirs; after as many more, and until the end, each client trains a private model on top of both.
    Levels that are finished train no more. Sends P, 2·P and 2·P down in the three phases, and P, P and nothing up; the
    server keeps P, then (1 + d)·P; clients keep their private model. With levels = 1 it is FedAvg.

    Each level starts from the global model with its output layer at zero, which leaves the sum as it was. Clusters are
    found by k-means on the directions of the first updates of their level, then each reply goes to the nearest
    model, as in FeSEM; a client that has not replied there receives the mean of the models. Differences from the
    paper's code: there predictions are the mean of the levels, not the sum; there are several levels of clusters, each
    until it converges, where a method here does not know the end of a run; clusters come from k-means on the
    output layer in every round, which needs all clients; and a client drops a level that does not lower its
    validation loss. Finished levels travel in every round, as a client that missed one would not have them.
    """

    trains_several: ClassVar[bool] = True

    num_models: int = option(5, at_least=1, help="clusters of the second level; this method must be told")
    levels: Literal[1, 2, 3] = option(3, help="1: global only; 2: and clusters; 3: and a private model")
    rounds_per_level: int = option(30, at_least=1, help="rounds of each level but the last")

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, draw: Draw, federation: Federation, seed: int) -> Tower:
        """The global model.

        Raises:
            UsageError: if there are fewer clients than clusters.
        """
        N, first = federation.num_clients, draw(0)
        if self.levels > 1:
            _parts.refuse_more_than_clients("femam", self.num_models, N, "cluster")
        head = torch.tensor(federation.head)
        return Tower(first, first[None][:0], torch.full((N,), -1), torch.tensor(0), torch.tensor(seed), head)

    def send(self, state: Tower, clients: Int[Tensor, " C"]) -> Levels:
        """Each client its models of the levels so far."""
        shared = state.shared.expand(len(clients), 1, -1)
        nothing, level = shared[:, :0], self._level(state)
        if level == 1:
            return Levels(nothing, shared)
        own = _clusters.received(state.clusters, state.assigned, clients)[:, None]
        return Levels(shared, own) if level == 2 else Levels(torch.cat([shared, own], dim=1), nothing)

    def train(self, down: Levels, local: _parts.Own, batches: Batches, task: Task) -> tuple[Update, _parts.Own]:
        """Trains the current level on top of the finished ones."""
        if len(down.current):
            before = down.current[0]
            return Update(before - _trained_on_top(before, down.finished, batches, task)), local
        before = _own_or_new(down, local, task)
        after = _trained_on_top(before, down.finished, batches, task)
        return Update(before[:0]), _parts.own_now(after, local)

    def personal(self, down: Levels, local: _parts.Own, batches: Batches, task: Task) -> Float[Tensor, " P"] | Additive:
        """The sum of all levels; the global model alone in the first phase."""
        models = torch.cat([down.finished, down.current])
        if not len(down.current):
            models = torch.cat([models, _own_or_new(down, local, task)[None]])
        if len(models) == 1:
            return models[0]
        return Additive(models, models.new_ones(len(models)))

    def receive(
        self, state: Tower, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> Tower:
        """Moves the models of the current level."""
        level = self._level(state)
        if level == 1:
            step = weighted_sum(shares_of_examples(num_examples), update.delta)[0]
            state = replace(state, shared=_clusters.descended(state.shared[None], step[None])[0])
        elif level == 2:
            state = self._clustered(state, clients, update, num_examples)
        state = replace(state, rounds=state.rounds + 1)
        begins = self._level(state) == 2 and not len(state.clusters)
        return replace(state, clusters=self._new_clusters(state)) if begins else state

    def _level(self, state: Tower) -> int:
        return min(self.levels, 1 + int(state.rounds) // self.rounds_per_level)

    def _new_clusters(self, state: Tower) -> Float[Tensor, "d P"]:
        start, stop = state.head.tolist()
        return _without_head(state.shared, start, stop).repeat(self.num_models, 1)

    def _clustered(
        self, state: Tower, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> Tower:
        """Assigns every reply to a cluster, then moves each cluster's model to the mean of its members."""
        before = _clusters.received(state.clusters, state.assigned, clients)
        trained = before - update.delta
        if bool((state.assigned < 0).all()):
            labels = self._first_labels(state, update.delta)
        else:
            labels = _clusters.nearest(trained, state.clusters)
        share = shares(one_hot(labels, self.num_models).double(), num_examples)
        step = weighted_sum(share, state.clusters[labels] - trained)
        return replace(
            state,
            clusters=_clusters.descended(state.clusters, step),
            assigned=state.assigned.index_copy(0, clients, labels),
        )

    def _first_labels(self, state: Tower, deltas: Float[Tensor, "C P"]) -> Int[Tensor, " C"]:
        if len(deltas) < self.num_models:
            raise UsageError(
                f"femam.num_models: got {self.num_models} clusters but only {len(deltas)} clients in the first round "
                "of the second level; lower num_models or let more clients take part"
            )
        labels = kmeans(directions(deltas), self.num_models, generator(int(state.seed), "femam"))
        return torch.from_numpy(labels).to(deltas.device)

    def cost(self, state: Tower) -> Cost:
        """One vector each way; then the finished levels down as well, and nothing up for the private level."""
        level, size = self._level(state), len(state.shared) * state.shared.element_size()
        return Cost(
            bytes_down=size * min(level, 2),
            bytes_up=size if level < 3 else 0,
            server_floats=state.shared.numel() + state.clusters.numel(),
            extra_forward=level - 1,
        )

    def describe(self, state: Tower) -> dict[str, Any]:
        """Models on the server, and the level in training."""
        return {"num_models": 1 + len(state.clusters), "level": self._level(state)}

    start = _parts.nothing_own_yet
    mixing = _parts.no_mixing


def _trained_on_top(
    params: Float[Tensor, " P"], finished: Float[Tensor, "L P"], batches: Batches, task: Task
) -> Float[Tensor, " P"]:
    """Local training with the outputs of the finished levels added to the model's own."""
    if not len(finished):
        return task.train(params, batches)

    def slope(vector: Tensor, batch: Any) -> Slope:
        offset = torch.stack([task.predict(model, batch.inputs) for model in finished]).sum(dim=0)
        return task.gradient(vector, batch, offset)

    return task.descend(params, batches, slope)


def _own_or_new(down: Levels, local: _parts.Own, task: Task) -> Float[Tensor, " P"]:
    """The client's own model, or one that adds nothing yet."""
    return _parts.own_or_received(_without_head(down.finished[0], *task.layout.head), local)


def _without_head(params: Float[Tensor, " P"], start: int, stop: int) -> Float[Tensor, " P"]:
    """The same with the output layer at zero."""
    return torch.cat([params[:start], torch.zeros_like(params[start:stop]), params[stop:]])
