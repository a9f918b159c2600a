"""Local-only training: what each client reaches without a federation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.protocol import Batches, Cost, Draw, Federation, Task, Update


@dataclass(frozen=True)
class NoState:
    """The server holds nothing.

    Attributes:
        clients: [N] empty rows, one per client.
    """

    clients: Float[Tensor, "N 0"]


@algorithm("local", citation="baseline: no communication")
@dataclass(frozen=True)
class Local:
    """Every client trains alone; nothing is sent. A federation is worth joining where it beats this.

    Sends nothing; each client keeps its own model (P) between rounds.
    """

    def init(self, draw: Draw, federation: Federation, seed: int) -> NoState:
        """Nothing."""
        return NoState(torch.empty(federation.num_clients, 0))

    def start(self, params: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """The common first draw, as for every other method."""
        return params

    def send(self, state: NoState, clients: Int[Tensor, " C"]) -> tuple[()]:
        """Nothing."""
        return ()

    def train(
        self,
        down: tuple[()],
        local: Float[Tensor, " P"],
        batches: Batches,
        task: Task,
    ) -> tuple[Update, Float[Tensor, " P"]]:
        """Trains the client's own model on; the update is empty."""
        return Update(local[:0]), task.train(local, batches)

    def receive(
        self,
        state: NoState,
        clients: Int[Tensor, " C"],
        update: Update,
        num_examples: Int[Tensor, " C"],
    ) -> NoState:
        """Nothing."""
        return state

    def personal(
        self,
        down: tuple[()],
        local: Float[Tensor, " P"],
        batches: Batches,
        task: Task,
    ) -> Float[Tensor, " P"]:
        """The client's own model."""
        return local

    def cost(self, state: NoState) -> Cost:
        """Nothing travels."""
        return Cost(bytes_down=0, bytes_up=0, server_floats=0)

    def describe(self, state: NoState) -> dict[str, Any]:
        """No server models."""
        return {"num_models": 0}

    mixing = _parts.no_mixing
