"""Small convolutional network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedmerge.core.options import check_options, option
from fedmerge.models._layers import Norm, image_channels, norm_layer
from fedmerge.models._registry import network


@network("cnn")
@dataclass(frozen=True)
class Cnn:
    """Two strided 3x3 convolutions and a linear layer; about 10,000 parameters on 28 x 28 images."""

    channels: tuple[int, ...] = option((8, 16), at_least=1, help="of each convolution; each halves the image")
    norm: Norm = option("group", help="normalisation after each convolution")

    def __post_init__(self) -> None:
        check_options(self)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Convolution, normalisation and ReLU, each halving the image; then a linear layer."""
        width = image_channels("cnn", input_shape, 2 ** len(self.channels))
        _, height, breadth = input_shape
        layers: list[nn.Module] = []
        for channels in self.channels:
            layers += [nn.Conv2d(width, channels, 3, stride=2, padding=1), norm_layer(self.norm, channels), nn.ReLU()]
            width, height, breadth = channels, (height + 1) // 2, (breadth + 1) // 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * breadth, num_classes))
