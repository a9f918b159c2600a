"""Convolutions and norms by the compiled kernels, as functions that autograd can follow.

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
FEWEST_EXAMPLES, MOST_EXAMPLES = 8, 128
"""Sizes of the batches for which the kernels are measured to be faster than torch; torch takes all others."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """A convolution and what follows it.

    Attributes:
        stride: Of the convolution, by height and width.
        padding: With zeros, by height and width.
        groups: Of the convolution.
        sets: Groups of channels with statistics of their own; 0 if no norm follows, and then nothing does.
        shared: Whether the batch shares statistics (BatchNorm in training); else each example has its own (GroupNorm).
        eps: Added to the variance.
        relu: Whether ReLU follows.
        pool: 2 if the maximum of 2 x 2 pixels follows, else 1.
    """

    stride: Pair
    padding: Pair
    groups: int
    sets: int = 0
    shared: bool = False
    eps: float = 0.0
    relu: bool = False
    pool: int = 1


@cache
def _kernels() -> ctypes.CDLL:
    """The library, told what each function takes: pointers and sizes are plain integers on this side."""
    found, size, at = library(), ctypes.c_int64, ctypes.c_void_p
    found.fm_keep_memory()
    found.fm_lanes.restype = size
    found.fm_to_lanes.argtypes = [at, at, *[size] * 5, at]
    found.fm_stage_forward.argtypes = [at, at, ctypes.c_double, *[at] * 10]
    found.fm_stage_backward.argtypes = [at] * 15
    found.fm_peak_forward.argtypes = found.fm_peak_backward.argtypes = [size, size, at, at, at]
    return found


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
    ours = _shown(_run(_stored(x), weight, None, None, _alone((1, 1), (1, 1), 1), 16)[0], 16)
    return torch.allclose(ours, functional.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)


def _check(short_of_memory: int) -> None:
    if short_of_memory:
        raise MemoryError("no memory for the scratch space of a convolution")


@cache
def _width() -> int:
    """Examples in one vector."""
    width: int = _kernels().fm_lanes()
    return width


def _stored(x: Tensor) -> Tensor:
    """The tensor as [H, W, C, L], L the batch rounded up to whole vectors; zeros beyond the batch."""
    lanes = x.permute(2, 3, 1, 0)
    if x.shape[0] % _width() == 0 and lanes.is_contiguous():
        return lanes
    batch, channels, height, width = x.shape
    stored = x.new_empty(height, width, channels, -(-batch // _width()) * _width())
    steps = (ctypes.c_int64 * 4)(*x.stride())
    _kernels().fm_to_lanes(x.data_ptr(), steps, batch, channels, height, width, stored.shape[3], stored.data_ptr())
    return stored


def _shown(stored: Tensor, batch: int) -> Tensor:
    """[H, W, C, L] as [B, C, H, W]."""
    return stored.permute(3, 2, 0, 1)[:batch]


Ints = Any  # an array of C integers


@lru_cache(maxsize=1024)
def _shapes(
    stage: Stage, x: tuple[int, ...], weight: tuple[int, ...], steps: tuple[int, ...], batch: int
) -> tuple[Ints, Ints | None, Pair, Pair]:
    """The kernels' `Shape` and `Norm`, and the sizes of the convolution's output and of the stage's.

    Args:
        stage: What is done.
        x: Shape of the stored input, [H, W, C, L].
        weight: Shape of the weight.
        steps: Strides of the weight.
        batch: Number of examples, at most L.
    """
    (height, width, _, lanes), (outer, inner, *kernel) = x, weight
    given = zip((height, width), stage.padding, kernel, stage.stride, strict=True)
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in given]
    small = kernel == [3, 3] and stage.stride == (1, 1) and max(stage.padding) <= 2
    tile = TILE if small and inner >= 8 else 0
    sizes = (inner, outer // stage.groups, height, width, *out, *kernel)
    shape = _ints(lanes, stage.groups, *sizes, *stage.stride, *stage.padding, *steps, tile)
    each = (lanes, outer, stage.sets, *out, int(stage.relu), stage.pool, batch if stage.shared else 0)
    norm = _ints(*each) if stage.sets else None
    return shape, norm, (out[0], out[1]), (out[0] // stage.pool, out[1] // stage.pool)


def _ints(*numbers: int) -> Ints:
    return (ctypes.c_int64 * len(numbers))(*numbers)


@dataclass(frozen=True)
class Affine:
    """What a norm multiplies by and adds, [channels] each.

    BatchNorm leaves mean and unbiased variance of the batch in `moments`, [2, channels].
    """

    gain: Tensor
    shift: Tensor
    moments: Tensor | None = None


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Affine | None, stage: Stage, batch: int
) -> tuple[Tensor, Tensor | None]:
    """The stage's output as stored, and what backward needs of a norm: y, mean and rate, one after another."""
    shape, norm_shape, size, out_size = _shapes(stage, x.shape, weight.shape, weight.stride(), batch)
    channels, lanes = weight.shape[0], x.shape[3]
    out = x.new_empty(*out_size, channels, lanes)
    given = (x.data_ptr(), weight.data_ptr(), bias.data_ptr() if bias is not None else None)
    if norm is None:
        _check(_kernels().fm_stage_forward(shape, None, 0.0, *given, None, None, out.data_ptr(), *[None] * 4))
        return out, None
    kept = x.new_empty((size[0] * size[1] * channels + 2 * stage.sets) * lanes)
    inside = (norm.gain.data_ptr(), norm.shift.data_ptr(), *_parts(kept, stage.sets * lanes))
    moments = norm.moments.data_ptr() if norm.moments is not None else None
    _check(_kernels().fm_stage_forward(shape, norm_shape, stage.eps, *given, *inside, moments, out.data_ptr()))
    return out, kept


