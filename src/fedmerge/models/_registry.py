"""Networks by name: frozen dataclasses of options that build a plain nn.Module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

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


def accepted(factory: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords on offer that a function or class takes by name.

    >>> accepted(lambda num_classes: None, {"input_shape": (1, 8, 8), "num_classes": 10})
    {'num_classes': 10}
    """
    parameters = inspect.signature(factory).parameters
    return {name: value for name, value in offered.items() if name in parameters}
