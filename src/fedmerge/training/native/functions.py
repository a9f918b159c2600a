"""Convolution and GroupNorm by the compiled kernels, as functions that autograd can follow.

Images are kept in the order [height, width, channels, batch] ("lanes"): a tensor [B, C, H, W] with other steps, which
torch's own functions take like any other. Functions here take any order and give lanes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedmerge.training.native.build import NoKernelsError, library

TILE = 4
"""Outputs a side of a Winograd tile: 4 is fastest, 2 errs less than torch itself, 0 is the plain sum."""
MOST_EXAMPLES = 64
"""Batches beyond this no longer fit the cache between the steps of a kernel; torch takes them."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """A convolution and what follows it.

    Attributes:
        stride: Of the convolution, by height and width.
        padding: With zeros, by height and width.
        groups: Of the convolution.
        sets: Groups of the GroupNorm.
        eps: Added to the variance.
        relu: Whether ReLU follows.
        pool: 2 if the maximum of 2 x 2 pixels follows, else 1.
    """

    stride: Pair
    padding: Pair
    groups: int
    sets: int
    eps: float
    relu: bool
    pool: int


@cache
def _kernels() -> ctypes.CDLL:
    return library()


@cache
def available() -> str | None:
    """None if the kernels can be used, else the reason why not."""
    try:
        return None if _agrees() else "the compiled kernels do not agree with torch on this machine"
    except NoKernelsError as error:
        return str(error)


def _agrees() -> bool:
    """A small stage against torch, so that a compiler's fault ends in a reason and not in wrong numbers."""
    draws = torch.arange(16 * 3 * 6 * 6, dtype=torch.float32)
    x = (draws * 0.7).sin().view(16, 3, 6, 6)
    weight = (draws[:135] * 1.3).cos().view(5, 3, 3, 3)
    ours = conv2d_raw(x, weight, (1, 1), (1, 1), 1)
    return torch.allclose(ours, functional.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)


def _call(name: str, *values: Any) -> None:
    if getattr(_kernels(), name)(*values):
        raise MemoryError(f"no memory for the scratch space of {name}")


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def _width() -> int:
    """Examples in one vector."""
    return int(_kernels().fm_lanes())


