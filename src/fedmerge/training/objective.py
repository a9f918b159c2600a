"""What a network's outputs are held against: a loss and a count of right answers for each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from fedmerge.data.encoding import NO_TARGET

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> one number for each example, [B]."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, and what counts as right.

    Attributes:
        losses: Of each example, in nats.
        right: How right each answer is, 0..1; ties go to the first class.
    """

    losses: Criterion
    right: Criterion


def cross_entropy(outputs: Float[Tensor, "B K"], targets: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Cross-entropy of each example in nats."""
    return functional.cross_entropy(outputs, targets, reduction="none")


def is_best(outputs: Float[Tensor, "B K"], targets: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """1 where the largest output is the target's, else 0."""
    return (outputs.argmax(dim=1) == targets).to(outputs.dtype)


CLASSES = Objective(cross_entropy, is_best)
"""One class per example."""


def classes_of_tasks(class_tasks: Sequence[str]) -> Objective:
    """One class per example, told apart from the other classes of its task only.

    A client knows its task, so the classes of other tasks are no answers: they have no part in loss and choice.

    Args:
        class_tasks: [K] the task of each class.

    >>> objective = classes_of_tasks(["sentiment", "sentiment", "topic"])
    >>> objective.right(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([1])).tolist()
    [1.0]
    """
    number = {task: index for index, task in enumerate(dict.fromkeys(class_tasks))}
    of_class = torch.tensor([number[task] for task in class_tasks])
    together = of_class[:, None] == of_class[None, :]

    def within(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.masked_fill(~together.to(outputs.device)[targets], float("-inf"))

    return Objective(
        lambda outputs, targets: cross_entropy(within(outputs, targets), targets),
        lambda outputs, targets: is_best(within(outputs, targets), targets),
    )


def _per_token(outputs: Float[Tensor, "B l K"], targets: Int[Tensor, "B L"], each: Criterion) -> Float[Tensor, " B"]:
    """Mean over an example's tokens that count; outputs may end where the longest example of the batch does."""
    targets = targets[:, : outputs.shape[1]]
    real = targets != NO_TARGET
    flat = each(outputs.flatten(0, 1), targets.clamp_min(0).flatten()).view(targets.shape)
    counted = torch.where(real, flat, torch.zeros_like(flat))
    return counted.sum(dim=1) / real.sum(dim=1).clamp_min(1).to(flat.dtype)


TOKENS = Objective(
    lambda outputs, targets: _per_token(outputs, targets, cross_entropy),
    lambda outputs, targets: _per_token(outputs, targets, is_best),
)
"""One class per token: loss and share of right ones are means over the tokens of an example that count."""
