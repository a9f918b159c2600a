"""A global and a private model, mixed by a private gate (Peterson, Kanani and Marathe, arXiv:1912.06733)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.ensemble import Gated
from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batch, Batches, Cost, Slope, Task, Update
from fedmerge.core.sums import shares_of_examples


class Private(NamedTuple):
    """What never leaves a client.

    Attributes:
        expert: [P] its own model.
        gate: [P] weights on the inputs divided by √F and, as entry F, the bias; entries beyond it are 0.
    """

    expert: Tensor
    gate: Tensor


@algorithm("gated-mixture", citation="Peterson, Kanani and Marathe, arXiv:1912.06733")
@dataclass(frozen=True)
class GatedMixture:
    """Predicts α(x)·p_own(y|x) + (1 − α(x))·p_global(y|x) with α(x) = σ(gate·[x, 1]), own model and gate private.

    The global model is trained by FedAvg on its own loss; own model and gate descend the negative log-likelihood of
    the mixture, with the received global model held fixed. Sends P down and P up; the server keeps P; clients keep
    their own model and the gate. With gate_lr = 0 and a low `gate_bias` it predicts as FedAvg, with a high one as
    Local.

    The paper protects the global model by differential privacy, which is left out here. The gate sees inputs divided
    by √F, F numbers each, so that its step does not grow with them. A client learns F from its data only, after its
    private state was made: the gate is kept in a vector as long as the model, which must have more than F entries.
    The probabilities of the two models during training are those of evaluation mode.
    """

    trains_several: ClassVar[bool] = True

    gate_lr: float = option(3.0, at_least=0, help="learning rate of the gate, in units of the run's")
    gate_bias: float = option(0.0, help="bias of the gate at the start: 0 gives both models the same weight")

    def __post_init__(self) -> None:
        check_options(self)

    def start(self, params: Float[Tensor, " P"]) -> Private:
        """The common first draw, and a gate that gives every input the same weight."""
        return Private(params, torch.zeros_like(params))

    def train(self, down: Float[Tensor, " P"], local: Private, batches: Batches, task: Task) -> tuple[Update, Private]:
        """FedAvg on the received model; the private parts on the mixture with it."""
        T, F = task.layout.num_trainable, _input_size(batches[0], len(down))
        after = task.descend(
            torch.cat([local.expert[:T], local.gate[: F + 1], local.expert[T:]]),
            batches,
            lambda vector, batch: self._slope(vector, batch, down, task),
        )
        expert = torch.cat([after[:T], after[T + F + 1 :]])
        gate = torch.cat([after[T : T + F + 1], local.gate[F + 1 :]])
        return _parts.trained_update(down, batches, task), Private(expert, gate)

    def _slope(self, vector: Float[Tensor, " n"], batch: Batch, shared: Float[Tensor, " P"], task: Task) -> Slope:
        """Slope of the mixture's loss on [expert's trainable part, gate, expert's buffers].

        With r the probability that the own model explains an example, expert: Σ_i w_i r_i ∇loss_i; gate:
        Σ_i w_i (α_i − r_i) [x_i/√F, 1].
        """
        T = task.layout.num_trainable
        F = batch.inputs.shape[1:].numel()
        expert = torch.cat([vector[:T], vector[T + F + 1 :]])
        inputs = torch.nn.functional.pad(batch.inputs.flatten(1) / F**0.5, (0, 1), value=1.0)
        score = inputs @ vector[T : T + F + 1] + self.gate_bias
        odds = score + _log_likelihood(expert, batch, task) - _log_likelihood(shared, batch, task)
        slope = task.gradient(expert, batch._replace(weight=batch.weight * torch.sigmoid(odds)))
        on_gate = self.gate_lr * (batch.weight * (torch.sigmoid(score) - torch.sigmoid(odds))) @ inputs
        return slope._replace(gradient=torch.cat([slope.gradient, on_gate]))

    def personal(self, down: Float[Tensor, " P"], local: Private, batches: Batches, task: Task) -> Gated:
        """Own model and the received one, mixed by the gate."""
        F = _input_size(batches[0], len(down))
        gate = torch.cat([local.gate[:F] / F**0.5, local.gate[F : F + 1] + self.gate_bias])
        return Gated(torch.stack([local.expert, down]), gate)

    def receive(
        self, state: _parts.Models, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> _parts.Models:
        """FedAvg."""
        return _parts.averaged(state, shares_of_examples(num_examples), update)

    def cost(self, state: _parts.Models) -> Cost:
        """FedAvg's; a second model to train, and the forward passes of both for the mixture."""
        models = state.models
        size = models.shape[1] * models.element_size()
        return Cost(size, size, models.numel(), extra_forward=3, extra_backward=1)

    init = _parts.one_draw
    send = _parts.to_everyone
    describe = _parts.one_model
    mixing = _parts.no_mixing


def _log_likelihood(params: Float[Tensor, " P"], batch: Batch, task: Task) -> Float[Tensor, " B"]:
    return -task.losses(task.predict(params, batch.inputs), batch.targets)


def _input_size(batch: Batch, num_params: int) -> int:
    """F.

    Raises:
        UsageError: if the gate would be longer than the model.
    """
    size = batch.inputs.shape[1:].numel()
    if size + 1 > num_params:
        raise UsageError(
            f"gated-mixture: inputs have {size} numbers but the model only {num_params}; "
            "its gate must not be longer than the model: use smaller inputs or a larger model"
        )
    return size