def _parts(kept: Tensor, statistics: int) -> tuple[int, int, int]:
    """Where y, mean and rate begin."""
    start, end = kept.data_ptr(), kept.data_ptr() + 4 * kept.numel()
    return start, end - 8 * statistics, end - 4 * statistics


class _Stage(torch.autograd.Function):
    """A convolution, and what follows it if the stage has sets: a norm, and perhaps ReLU and a maximum of 2 x 2."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        shift: Tensor | None,
        moments: Tensor | None,
        stage: Stage,
    ) -> Tensor:
        stored = _stored(x)
        norm = None if gain is None or shift is None else Affine(gain, shift, moments)
        out, kept = _run(stored, weight, bias, norm, stage, x.shape[0])
        ctx.save_for_backward(stored, weight, gain, shift, kept)
        ctx.stage = stage
        return _shown(out, x.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gain, shift, kept = ctx.saved_tensors
        stage, needed, dout = ctx.stage, ctx.needs_input_grad, _stored(slope)
        shape, norm, _, _ = _shapes(stage, x.shape, weight.shape, weight.stride(), slope.shape[0])
        dx = torch.empty_like(x) if needed[0] else None
        dw = torch.empty_like(weight) if needed[1] else None
        db = x.new_empty(weight.shape[0]) if needed[2] else None
        dgain = dshift = None
        inside: tuple[int | None, ...] = (None,) * 5
        if norm is not None:
            dgain, dshift = torch.empty_like(gain), torch.empty_like(shift)
            inside = (gain.data_ptr(), shift.data_ptr(), *_parts(kept, stage.sets * x.shape[3]))
        slopes = [None if tensor is None else tensor.data_ptr() for tensor in (dx, dw, db, dgain, dshift)]
        given = (x.data_ptr(), weight.data_ptr(), *inside, dout.data_ptr(), *slopes)
        _check(_kernels().fm_stage_backward(shape, norm, *given))
        return None if dx is None else _shown(dx, slope.shape[0]), dw, db, dgain, dshift, None, None


def takes(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors: float32 images on the CPU, batches of a fitting size."""
    given = [x, *(tensor for tensor in tensors if tensor is not None)]
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in given)
    fits = x.ndim == 4 and x.numel() > 0 and FEWEST_EXAMPLES <= x.shape[0] <= MOST_EXAMPLES
    return plain and fits and available() is None


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
    return staged(inputs, weight, bias, None, _alone(stride, padding, groups))


@cache
def _alone(stride: Pair, padding: Pair, groups: int) -> Stage:
    return Stage(stride=stride, padding=padding, groups=groups)


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
    norm: Affine | None,
    stage: Stage,
) -> Float[Tensor, "B O X Y"]:
    """Convolution, norm, and what else the stage names, in one step.

    Only for what `takes` says yes to.
    """
    inside = (None, None, None) if norm is None else (norm.gain, norm.shift, norm.moments)
    y: Tensor = _Stage.apply(inputs, weight, bias, *inside, stage)  # type: ignore[no-untyped-call]
    return y


class _Peak(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        stored = _stored(x)
        height, width, channels, lanes = stored.shape
        peaks, places = stored.new_empty(1, 1, channels, lanes), torch.empty(channels * lanes, dtype=torch.int32)
        given = [tensor.data_ptr() for tensor in (stored, peaks, places)]
        _kernels().fm_peak_forward(height * width, channels * lanes, *given)
        ctx.save_for_backward(places)
        ctx.stored_shape = stored.shape
        return _shown(peaks, x.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (places,), (height, width, channels, lanes) = ctx.saved_tensors, ctx.stored_shape
        stored = _stored(slope)
        dx = stored.new_empty(ctx.stored_shape)
        given = [tensor.data_ptr() for tensor in (places, stored, dx)]
        _kernels().fm_peak_backward(height * width, channels * lanes, *given)
        return _shown(dx, slope.shape[0])


def largest(inputs: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C 1 1"]:
    """The largest pixel of each channel: ``torch.nn.functional.adaptive_max_pool2d`` to one pixel."""
    if not takes(inputs):
        return functional.adaptive_max_pool2d(inputs, 1)
    y: Tensor = _Peak.apply(inputs)  # type: ignore[no-untyped-call]
    return y
