"""From the pixels of a pool to what a network is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.core.errors import DataError


@dataclass(frozen=True)
class Scale:
    """What normalises, inverts and fills images; tensors are [c, 1, 1] for images.

    Attributes:
        mean: Subtracted first.
        std: Divided by.
        ends: Sum of the darkest and the lightest value; a negative is ``ends - x``.
        fill: The background, which comes in from outside when an image is turned.
    """

    mean: Tensor
    std: Tensor
    ends: float
    fill: Tensor

    def apply(self, inputs: Tensor) -> Tensor:
        """Normalised float32 inputs."""
        return (inputs.to(torch.float32) - self.mean) / self.std


def scale_of(inputs: NDArray[Any], where: str) -> Scale:
    """The scale of training inputs; float inputs keep their own.

    A channel that is the same everywhere becomes 0.

    Args:
        inputs: [n, ...] those that are trained on.
        where: Begins the message.

    Raises:
        DataError: if uint8 inputs are not images.
    """
    is_image = inputs.ndim == 4
    if inputs.dtype == np.uint8 and not is_image:
        raise DataError(
            f"{where}: uint8 inputs of shape {inputs.shape}; expected images [n, channels, height, width], "
            "or float32 for anything else"
        )
    fill = torch.from_numpy(_background(inputs) if is_image else np.zeros(())).to(torch.float32)
    if inputs.dtype != np.uint8:
        return Scale(torch.tensor(0.0), torch.tensor(1.0), float(inputs.min()) + float(inputs.max()), fill)
    mean, std = _moments(inputs)
    return Scale(mean, torch.where(std > 0, std, 1.0), 255.0, fill)


def standard_scale(inputs: NDArray[np.float32]) -> Scale:
    """The scale that gives float training inputs [n, ...] mean 0 and standard deviation 1, per feature or channel."""
    axes = (0, 2, 3) if inputs.ndim == 4 else (0,)
    mean = inputs.mean(axis=axes, keepdims=True, dtype=np.float64)
    std = inputs.std(axis=axes, keepdims=True, dtype=np.float64)
    mean32, std32 = (torch.from_numpy(moment[0]).to(torch.float32) for moment in (mean, std))
    return Scale(mean32, torch.where(std32 > 0, std32, 1.0), 0.0, torch.tensor(0.0))


def _moments(images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, [c, 1, 1], from the counts of the 256 values: exact and quick."""
    values = np.arange(256.0)
    shares = np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])]) / np.prod(
        images[:, 0].shape
    )
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
    mean32, std32 = (torch.from_numpy(moment).to(torch.float32)[:, None, None] for moment in (mean, std))
    return mean32, std32


def _background(images: NDArray[Any]) -> NDArray[Any]:
    """Median of the border pixels per channel, [c, 1, 1]."""
    edges = (images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1])
    fill: NDArray[Any] = np.median(np.concatenate(edges, axis=2), axis=(0, 2))[:, None, None]
    return fill


def turn(images: Tensor, degrees: float, *, invert: bool, scale: Scale) -> Tensor:
    """Images [n, c, h, w] turned counter-clockwise and, if asked, made negative.

    Multiples of 90 degrees only move pixels; other angles interpolate and fill the corners with the background.

    Raises:
        DataError: if the inputs are not images, or not square where sides would be exchanged.
    """
    if invert or degrees:
        _check_images(images, degrees)
    turned = _quarters(images, degrees) if degrees % 90 == 0 else _interpolated(images, degrees, scale.fill)
    return scale.ends - turned.to(torch.float32) if invert else turned


def _check_images(images: Tensor, degrees: float) -> None:
    if images.ndim != 4:
        raise DataError(
            f"inputs of shape {list(images.shape[1:])} cannot be turned or inverted; expected images [c, h, w]. "
            "Choose another kind of partition"
        )
    if degrees % 180 and images.shape[2] != images.shape[3]:
        raise DataError(
            f"images of {images.shape[2]}x{images.shape[3]} pixels cannot be turned by {degrees:g} degrees; "
            "expected squares. Crop or pad them first"
        )


def _quarters(images: Tensor, degrees: float) -> Tensor:
    return torch.rot90(images, int(degrees // 90) % 4, dims=(2, 3)) if degrees else images


def _interpolated(images: Tensor, degrees: float, fill: Tensor) -> Tensor:
    """Bilinear; an output pixel at p shows the input at the same point turned back (y points down)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.to(torch.float32) - fill, grid, align_corners=False) + fill
