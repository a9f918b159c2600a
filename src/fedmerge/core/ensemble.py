"""Models that several networks make up together: what a client uses where one parameter vector is not enough.

Each kind is a tuple of tensors, so that it maps and stacks like a vector does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class Ensemble(Protocol):
    """Several networks and how their outputs become one.

    Attributes:
        models: [K, P].
    """

    @property
    def models(self) -> Tensor:
        """Of the members, [K, P]."""
        ...

    def combined(self, outputs: Float[Tensor, "K B C"], inputs: Tensor) -> Float[Tensor, "B C"]:
        """One output for each example, from those of the members."""
        ...

    def _replace(self, *, models: Tensor) -> Any:
        """The same with other members."""
        ...


Personal: TypeAlias = Tensor | Ensemble
"""What a client uses: one vector [P], or an ensemble."""


class Mixture(NamedTuple):
    """Probabilities are averaged: p(y|x) = Σ_k w_k softmax(f_k(x))_y. Outputs are their logarithms.

    Attributes:
        models: [K, P].
        weights: [K], adding up to 1.
    """

    models: Tensor
    weights: Tensor

    def combined(self, outputs: Float[Tensor, "K B C"], inputs: Tensor) -> Float[Tensor, "B C"]:  # noqa: ARG002
        """Log-probabilities of the mixture."""
        return _mixed(outputs, self.weights[:, None].log())


class Gated(NamedTuple):
    """A mixture of two whose weight depends on the example: σ(gate · [x, 1]) on the first.

    Attributes:
        models: [2, P].
        gate: [F + 1] on the flattened input; the last entry is the bias.
    """

    models: Tensor
    gate: Tensor

    def log_weights(self, inputs: Tensor) -> Float[Tensor, "2 B"]:
        """Logarithms of the two weights of each example."""
        score = inputs.flatten(1) @ self.gate[:-1] + self.gate[-1]
        return torch.nn.functional.logsigmoid(torch.stack([score, -score]))

    def combined(self, outputs: Float[Tensor, "2 B C"], inputs: Tensor) -> Float[Tensor, "B C"]:
        """Log-probabilities of the mixture."""
        return _mixed(outputs, self.log_weights(inputs))


class Additive(NamedTuple):
    """Outputs are added: f(x) = Σ_k f_k(x).

    Attributes:
        models: [K, P].
        active: [K] 1 for a member that counts, 0 for one that is not there yet.
    """

    models: Tensor
    active: Tensor

    def combined(self, outputs: Float[Tensor, "K B C"], inputs: Tensor) -> Float[Tensor, "B C"]:  # noqa: ARG002
        """Sum over the active members."""
        return (outputs * self.active[:, None, None]).sum(dim=0)


def _mixed(outputs: Float[Tensor, "K B C"], log_weights: Float[Tensor, "K b"]) -> Float[Tensor, "B C"]:
    return (outputs.log_softmax(dim=2) + log_weights[:, :, None]).logsumexp(dim=0)


def members(personal: Personal) -> list[Float[Tensor, " P"]]:
    """The vectors that a client's model is made of."""
    return [personal] if isinstance(personal, Tensor) else list(personal.models.unbind())


def with_members(personal: Personal, vectors: list[Float[Tensor, " P"]]) -> Personal:
    """The same model made of other vectors."""
    return vectors[0] if isinstance(personal, Tensor) else personal._replace(models=torch.stack(vectors))


def outputs_of(
    personal: Personal, inputs: Tensor, predict: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, "B ..."]:
    """A client's outputs; `predict` gives those of one vector [P]."""
    outputs = [predict(vector, inputs) for vector in members(personal)]
    return outputs[0] if isinstance(personal, Tensor) else personal.combined(torch.stack(outputs), inputs)


class EnsembleModule(nn.Module):
    """An ensemble as a module: outputs of one network per member, combined.

    Args:
        networks: One per member.
        ensemble: How their outputs become one.
    """

    def __init__(self, networks: list[nn.Module], ensemble: Ensemble) -> None:
        super().__init__()
        self.networks = nn.ModuleList(copy.deepcopy(network) for network in networks)
        self._ensemble: Ensemble = ensemble._replace(models=ensemble.models[:, :0])

    def forward(self, inputs: Tensor) -> Tensor:
        """Combined outputs, [B, C]."""
        return self._ensemble.combined(torch.stack([network(inputs) for network in self.networks]), inputs)
