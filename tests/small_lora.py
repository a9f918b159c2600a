"""A small network with LoRA adapters under PEFT's names, on a frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from small_federation import GROUPS, SIZES, SmallFederation, tables


class Adapted(nn.Module):
    """W x + B A x with W frozen; B starts at 0, as PEFT's does."""

    def __init__(self, fan_in: int, fan_out: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(fan_in, fan_out).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(fan_in, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, fan_out, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.lora_B["default"](self.lora_A["default"](x))
        return y


def adapted(sizes: Sequence[int] = (5, 6, 4), rank: int = 2, classes: int = 3) -> nn.Module:
    """Adapted layers with tanh between them, then a plain output layer."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [Adapted(fan_in, fan_out, rank), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def small_lora() -> SmallFederation:
    """Six clients of two groups; of 57 numbers that are trained 42 are factors of two layers."""
    return SmallFederation(adapted, tables(SIZES, GROUPS), GROUPS, torch.float64)
