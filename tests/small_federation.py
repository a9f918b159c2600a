"""A federation small enough to run in milliseconds, played through the library's own round loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmerge.core.protocol import Federation
from fedmerge.core.randomness import fresh_module_randomness
from fedmerge.core.vector import Layout, layout_of
from fedmerge.data.federated import Examples
from fedmerge.runtime import Fleet, Sequential, run_round
from fedmerge.training import Descent, LocalTraining, draw_batches

TRAINING = LocalTraining(lr=0.1, batch_size=4, epochs=1)
PLAIN = Descent()


@dataclass(frozen=True)
class SmallFederation:
    """Clients, a network, and how to play rounds of any method on them."""

    build: Callable[[], nn.Module]
    data: list[Examples]
    groups: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    training: LocalTraining = TRAINING
    descent: Descent = PLAIN

    def network(self, draw: int = 0) -> nn.Module:
        with fresh_module_randomness(3, "initial weights", draw):
            return self.build().to(self.dtype)

    @property
    def layout(self) -> Layout:
        return layout_of(self.network())

    @property
    def counts(self) -> torch.Tensor:
        return torch.tensor([len(examples.targets) for examples in self.data])

    def draw(self, j: int) -> torch.Tensor:
        return self.layout.read(self.network(j))

    def facts(self) -> Federation:
        layout = self.layout
        return Federation(
            len(self.data),
            layout.num_trainable,
            layout.head,
            layout.layers,
            norms=layout.norms,
            head_bias=layout.head_bias,
            groups=self.groups,
        )

    def engine(self, kind: Any = Sequential) -> Any:
        return kind(self.network(), self.layout, self.descent)

    def begin(self, algorithm: Any, policy: str = "merge") -> tuple[Any, Fleet]:
        start, T = self.draw(0), self.layout.num_trainable
        state = algorithm.init(self.draw, self.facts(), 0)
        return state, Fleet((algorithm.start(start),) * len(self.data), (start[T:],) * len(self.data), policy, T)

    def batches(self, clients: list[int], round_number: int) -> list[Any]:
        rate = self.training.lr
        return [
            draw_batches(self.data[i], self.training, lr=rate, seed=0, round_number=round_number, client=i)
            for i in clients
        ]

    def play(self, algorithm: Any, rounds: int, kind: Any = Sequential, policy: str = "merge") -> tuple[Any, Fleet]:
        """The state and the clients after `rounds` rounds with everyone taking part."""
        (state, fleet), engine, everyone = (
            self.begin(algorithm, policy),
            self.engine(kind),
            torch.arange(len(self.data)),
        )
        for r in range(1, rounds + 1):
            steps = self.batches(everyone.tolist(), r)
            result = run_round(algorithm, state, fleet, everyone, steps, self.counts, engine)
            state, fleet = result.state, result.fleet
        return state, fleet


def tables(sizes: list[int], groups: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Examples]:
    """Five numbers per example; the rule that labels them turns with the client's group."""

    def one(client: int) -> Examples:
        rng = np.random.default_rng([7, client])
        x = rng.normal(size=(sizes[client], 5))
        y = ((x[:, 0] > 0).astype(int) + (x[:, 1] > 0) + groups[client]) % 3
        return Examples(torch.from_numpy(x).to(dtype), torch.from_numpy(y))

    return [one(client) for client in range(len(sizes))]


def images(
    sizes: list[int], groups: tuple[int, ...], shape: tuple[int, int, int], dtype: torch.dtype = torch.float64
) -> list[Examples]:
    """Small images whose brightness depends on label and group."""

    def one(client: int) -> Examples:
        rng = np.random.default_rng([8, client])
        y = rng.integers(3, size=sizes[client])
        x = 0.3 * rng.normal(size=(sizes[client], *shape)) + ((y + groups[client]) % 3)[:, None, None, None]
        return Examples(torch.from_numpy(x).to(dtype), torch.from_numpy(y))

    return [one(client) for client in range(len(sizes))]


def perceptron() -> nn.Module:
    """5 inputs, 3 classes, 6 hidden units."""
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


SIZES = [12, 16, 9, 20, 12, 8]
GROUPS = (0, 0, 0, 1, 1, 1)


def small(dtype: torch.dtype = torch.float64) -> SmallFederation:
    """Six clients of two groups on a perceptron."""
    return SmallFederation(perceptron, tables(SIZES, GROUPS, dtype), GROUPS, dtype)


class BareTask:
    """A task that can do nothing: tests fill in what a method should need."""

    layout: Any = None

    def _unasked(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the method asked its task for something that this test did not expect")

    gradient = slope_through = features = predict = losses = right = loss = train = descend = _unasked
