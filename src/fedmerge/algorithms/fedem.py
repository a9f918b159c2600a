"""FedEM: every client is a mixture of d components (Marfoq et al., NeurIPS 2021, arXiv:2108.10252)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.ensemble import Mixture
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batch, Batches, Cost, Draw, Federation, Task
from fedmerge.core.sums import shares_of_examples, weighted_sum


class Components(NamedTuple):
    """What a client sends back.

    Attributes:
        delta: [d, P] before − after of every component.
    """

    delta: Tensor


@algorithm("fedem", citation="Marfoq et al., NeurIPS 2021, arXiv:2108.10252")
@dataclass(frozen=True)
class FedEm:
    """Learns d components together with each client's mixture of them, by federated expectation-maximisation.

    A client computes, under what it received, how probable it is that each example came from each component; the
    means are its mixing weights π, and every component trains on all examples, weighted by these probabilities. Sends
    d·P down and d·P up, and trains d models; the server keeps d·P; clients keep π, which never leaves them. Predicts
    with the mixture of all components. With num_models = 1 it is FedAvg. Components start from different draws; π of
    a client that has not taken part is uniform.
    """

    trains_several: ClassVar[bool] = True

    num_models: int = option(3, at_least=1, help="number of components; this method must be told")

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, draw: Draw, federation: Federation, seed: int) -> _parts.Models:
        """Different draws for different components: from equal ones they would stay equal."""
        models = torch.stack([draw(k) for k in range(self.num_models)])
        return _parts.fresh(models, federation.num_trainable)

    def start(self, params: Float[Tensor, " P"]) -> Float[Tensor, " d"]:
        """Uniform π."""
        return torch.full((self.num_models,), 1 / self.num_models, dtype=params.dtype, device=params.device)

    def send(self, state: _parts.Models, clients: Int[Tensor, " C"]) -> Float[Tensor, "C d P"]:
        """All components to everyone."""
        return state.models.expand(len(clients), -1, -1)

    def train(
        self, down: Float[Tensor, "d P"], local: Float[Tensor, " d"], batches: Batches, task: Task
    ) -> tuple[Components, Float[Tensor, " d"]]:
        """One step of expectation, then local training of every component on its share of the examples."""
        owners = [responsibilities(down, local, batch, task) for batch in batches]
        after = [task.train(down[k], _weighed(batches, owners, k)) for k in range(self.num_models)]
        return Components(down - torch.stack(after)), _mean_share(batches, owners)

    def personal(self, down: Float[Tensor, "d P"], local: Float[Tensor, " d"], batches: Batches, task: Task) -> Mixture:
        """All components, mixed by π."""
        return Mixture(down, local)

    def receive(
        self, state: _parts.Models, clients: Int[Tensor, " C"], update: Components, num_examples: Int[Tensor, " C"]
    ) -> _parts.Models:
        """FedAvg of every component, by number of examples."""
        mean = weighted_sum(shares_of_examples(num_examples), update.delta.flatten(1)).view(state.models.shape)
        return _parts.moved(state, mean, lr=1.0, momentum=0.0)

    def cost(self, state: _parts.Models) -> Cost:
        """All components both ways; d forward passes for the probabilities and d models to train."""
        models, d = state.models, len(state.models)
        size = models.numel() * models.element_size()
        return Cost(size, size, models.numel(), extra_forward=2 * d - 1, extra_backward=d - 1)

    describe = _parts.one_model
    mixing = _parts.no_mixing


def responsibilities(
    models: Float[Tensor, "d P"], weights: Float[Tensor, " d"], batch: Batch, task: Task
) -> Float[Tensor, "d B"]:
    """q_k(x, y) ∝ π_k exp(−loss_k(x, y)): how probable it is that component k made the example; columns sum to 1."""
    losses = [task.losses(task.predict(model, batch.inputs), batch.targets) for model in models]
    return torch.softmax(weights.log()[:, None] - torch.stack(losses), dim=0)


def _weighed(batches: Batches, owners: list[Tensor], k: int) -> Batches:
    """The batches with each example weighted by what component k owns of it."""
    return tuple(batch._replace(weight=batch.weight * owner[k]) for batch, owner in zip(batches, owners, strict=True))


def _mean_share(batches: Batches, owners: list[Tensor]) -> Float[Tensor, " d"]:
    """Mean responsibilities over all real examples, the new π."""
    real = torch.cat([(batch.weight > 0).to(batch.weight.dtype) for batch in batches])
    return torch.cat(owners, dim=1) @ real / real.sum()
