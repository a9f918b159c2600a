"""ResNet-9."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.models._layers import Norm, image_channels, norm_layer
from fedmerge.models._registry import network


def _convolution(fan_in: int, fan_out: int, norm: Norm, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=norm == "none"),
        norm_layer(norm, fan_out),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


class Residual(nn.Module):
    """x + f(x).

    Args:
        inner: f, which keeps the shape.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Adds the input to what the inner module makes of it."""
        shifted: Tensor = x + self.inner(x)
        return shifted


@network("resnet9")
@dataclass(frozen=True)
class ResNet9:
    """ResNet-9: eight 3x3 convolutions, two of them pairs with a shortcut, and a linear layer.

    Channels 8-16-32-64 are the size that the FedMerge paper uses; BatchNorm is its choice, GroupNorm ours.
    """

    channels: tuple[int, ...] = option((8, 16, 32, 64), at_least=1, help="of the four stages")
    norm: Norm = option("group", help="normalisation after each convolution")

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.channels) != 4:
            raise UsageError(f"ResNet9.channels: got {list(self.channels)}; expected four numbers")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Stages with pooling and shortcuts, global maximum, linear layer."""
        first = image_channels("resnet9", input_shape, 8)
        a, b, c, d = self.channels
        return nn.Sequential(
            _convolution(first, a, self.norm),
            _convolution(a, b, self.norm, pool=True),
            Residual(nn.Sequential(_convolution(b, b, self.norm), _convolution(b, b, self.norm))),
            _convolution(b, c, self.norm, pool=True),
            _convolution(c, d, self.norm, pool=True),
            Residual(nn.Sequential(_convolution(d, d, self.norm), _convolution(d, d, self.norm))),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(d, num_classes),
        )