def _stored(x: Tensor) -> Tensor:
    """The tensor as [H, W, C, L], L the batch rounded up to whole vectors; zeros beyond the batch."""
    lanes = x.permute(2, 3, 1, 0)
    if x.shape[0] % _width() == 0 and lanes.is_contiguous():
        return lanes
    batch, channels, height, width = x.shape
    stored = x.new_empty(height, width, channels, -(-batch // _width()) * _width())
    steps = (ctypes.c_int64 * 4)(*x.stride())
    sizes = [ctypes.c_int64(size) for size in (batch, channels, height, width, stored.shape[3])]
    _kernels().fm_to_lanes(_at(x), steps, *sizes, _at(stored))
    return stored


def _shown(stored: Tensor, batch: int) -> Tensor:
    """[H, W, C, L] as [B, C, H, W]."""
    return stored.permute(3, 2, 0, 1)[:batch]


@lru_cache(maxsize=1024)
def _shape(
    lanes: int, groups: int, sizes: Pair, weight: tuple[int, ...], steps: tuple[int, ...], stride: Pair, padding: Pair
) -> tuple[Any, Pair]:
    """The kernels' description of a convolution (the order of `Shape` in kernels.c), and the size of its output."""
    outer, inner, *kernel = weight
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(sizes, padding, kernel, stride, strict=True)]
    small = kernel == [3, 3] and stride == (1, 1) and max(padding) <= 2
    tile = TILE if small and inner >= 8 else 0
    numbers = (lanes, groups, inner, outer // groups, *sizes, *out, *kernel, *stride, *padding, *steps, tile)
    return (ctypes.c_int64 * len(numbers))(*numbers), (out[0], out[1])


def _shape_of(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, groups: int) -> tuple[Any, Pair]:
    height, width, _, lanes = x.shape
    return _shape(lanes, groups, (height, width), tuple(weight.shape), weight.stride(), stride, padding)


def _forward(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, groups: int) -> Tensor:
    shape, out = _shape_of(x, weight, stride, padding, groups)
    y = x.new_empty(*out, weight.shape[0], x.shape[3])
    _call("fm_conv_forward", shape, _at(x), _at(weight), _at(y))
    return y


def _add_bias(y: Tensor, bias: Tensor) -> None:
    sizes = [ctypes.c_int64(n) for n in (y.shape[0] * y.shape[1], y.shape[2], y.shape[3])]
    bias = bias.contiguous()
    _kernels().fm_add_bias(*sizes, _at(bias), _at(y))


def _backward(
    x: Tensor, weight: Tensor, dy: Tensor, stride: Pair, padding: Pair, groups: int, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Slopes on the input (as stored), the weight and the bias; None where not `needed`."""
    shape, _ = _shape_of(x, weight, stride, padding, groups)
    dx = dw = db = None
    if needed[0]:
        dx = torch.empty_like(x)
        _call("fm_conv_backward_data", shape, _at(dy), _at(weight), _at(dx))
    if needed[1]:
        dw = torch.empty_strided(weight.shape, weight.stride())
        _call("fm_conv_backward_weights", shape, _at(x), _at(dy), _at(dw))
    if needed[2]:
        db = dy.new_empty(dy.shape[2])
        sizes = [ctypes.c_int64(n) for n in (dy.shape[0] * dy.shape[1], dy.shape[2], dy.shape[3])]
        _call("fm_bias_slope", *sizes, _at(dy), _at(db))
    return dx, dw, db


def conv2d_raw(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, groups: int) -> Tensor:
    """The convolution without autograd and without asking whether the kernels can take it."""
    return _shown(_forward(_stored(x), weight, stride, padding, groups), x.shape[0])


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, groups: int
    ) -> Tensor:
        stored = _stored(x)
        y = _forward(stored, weight, stride, padding, groups)
        if bias is not None:
            _add_bias(y, bias)
        ctx.save_for_backward(stored, weight)
        ctx.how = stride, padding, groups
        return _shown(y, x.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        stored, weight = ctx.saved_tensors
        stride, padding, groups = ctx.how
        needed = ctx.needs_input_grad[:3]
        dx, dw, db = _backward(stored, weight, _stored(slope), stride, padding, groups, needed)
        return None if dx is None else _shown(dx, slope.shape[0]), dw, db, None, None, None


def _norm_shape(y: Tensor, stage: Stage) -> Any:
    height, width, channels, lanes = y.shape
    numbers = (lanes, channels, stage.sets, height, width, int(stage.relu), stage.pool)
    return (ctypes.c_int64 * len(numbers))(*numbers)


class _Stage(torch.autograd.Function):
    """Convolution, GroupNorm, and perhaps ReLU and a maximum of 2 x 2."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor, stage: Stage
    ) -> Tensor:
        stored = _stored(x)
        y = _forward(stored, weight, stage.stride, stage.padding, stage.groups)
        if bias is not None:
            _add_bias(y, bias)
        height, width, channels, lanes = y.shape
        mean, rate = y.new_empty(2, stage.sets, lanes)
        out = y.new_empty(height // stage.pool, width // stage.pool, channels, lanes)
        shape, eps = _norm_shape(y, stage), ctypes.c_double(stage.eps)
        _call("fm_norm_forward", shape, eps, _at(y), _at(gain), _at(shift), _at(mean), _at(rate), _at(out))
        ctx.save_for_backward(stored, weight, gain, shift, y, mean, rate)
        ctx.stage = stage
        return _shown(out, x.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        stored, weight, gain, shift, y, mean, rate = ctx.saved_tensors
        stage, dy, changes = ctx.stage, torch.empty_like(y), gain.new_empty(2, len(gain))
        given = (y, gain, shift, mean, rate, _stored(slope), dy, changes[0], changes[1])
        _call("fm_norm_backward", _norm_shape(y, stage), *map(_at, given))
        needed = ctx.needs_input_grad[:3]
        dx, dw, db = _backward(stored, weight, dy, stage.stride, stage.padding, stage.groups, needed)
        return None if dx is None else _shown(dx, slope.shape[0]), dw, db, changes[0], changes[1], None


def takes(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors: float32 images on the CPU, batches of a fitting size."""
    given = [x, *(tensor for tensor in tensors if tensor is not None)]
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in given)
    return plain and x.ndim == 4 and x.numel() > 0 and x.shape[0] <= MOST_EXAMPLES and available() is None


def conv2d(
    inputs: Float[Tensor, "B I H W"],
    weight: Float[Tensor, "O J h w"],
    bias: Float[Tensor, " O"] | None = None,
    padding: int | Pair = 0,
    groups: int = 1,
    stride: int | Pair = 1,
) -> Float[Tensor, "B O X Y"]:
    """``torch.nn.functional.conv2d`` by the kernels where they can take it, else by torch.

    A group's numbers do not depend on the other groups: clients folded into channels get the bits they get alone.
    """
    padding, stride = _pair(padding), _pair(stride)
    if not (takes(inputs, weight, bias) and _fits(inputs, weight, padding, groups)):
        return functional.conv2d(inputs, weight, bias, stride, padding, groups=groups)
    y: Tensor = _Convolution.apply(inputs, weight, bias, stride, padding, groups)  # type: ignore[no-untyped-call]
    return y


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def _fits(inputs: Tensor, weight: Tensor, padding: Pair, groups: int) -> bool:
    """Whether the sizes agree and there is an output; torch words the complaint where they do not."""
    sizes = zip(inputs.shape[2:], padding, weight.shape[2:], strict=True)
    agree = inputs.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    return agree and all(size + 2 * pad >= kernel for size, pad, kernel in sizes)


def staged(
    inputs: Float[Tensor, "B I H W"],
    weight: Float[Tensor, "O J h w"],
    bias: Float[Tensor, " O"] | None,
    gain: Float[Tensor, " O"],
    shift: Float[Tensor, " O"],
    stage: Stage,
) -> Float[Tensor, "B O X Y"]:
    """Convolution, GroupNorm with `gain` and `shift`, and what else the stage names, in one step.

    Only for what `takes` says yes to.
    """
    y: Tensor = _Stage.apply(inputs, weight, bias, gain, shift, stage)  # type: ignore[no-untyped-call]
    return y
