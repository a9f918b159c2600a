"""Networks by name: frozen dataclasses of options that build a plain nn.Module."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from fedmerge.core.registry import Registry


@runtime_checkable
class Network(Protocol):
    """A recipe for a network."""

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A module with fresh weights.

        Args:
            input_shape: Of one example, for example (1, 28, 28).
            num_classes: K, length of the output.
        """
        ...


NETWORKS: Registry[Network] = Registry("model")
network = NETWORKS.register
