"""A network whose convolutions and the norms behind them go through the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from fedmerge.core.vector import twin
from fedmerge.training.native.functions import Link, Stage, available, chained, conv2d, largest, takes

Shortcuts = tuple[type[nn.Module], ...]


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


@dataclass(frozen=True)
class Run:
    """Layers that make a stage.

    Attributes:
        stage: What they do.
        layers: In order: a convolution, a norm, and perhaps ReLU and a maximum.
    """

    stage: Stage
    layers: list[nn.Module]

    def link(self) -> Link:
        """The stage with its tensors; BatchNorm gets room for its moments."""
        convolution, norm = self.layers[0]._parameters, self.layers[1]._parameters  # faster than the attributes
        weight, gain = cast("Tensor", convolution["weight"]), cast("Tensor", norm["weight"])
        moments = gain.new_empty(2, len(gain)) if self.stage.shared else None
        return Link(self.stage, weight, convolution["bias"], gain, norm["bias"], moments)

    def is_open(self, x: Tensor) -> bool:
        """Whether the kernels know the norm in this mode: BatchNorm only in training, with examples to compare."""
        return not self.stage.shared or (self.layers[1].training and len(x) > 1)


class Staged(nn.Module):
    """The children of a `nn.Sequential`, under the same names; stages that follow each other are one step.

    Args:
        children: By name, in order.
        shortcuts: As for `accelerated`.
    """

    def __init__(self, children: dict[str, nn.Module], shortcuts: Shortcuts = ()) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self._plan = _plan(_leaves(self), shortcuts)

    def forward(self, x: Tensor) -> Tensor:
        """One part of the plan after another."""
        for part in self._plan:
            x = part(x) if isinstance(part, nn.Module) else _in_one(part, x)
        return x


def _in_one(runs: list[Run], x: Tensor) -> Tensor:
    """The runs as one step, or layer by layer where the kernels cannot take what they are given."""
    links = [run.link() for run in runs]
    if not takes(x, *links) or not all(run.is_open(x) for run in runs):
        return _one_by_one(runs, x)
    out = chained(x, links)
    for run, link in zip(runs, links, strict=True):
        if link.moments is not None:
            _remember(cast("nn.BatchNorm2d", run.layers[1]), link.moments)
    return out


def _one_by_one(runs: list[Run], x: Tensor) -> Tensor:
    inputs = []
    for run in runs:
        inputs.append(x)
        for layer in run.layers:
            x = layer(x)
        if run.stage.spans:
            x = inputs[-run.stage.spans] + x
    return x


@torch.no_grad()
def _remember(norm: nn.BatchNorm2d, moments: Tensor) -> None:
    """Moves the running mean and variance towards this batch's."""
    momentum = cast("float", norm.momentum)
    cast("Tensor", norm.running_mean).lerp_(moments[0], momentum)
    cast("Tensor", norm.running_var).lerp_(moments[1], momentum)
    cast("Tensor", norm.num_batches_tracked).add_(1)


def accelerated(module: nn.Module, shortcuts: Shortcuts = ()) -> nn.Module:
    """A copy that computes the same by the compiled kernels wherever they fit, or `module` itself where there are none.

    Parameters and buffers keep their names, shapes and order; frozen parameters are shared with `module`. Training
    needs first derivatives only: the result is not for ``torch.func`` or second derivatives. Hooks that are added to it
    later see layers that are left as they were, not those that a step has taken in.

    Args:
        module: Any network.
        shortcuts: Classes of modules that have one child and return ``x + child(x)``. Those around stages join the step
            of their neighbours.
    """
    if available() is not None:
        return module
    return _swapped(twin(module), shortcuts)


def _swapped(module: nn.Module, shortcuts: Shortcuts) -> nn.Module:
    if _is_open(module):
        return _swapped_sequence(module, shortcuts)
    if isinstance(module, nn.Conv2d):
        return Convolution(module).train(module.training) if is_plain(module) else module
    if _is_largest(module):
        return Largest()
    for name, child in module.named_children():
        setattr(module, name, _swapped(child, shortcuts))
    return module


