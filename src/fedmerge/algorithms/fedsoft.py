"""FedSoft: clients between clusters (Ruan and Joe-Wong, AAAI 2022, arXiv:2112.06053)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batches, Cost, Draw, Federation, Task
from fedmerge.core.soup import shares
from fedmerge.core.sums import weighted_sum

ROUNDING = 1e-3
"""How far importance weights may be from adding up to 1."""


class Received(NamedTuple):
    """What a client receives.

    Attributes:
        models: [d, P] all models in a round of estimation; else [1, P], their mean by the client's importance weights.
    """

    models: Tensor


class Reply(NamedTuple):
    """What a client sends back.

    Attributes:
        delta: [P] before − after, where before is the mean of the models by its importance weights.
        importance: [d] its new importance weights in a round of estimation of several models, else [0].
    """

    delta: Tensor
    importance: Tensor


@dataclass(frozen=True)
class Soft:
    """Server state.

    Attributes:
        models: [d, P] one model per cluster.
        importance: [N, d] how much of each client's data every model fits best; rows sum to 1, uniform at first.
        rounds: [] rounds so far.
    """

    models: Float[Tensor, "d P"]
    importance: Float[Tensor, "N d"]
    rounds: Int[Tensor, ""]


@algorithm("fedsoft", citation="Ruan and Joe-Wong, AAAI 2022, arXiv:2112.06053")
@dataclass(frozen=True)
class FedSoft:
    """Each client trains one model pulled towards d cluster models, in proportion to the examples that each fits best.

    Client i minimises its loss plus ``proximal/2 · Σ_s u_is ‖θ − c_s‖²`` and uses the θ it ends with; a cluster's model
    becomes the mean of these, weighted by u_is·n_i. Every `estimate_every` rounds u_is is measured anew: the share of
    i's examples whose loss is lowest under c_s. Sends P down and P up, and d·P down and P + d up in rounds of
    estimation; the server keeps d·P and N·d; clients keep their model. With one model, proximal = 0 and begin = "mean"
    it is FedAvg.

    The pull equals ``proximal/2 · ‖θ − Σ_s u_is c_s‖²`` as u_is sum to 1: this mean is what travels. The paper leaves
    open where local training starts; in its authors' code a client goes on from its own last model. The paper samples
    the clients of each cluster by u_is·n_i and averages them plainly; here those of the round are averaged with these
    weights, its expectation. A client that has not taken part uses the mean of the models. Models start from the first
    draw plus `spread` times the differences of other draws to it.
    """

    num_models: int = option(5, at_least=1, help="number of clusters; this method must be told")
    proximal: float = option(0.1, at_least=0, help="strength of the pull, lambda in the paper (with the factor 1/2)")
    begin: Literal["own", "mean"] = option("own", help="local training goes on from the own model, or from the mean")
    estimate_every: int = option(2, at_least=1, help="rounds between two estimates of the importance weights")
    smoothing: float = option(1e-4, above=0, below=1, help="smallest importance weight, sigma in the paper")
    spread: float = option(1.0, above=0, at_most=1, help="how far apart the models start; 1 gives independent draws")

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, draw: Draw, federation: Federation, seed: int) -> Soft:
        """Models apart, importance uniform.

        Raises:
            UsageError: if there are fewer clients than models.
        """
        _parts.refuse_more_than_clients("fedsoft", self.num_models, federation.num_clients)
        first, T = draw(0), federation.num_trainable
        models = [torch.cat([torch.lerp(first, draw(s), self.spread)[:T], first[T:]]) for s in range(self.num_models)]
        uniform = torch.full((federation.num_clients, self.num_models), 1 / self.num_models, dtype=first.dtype)
        return Soft(torch.stack(models), uniform, torch.tensor(0))

    def send(self, state: Soft, clients: Int[Tensor, " C"]) -> Received:
        """All models in a round of estimation, else their mean for each client."""
        if self._estimates(state):
            return Received(state.models.expand(len(clients), -1, -1))
        return Received(weighted_sum(state.importance[clients].T, state.models).to(state.models.dtype)[:, None])

    def train(self, down: Received, local: _parts.Own, batches: Batches, task: Task) -> tuple[Reply, _parts.Own]:
        """Estimates where all models came, then trains with the pull from their mean."""
        models = down.models
        weights = _importance(models, batches, task, self.smoothing) if len(models) > 1 else models.new_ones(1)
        before = weights @ models
        start = before if self.begin == "mean" else _parts.own_or_received(before, local)
        after = task.train(start, batches, pull=self.proximal, towards=before)
        new = weights if len(models) > 1 else weights[:0]
        return Reply(before - after, new), _parts.own_now(after, local)

    def personal(self, down: Received, local: _parts.Own, batches: Batches, task: Task) -> Float[Tensor, " P"]:
        """The client's own model; the mean of the models before it has one."""
        return _parts.own_or_received(down.models.mean(dim=0), local)

    def check_reply(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Importance weights, where there are any, are shares of 1."""
        importance = tensors["importance"]
        if len(importance) == 0 or (bool((importance >= 0).all()) and abs(float(importance.sum()) - 1) < ROUNDING):
            return None
        return "importance: got weights that are negative or do not sum to 1"

    def receive(self, state: Soft, clients: Int[Tensor, " C"], update: Reply, num_examples: Int[Tensor, " C"]) -> Soft:
        """Every model becomes the mean of the clients' models, weighted by u_is·n_i."""
        estimated = update.importance.shape[1] > 0
        weights = update.importance if estimated else state.importance[clients]
        before = weighted_sum(weights.T, state.models)
        share = shares(weights, num_examples)
        models = weighted_sum(share, before - update.delta).to(state.models.dtype)
        return Soft(models, state.importance.index_copy(0, clients, weights), state.rounds + 1)

    def _estimates(self, state: Soft) -> bool:
        return int(state.rounds) % self.estimate_every == 0

    def cost(self, state: Soft) -> Cost:
        """D models down and d numbers more up in a round of estimation."""
        cost = _parts.one_vector_each_way(state.models, server_floats=state.models.numel() + state.importance.numel())
        d, number = state.models.shape[0], state.importance.element_size()
        if d == 1 or not self._estimates(state):
            return cost
        return replace(cost, bytes_down=d * cost.bytes_down, bytes_up=cost.bytes_up + d * number, extra_forward=d)

    def describe(self, state: Soft) -> dict[str, Any]:
        """Number of models, and how many are somebody's most important one."""
        return {"num_models": self.num_models, "models_in_use": len(torch.unique(state.importance.argmax(dim=1)))}

    def mixing(self, state: Soft) -> Float[Tensor, "N d"]:
        """The importance weights."""
        wide = state.importance.double()
        return wide / wide.sum(dim=1, keepdim=True)

    start = _parts.nothing_own_yet


def _importance(models: Float[Tensor, "d P"], batches: Batches, task: Task, smoothing: float) -> Float[Tensor, " d"]:
    """Share of the examples that each model fits best, at least `smoothing`, adding up to 1."""
    rows = torch.arange(len(models), device=models.device)[:, None]
    counts = torch.zeros(len(models), dtype=models.dtype, device=models.device)
    for batch in batches:
        losses = torch.stack([task.losses(task.predict(model, batch.inputs), batch.targets) for model in models])
        best = (losses.argmin(dim=0)[None, :] == rows) & (batch.weight > 0)[None, :]
        counts = counts + best.sum(dim=1)
    floored = (counts / counts.sum()).clamp_min(smoothing)
    return floored / floored.sum()
