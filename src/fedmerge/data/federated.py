"""Clients with their own train, validation and test examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from fedmerge.data.partition import Partition


class Examples(NamedTuple):
    """Inputs and labels, side by side.

    Attributes:
        inputs: [n, ...]; images are channel first, [n, c, h, w].
        targets: [n] class indices.
    """

    inputs: Float[Tensor, "n ..."]
    targets: Int[Tensor, " n"]


@dataclass(frozen=True)
class ClientData:
    """One client's own examples; no item is in two of its splits."""

    name: str
    train: Examples
    validation: Examples
    test: Examples

    @property
    def num_train(self) -> int:
        """n_i, the client's weight in every average."""
        return len(self.train.targets)


@dataclass(frozen=True)
class FederatedData:
    """What a federation trains on.

    Attributes:
        clients: In client-id order; a client's index is its id everywhere.
        class_names: [K].
        groups: [N] the true group of each client where it is known (oracle, cluster recovery), else None.
        partition: How the items were dealt out; None for a user's own clients.
        source: One line that names the data and the partition.
    """

    clients: tuple[ClientData, ...]
    class_names: tuple[str, ...]
    groups: tuple[int, ...] | None = None
    partition: Partition | None = None
    source: str = "your data"

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, for example (1, 28, 28)."""
        return tuple(self.clients[0].train.inputs.shape[1:])

    def sha256(self) -> str:
        """Hash of every client's examples and splits: runs may be compared when it is equal."""
        digest = hashlib.sha256()
        for client in self.clients:
            digest.update(client.name.encode())
            for split in (client.train, client.validation, client.test):
                for tensor in split:
                    digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
                    digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Examples one after another."""
    return Examples(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))
