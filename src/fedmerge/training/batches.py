"""Which examples a client trains on, in which order and how fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Batch, Batches
from fedmerge.core.randomness import generator
from fedmerge.data.federated import Examples
from fedmerge.training.private import PrivateBatches, Protection
from fedmerge.training.sgd import Descent, Optimizer


@dataclass(frozen=True)
class LocalTraining:
    """What one client does in one round, the same for every method unless a method's own table says otherwise."""

    lr: float = option(0.1, above=0, help="learning rate of local SGD in the first round")
    batch_size: int = option(32, at_least=1, help="examples per step")
    epochs: int = option(2, at_least=1, help="passes over the client's training data per round")
    steps: int | None = option(None, at_least=1, help="steps per round instead of epochs")
    optimizer: Optimizer = option("sgd", help="local optimiser; adamw starts from empty moments in every round")
    momentum: float = option(0.0, at_least=0, below=1, help="of local SGD; starts from 0 in every round")
    weight_decay: float = option(
        0.0, at_least=0, help="adds weight_decay * params to the gradient (adamw: to the step)"
    )
    schedule: Literal["constant", "cosine", "step"] = option("constant", help="learning rate over the rounds")
    decay_every: int = option(50, at_least=1, help="rounds between two drops of the step schedule")
    decay_factor: float = option(0.5, above=0, at_most=1, help="factor of one drop of the step schedule")
    dp_clip: float | None = option(
        None, above=0, help="protects each example: largest length of its gradient (DP-SGD, sequential runtime)"
    )
    dp_noise: float | None = option(
        None, at_least=0, help="noise of dp_noise * dp_clip on the sum of a step's gradients; batch_size is expected"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.steps is not None and self.epochs != LocalTraining.epochs:
            raise UsageError("LocalTraining.steps: got both steps and epochs; give one of them")
        if self.optimizer == "adamw" and self.momentum:
            raise UsageError("LocalTraining.momentum: got one for adamw, which has its own; leave it out")
        if (self.dp_clip is None) != (self.dp_noise is None):
            raise UsageError("LocalTraining.dp_clip: got one of dp_clip and dp_noise; give both or none")

    def descent(self) -> Descent:
        """The optimiser's constants."""
        return Descent(momentum=self.momentum, weight_decay=self.weight_decay, optimizer=self.optimizer)

    def passes(self, num_examples: int) -> int:
        """Training examples one client goes through in a round."""
        if self.dp_clip is not None:
            return self.private_steps(num_examples) * self.expected(num_examples)
        if self.steps is None:
            return self.epochs * num_examples
        return sum(len(index) for index in _order(num_examples, self, np.random.default_rng(0)))

    def expected(self, num_examples: int) -> int:
        """Expected examples of a protected step: the batch size, or all there are."""
        return min(self.batch_size, num_examples)

    def private_steps(self, num_examples: int) -> int:
        """Protected steps of a round."""
        return self.epochs * math.ceil(num_examples / self.batch_size) if self.steps is None else self.steps


def rate_of_round(training: LocalTraining, round_number: int, rounds: int) -> float:
    """Learning rate of a round, counted from 1.

    >>> rate_of_round(LocalTraining(lr=0.4, schedule="step", decay_every=10), 11, 100)
    0.2
    """
    if training.schedule == "cosine":
        return training.lr * 0.5 * (1 + math.cos(math.pi * (round_number - 1) / rounds))
    if training.schedule == "step":
        return float(training.lr * training.decay_factor ** ((round_number - 1) // training.decay_every))
    return training.lr


def _order(num_examples: int, training: LocalTraining, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Indices of each step: epochs of shuffled examples, cut into batches; the last of an epoch may be short."""
    per_epoch = math.ceil(num_examples / training.batch_size)
    wanted = training.steps if training.steps is not None else training.epochs * per_epoch
    steps: list[NDArray[np.int64]] = []
    while len(steps) < wanted:
        shuffled = rng.permutation(num_examples)
        steps += np.split(shuffled, np.arange(training.batch_size, num_examples, training.batch_size))
    return steps[:wanted]


def _cut(examples: Examples, sizes: list[int], lr: float) -> Batches:
    """Batches of these sizes, one after another."""
    inputs, targets = torch.split(examples.inputs, sizes), torch.split(examples.targets, sizes)
    each = np.repeat(1 / np.array(sizes, dtype=np.float64), sizes)
    device = examples.inputs.device
    dtype = examples.inputs.dtype if examples.inputs.is_floating_point() else torch.get_default_dtype()
    weights = torch.split(torch.from_numpy(each).to(device, dtype), sizes)
    rate = torch.tensor(lr, dtype=dtype, device=device)
    return tuple(Batch(x, y, weight, rate) for x, y, weight in zip(inputs, targets, weights, strict=True))


def _sampled(num_examples: int, training: LocalTraining, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Indices of each protected step: every example by itself with probability expected/n; a step may be empty."""
    rate = training.expected(num_examples) / num_examples
    return [np.flatnonzero(rng.random(num_examples) < rate) for _ in range(training.private_steps(num_examples))]


def _chosen(examples: Examples, index: NDArray[np.int64], expected: int, lr: float) -> Batch:
    """These examples, each with weight 1/expected however many there are."""
    dtype = examples.inputs.dtype if examples.inputs.is_floating_point() else torch.get_default_dtype()
    where, device = torch.from_numpy(index).to(examples.targets.device), examples.inputs.device
    weight = torch.full((len(index),), 1 / expected, dtype=dtype, device=device)
    return Batch(examples.inputs[where], examples.targets[where], weight, torch.tensor(lr, dtype=dtype, device=device))


def draw_batches(
    examples: Examples, training: LocalTraining, *, lr: float, seed: int, round_number: int, client: int
) -> Batches:
    """The steps of one client's round; depends on (seed, round, client) alone.

    Args:
        examples: The client's training examples, n >= 1.
        training: Batch size and number of epochs or steps; with `dp_clip` the steps are protected ones.
        lr: Learning rate of this round.
        seed: The run's seed.
        round_number: Counted from 1.
        client: Its index.
    """
    rng = generator(seed, "batches", round_number, client)
    if training.dp_clip is not None and training.dp_noise is not None:
        expected = training.expected(len(examples.targets))
        protection = Protection(training.dp_clip, training.dp_noise, expected, seed, round_number, client)
        steps = _sampled(len(examples.targets), training, rng)
        return PrivateBatches(tuple(_chosen(examples, step, expected, lr) for step in steps), protection)
    steps = _order(len(examples.targets), training, rng)
    index = torch.from_numpy(np.concatenate(steps)).to(examples.targets.device)
    drawn = Examples(_picked(examples.inputs, index), examples.targets.index_select(0, index))
    return _cut(drawn, [len(step) for step in steps], lr)


@dataclass(frozen=True)
class Planned:
    """The steps of one client's round before they are drawn: who runs the client draws them when they are needed.

    Attributes:
        examples: The client's training examples, n >= 1.
        training: Batch size and number of epochs or steps.
        lr: Learning rate of this round.
        seed: The run's seed.
        round_number: Counted from 1.
        client: Its index.
    """

    examples: Examples
    training: LocalTraining
    lr: float
    seed: int
    round_number: int
    client: int

    def rng(self) -> np.random.Generator:
        """Decides the order of the examples."""
        return generator(self.seed, "batches", self.round_number, self.client)

    def drawn(self) -> Batches:
        """The steps, see `draw_batches`."""
        return draw_batches(
            self.examples,
            self.training,
            lr=self.lr,
            seed=self.seed,
            round_number=self.round_number,
            client=self.client,
        )

    def sizes(self) -> list[int]:
        """Examples of each step."""
        n, training = len(self.examples.targets), self.training
        if training.dp_clip is not None:
            return [len(step) for step in _sampled(n, training, self.rng())]
        whole, left = divmod(n, training.batch_size)
        epoch = [training.batch_size] * whole + [left] * bool(left)
        if training.steps is None:
            return epoch * training.epochs
        return (epoch * math.ceil(training.steps / len(epoch)))[: training.steps]


def drawn_together(plans: Sequence[Planned]) -> Batches:
    """The steps of several clients with a leading client axis, in one copy of their examples.

    A client with fewer examples in a step than others gets some more, of weight 0, and one with fewer steps some of
    rate 0. The clients' examples have one shape.

    Args:
        plans: Of plain training, at least one.
    """
    orders = [_order(len(plan.examples.targets), plan.training, plan.rng()) for plan in plans]
    none = np.zeros(0, dtype=np.int64)
    widths = [max(len(step) for step in steps) for steps in zip_longest(*orders, fillvalue=none)]
    places = np.zeros((len(plans), sum(widths)), dtype=np.int64)
    weights = np.zeros(places.shape)
    rates = np.zeros((len(widths), len(plans)))
    starts = np.cumsum([0, *widths])
    for k, (plan, order) in enumerate(zip(plans, orders, strict=True)):
        for s, (start, step) in enumerate(zip(starts, order, strict=False)):
            places[k, start : start + len(step)] = step
            weights[k, start : start + len(step)] = 1 / len(step)
            rates[s, k] = plan.lr
    first = plans[0].examples.inputs
    dtype = first.dtype if first.is_floating_point() else torch.get_default_dtype()
    where = torch.from_numpy(places).to(first.device)
    inputs = _gathered([plan.examples.inputs for plan in plans], where)
    targets = _gathered([plan.examples.targets for plan in plans], where)
    weight, rate = (torch.from_numpy(values).to(first.device, dtype) for values in (weights, rates))
    return tuple(
        Batch(inputs[:, a:b], targets[:, a:b], weight[:, a:b], rate[s])
        for s, (a, b) in enumerate(pairwise(starts.tolist()))
    )


def _picked(rows: Tensor, where: Int[Tensor, " n"]) -> Tensor:
    """rows[where], several times as fast; images stay laid out with their channels last."""
    if rows.dim() != 4:
        return rows.index_select(0, where)
    return rows.permute(0, 2, 3, 1).index_select(0, where).permute(0, 3, 1, 2)


def _gathered(rows: Sequence[Tensor], where: Int[Tensor, "K n"]) -> Tensor:
    """rows[k][where[k]] for every client k, [K, n, ...]; images stay laid out with their channels last."""
    images = rows[0].dim() == 4
    laid = [own.permute(0, 2, 3, 1) for own in rows] if images else rows
    found = rows[0].new_empty(*where.shape, *laid[0].shape[1:])
    for k, own in enumerate(laid):
        torch.index_select(own, 0, where[k], out=found[k])
    return found.permute(0, 1, 4, 2, 3) if images else found


def step_sizes(steps: Batches | Planned) -> list[int]:
    """Examples of each step, whether drawn or not."""
    return steps.sizes() if isinstance(steps, Planned) else [len(batch.targets) for batch in steps]


def one_pass(examples: Examples, batch_size: int = 512, lr: float = 0.0) -> Batches:
    """All examples once in their own order, without copies."""
    whole, left = divmod(len(examples.targets), batch_size)
    return _cut(examples, [batch_size] * whole + [left] * bool(left), lr)
