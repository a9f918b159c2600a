"""Pieces that our networks share."""

from __future__ import annotations

from typing import Literal

from torch import nn

from fedmerge.core.errors import UsageError

Norm = Literal["group", "batch", "none"]


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """GroupNorm with groups of 4 channels or more (as many groups as divide evenly), BatchNorm, or nothing."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        groups = max(g for g in range(1, max(1, channels // 4) + 1) if channels % g == 0)
        return nn.GroupNorm(groups, channels)
    return nn.Identity()


def image_channels(name: str, input_shape: tuple[int, ...], smallest: int) -> int:
    """Number of channels of an image input.

    Raises:
        UsageError: if the input is not an image of at least `smallest` pixels a side.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise UsageError(
            f"model {name!r} needs images [channels, height, width] of at least {smallest} x {smallest} pixels; "
            f"got inputs of shape {list(input_shape)}; use model 'mlp' for other inputs"
        )
    return input_shape[0]
