"""Multi-layer perceptron."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from fedmerge.core.options import check_options, option
from fedmerge.models._registry import network


@network("mlp")
@dataclass(frozen=True)
class Mlp:
    """Multi-layer perceptron with ReLU, for inputs of any shape; no normalisation."""

    hidden: tuple[int, ...] = option((64,), at_least=1, help="width of each hidden layer; an empty list is linear")

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Flatten, then linear layers with ReLU between them."""
        widths = [math.prod(input_shape), *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