def _swapped_sequence(module: nn.Module, shortcuts: Shortcuts) -> nn.Module:
    """A sequence with its stages planned and every other layer swapped; its own class where it has no stage."""
    runs = [run for part in _plan(_leaves(module), shortcuts) if isinstance(part, list) for run in part]
    _swap_leaves(module, {id(layer) for run in runs for layer in run.layers}, shortcuts)
    if not runs:
        return module
    children = dict(zip(module._modules, _children(module), strict=True))
    staged: nn.Module = Staged(children, shortcuts)
    return staged.train(module.training)


def _swap_leaves(module: nn.Module, kept: set[int], shortcuts: Shortcuts) -> None:
    for name, child in list(module._modules.items()):
        if child is not None and _is_open(child):
            _swap_leaves(child, kept, shortcuts)
        elif child is not None and id(child) not in kept and _spanned(child, shortcuts) is None:
            module._modules[name] = _swapped(child, shortcuts)


def _is_open(module: nn.Module) -> bool:
    """Whether this is a sequence and nothing else."""
    return type(module) is nn.Sequential and not _is_watched(module)


def _children(module: nn.Module) -> list[nn.Module]:
    """In order, with a module that stands twice; `nn.Module.children` would leave out the second."""
    return [child for child in module._modules.values() if child is not None]


def _leaves(module: nn.Module) -> list[nn.Module]:
    """The layers of a sequence and of the sequences in it."""
    nested = [_leaves(child) if _is_open(child) else [child] for child in _children(module)]
    return [leaf for part in nested for leaf in part]


def _plan(layers: list[nn.Module], shortcuts: Shortcuts) -> list[nn.Module | list[Run]]:
    """Layers that are called as they are, and stages that follow each other."""
    plan: list[nn.Module | list[Run]] = []
    for part in _parts(layers, shortcuts):
        if isinstance(part, list) and plan and isinstance(plan[-1], list):
            plan[-1] += part
        else:
            plan.append(part)
    return plan


def _parts(layers: list[nn.Module], shortcuts: Shortcuts) -> Iterator[nn.Module | list[Run]]:
    at = 0
    while at < len(layers):
        run, spanned = _run_at(layers[at:]), _spanned(layers[at], shortcuts)
        yield spanned or (layers[at] if run is None else [run])
        at += 1 if run is None else len(run.layers)


def _spanned(module: nn.Module, shortcuts: Shortcuts) -> list[Run] | None:
    """The stages that a shortcut spans, the last of which adds it; None for any other module."""
    children = _children(module)
    if type(module) not in shortcuts or _is_watched(module) or len(children) != 1 or not _is_open(children[0]):
        return None
    runs: list[Run] = []
    for part in _parts(_leaves(children[0]), ()):
        if not isinstance(part, list):
            return None
        runs += part
    last = replace(runs[-1], stage=replace(runs[-1].stage, spans=len(runs)))
    return [*runs[:-1], last]


def _run_at(layers: list[nn.Module]) -> Run | None:
    """The stage that these layers begin with."""
    convolution, norm = [*layers, None, None][:2]
    if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, (nn.GroupNorm, nn.BatchNorm2d)):
        return None
    if not is_plain(convolution) or not _is_plain_norm(norm):
        return None
    relu = len(layers) > 2 and type(layers[2]) is nn.ReLU and not _is_watched(layers[2])
    pool = len(layers) > 2 + relu and _halves(layers[2 + relu])
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
    return Run(stage, layers[: 2 + relu + pool])


def is_plain(module: nn.Module) -> bool:
    """Whether the kernels know this convolution: of torch's own class, undilated, padded with zeros, without hooks."""
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and tuple(module.dilation) == (1, 1)
        and not _is_watched(module)
    )


def _is_plain_norm(module: nn.GroupNorm | nn.BatchNorm2d) -> bool:
    """Whether the kernels know this norm: GroupNorm, or BatchNorm with a running mean, both with gain and shift."""
    if not module.affine or module.eps <= 0 or _is_watched(module):
        return False
    if type(module) is nn.BatchNorm2d:
        return module.track_running_stats and module.momentum is not None
    return type(module) is nn.GroupNorm


def _is_watched(module: nn.Module) -> bool:
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    ) or hasattr(module, "parametrizations")


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
