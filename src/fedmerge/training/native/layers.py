"""A network whose convolutions and the norms behind them go through the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from fedmerge.core.vector import twin
from fedmerge.training.native.functions import Affine, Stage, available, conv2d, largest, staged, takes


class Convolution(nn.Module):
    """A convolution with the tensors of `plain`, under the same names.

    Args:
        plain: What `is_plain` accepts.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self._padding, self._groups, self._stride = _padding(plain), plain.groups, _stride(plain)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of images [B, C, H, W]."""
        return conv2d(x, self.weight, self.bias, self._padding, self._groups, self._stride)


class Largest(nn.Module):
    """The largest pixel of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 1, 1]."""
        return largest(x)


class Staged(nn.Module):
    """The children of a `nn.Sequential`, under the same names; runs of convolution, norm, ReLU and maximum in one step.

    Args:
        children: By name, in order.
    """

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self._plan = list(_runs(list(children.values())))

    def forward(self, x: Tensor) -> Tensor:
        """One child after another."""
        children = _children(self)
        for start, stop, stage in self._plan:
            run = children[start:stop]
            x = _in_order(run, x) if stage is None else _fused(run, x, stage)
        return x


def accelerated(module: nn.Module) -> nn.Module:
    """A copy that computes the same by the compiled kernels wherever they fit, or `module` itself where there are none.

    Parameters and buffers keep their names, shapes and order; frozen parameters are shared with `module`. Training
    needs first derivatives only: the result is not for ``torch.func`` or second derivatives.
    """
    if available() is not None:
        return module
    return _swapped(twin(module))


def _swapped(module: nn.Module) -> nn.Module:
    if type(module) is nn.Sequential and not _is_watched(module) and _stages(module):
        inside = dict(zip(module._modules, _children(module), strict=True))
        fused = {
            name for start, stop, stage in _runs(list(inside.values())) if stage for name in list(inside)[start:stop]
        }
        kept = {name: child if name in fused else _swapped(child) for name, child in inside.items()}
        swapped: nn.Module = Staged(kept)
        return swapped.train(module.training)
    if isinstance(module, nn.Conv2d):
        return Convolution(module).train(module.training) if is_plain(module) else module
    if _is_largest(module):
        return Largest()
    for name, child in module.named_children():
        setattr(module, name, _swapped(child))
    return module


def _children(module: nn.Module) -> list[nn.Module]:
    """In order, with a module that stands twice; `nn.Module.children` would leave out the second."""
    return [child for child in module._modules.values() if child is not None]


def is_plain(module: nn.Module) -> bool:
    """Whether the kernels know this convolution: of torch's own class, undilated, padded with zeros, without hooks."""
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and tuple(module.dilation) == (1, 1)
        and not _is_watched(module)
    )


def _is_watched(module: nn.Module) -> bool:
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    ) or hasattr(module, "parametrizations")


def _stages(module: nn.Sequential) -> bool:
    return any(stage for _, _, stage in _runs(_children(module)))


def _runs(children: list[nn.Module]) -> Iterator[tuple[int, int, Stage | None]]:
    """Splits children into runs; each with what it is as a stage, or None for a child alone."""
    at = 0
    while at < len(children):
        stage, size = _stage_at(children[at:])
        yield at, at + size, stage
        at += size


def _stage_at(children: list[nn.Module]) -> tuple[Stage | None, int]:
    """The stage that these children begin with, and how many they are."""
    convolution, norm = [*children, None, None][:2]
    if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, (nn.GroupNorm, nn.BatchNorm2d)):
        return None, 1
    if not is_plain(convolution) or not _is_norm(norm):
        return None, 1
    size = 2
    relu = len(children) > size and type(children[size]) is nn.ReLU and not _is_watched(children[size])
    size += relu
    pool = len(children) > size and _halves(children[size])
    size += pool
    stage = Stage(
        stride=_stride(convolution),
        padding=_padding(convolution),
        groups=convolution.groups,
        sets=norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.num_features,
        shared=isinstance(norm, nn.BatchNorm2d),
        eps=norm.eps,
        relu=relu,
        pool=2 if pool else 1,
    )
    return stage, size


def _is_norm(module: nn.GroupNorm | nn.BatchNorm2d) -> bool:
    """Whether the kernels know this norm: GroupNorm, or BatchNorm with a running mean, both with gain and shift."""
    if not module.affine or _is_watched(module):
        return False
    if type(module) is nn.BatchNorm2d:
        return module.track_running_stats and module.momentum is not None
    return type(module) is nn.GroupNorm


def _halves(module: nn.Module) -> bool:
    """Whether this is the maximum of 2 x 2 pixels."""
    if type(module) is not nn.MaxPool2d or _is_watched(module):
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    plain = [size if isinstance(size, tuple) else (size, size) for size in sizes]
    return plain == [(2, 2), (2, 2), (0, 0), (1, 1)] and not module.ceil_mode and not module.return_indices


def _is_largest(module: nn.Module) -> bool:
    if type(module) is not nn.AdaptiveMaxPool2d or _is_watched(module):
        return False
    return module.output_size in {1, (1, 1)} and not module.return_indices


def _padding(module: nn.Conv2d) -> tuple[int, int]:
    height, width = map(int, module.padding)
    return height, width


def _stride(module: nn.Conv2d) -> tuple[int, int]:
    height, width = module.stride
    return height, width


def _in_order(children: list[nn.Module], x: Tensor) -> Tensor:
    for child in children:
        x = child(x)
    return x


def _fused(run: list[nn.Module], x: Tensor, stage: Stage) -> Tensor:
    """The run as one step, or one by one where the kernels cannot take what they are given."""
    convolution, norm = cast("tuple[nn.Conv2d, nn.GroupNorm | nn.BatchNorm2d]", run[:2])
    weight, bias, gain, shift = convolution.weight, convolution.bias, norm.weight, norm.bias
    if not takes(x, weight, bias, gain, shift) or x.shape[1] != convolution.in_channels:
        return _in_order(run, x)
    if isinstance(norm, nn.GroupNorm):
        return staged(x, weight, bias, Affine(gain, shift), stage)
    if not norm.training or len(x) < 2:
        return _in_order(run, x)
    moments = gain.new_empty(2, norm.num_features)
    out = staged(x, weight, bias, Affine(gain, shift, moments), stage)
    _remember(norm, moments)
    return out


@torch.no_grad()
def _remember(norm: nn.BatchNorm2d, moments: Tensor) -> None:
    """Moves the running mean and variance towards this batch's."""
    momentum = cast("float", norm.momentum)
    cast("Tensor", norm.running_mean).lerp_(moments[0], momentum)
    cast("Tensor", norm.running_var).lerp_(moments[1], momentum)
    cast("Tensor", norm.num_batches_tracked).add_(1)
