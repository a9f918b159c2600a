"""APFL: a mixture of an own and the common model, with a weight that adapts (Deng et al., arXiv:2003.13461)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batch, Batches, Cost, Slope, Task, Update


class OwnPart(NamedTuple):
    """What a client keeps.

    Attributes:
        model: [P] its part v of the mixture, with the buffers of the mixture; without meaning before it takes part.
        weight: [] share α of its own part; negative before it takes part.
        mixture: [P] ``α·v + (1 − α)·w`` as its last round left it.
    """

    model: Tensor
    weight: Tensor
    mixture: Tensor


@algorithm("apfl", citation="Deng et al., arXiv:2003.13461")
@dataclass(frozen=True)
class Apfl:
    """Each client uses ``α·v + (1 − α)·w``: a part v of its own and the common model w, with an α of its own.

    In local training w follows its own slope (that of FedAvg), v the slope of the mixture, ``α·∇f(α·v + (1 − α)·w)``,
    and with `adaptive` also α, by ``⟨v − w, ∇f⟩``, kept in 0..1. Sends P numbers down and P up; the server keeps P;
    clients keep v, α and their last mixture (2P + 1). Two models are trained, which doubles the computation.

    v begins as the first model that the client receives. The client uses the mixture with the w that it has trained
    itself, as its authors do, or (`common`) with the one it received last. The paper proposes both a fixed and an
    adaptive α; the latter looks at training loss alone, under which α grows towards 1. It moves at every step here, in
    the authors' code once a round. With a fixed α of 0 and the received w everyone has the common model of FedAvg, and
    with one of 1, where everyone takes part, the models are those of Local.
    """

    trains_several: ClassVar[bool] = True

    weight: float = option(0.5, at_least=0, at_most=1, help="share of the own part at first, alpha in the paper")
    adaptive: bool = option(False, help="whether the share follows its slope at every step")
    common: Literal["trained", "received"] = option("trained", help="which w the model in use is mixed with")
    server_lr: float = option(1.0, above=0, help="server step on the averaged update")
    server_momentum: float = option(0.0, at_least=0, below=1, help="momentum of the server step")

    def __post_init__(self) -> None:
        check_options(self)

    def start(self, params: Float[Tensor, " P"]) -> OwnPart:
        """No part of its own yet."""
        return OwnPart(params, -params.new_ones(()), params)

    def train(self, down: Float[Tensor, " P"], local: OwnPart, batches: Batches, task: Task) -> tuple[Update, OwnPart]:
        """One descent on [w, v, buffers of w, buffers of the mixture, α]; the last three move by themselves."""
        T, P = task.layout.num_trainable, len(down)
        sizes = [T, T, P - T, P - T, 1]
        own, weight = self._own_part(down, local)

        def slope(params: Tensor, batch: Batch) -> Slope:
            common, part, held, held_own, share = torch.split(params, sizes)
            alone = task.gradient(torch.cat([common, held]), batch)
            mixed = task.gradient(torch.cat([common + share * (part - common), held_own]), batch)
            if self.adaptive:
                share = (share - batch.lr * ((part - common) @ mixed.gradient)).clamp(0, 1)
            gradient = torch.cat([alone.gradient, params[2 * P] * mixed.gradient])
            return Slope(alone.loss, gradient, torch.cat([alone.buffers, mixed.buffers, share]))

        begin = torch.cat([down[:T], own[:T], down[T:], own[T:], weight[None]])
        common, part, held, held_own, share = torch.split(task.descend(begin, batches, slope), sizes)
        mixture = torch.cat([common + share * (part - common), held_own])
        return Update(down - torch.cat([common, held])), OwnPart(torch.cat([part, held_own]), share[0], mixture)

    def _own_part(self, down: Float[Tensor, " P"], local: OwnPart) -> tuple[Float[Tensor, " P"], Float[Tensor, ""]]:
        """Its v and α, at their beginning for a client that has not taken part."""
        joined = local.weight >= 0
        first = torch.full_like(local.weight, self.weight)
        return torch.where(joined, local.model, down), torch.where(joined, local.weight, first)

    def personal(self, down: Float[Tensor, " P"], local: OwnPart, batches: Batches, task: Task) -> Float[Tensor, " P"]:
        """The mixture of the own part and the common model."""
        if self.common == "trained":
            return torch.where(local.weight >= 0, local.mixture, down)
        own, weight = self._own_part(down, local)
        return weight * own + (1 - weight) * down

    def cost(self, state: _parts.Models) -> Cost:
        """As FedAvg's, with a second model trained."""
        return _parts.with_extra_passes(_parts.averaging_cost(self, state), 1)

    init = _parts.one_draw
    receive = _parts.federated_average
    send = _parts.to_everyone
    describe = _parts.one_model
    mixing = _parts.no_mixing
