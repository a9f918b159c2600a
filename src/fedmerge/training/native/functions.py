"""Convolutions and norms by the compiled kernels, as functions that autograd can follow.

Images are kept in the order [height, width, channels, batch] ("lanes"): a tensor [B, C, H, W] with other steps, which
torch's own functions take like any other. Functions here take any order and give lanes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedmerge.core.memory import keep_freed
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
        spans: Stages, this one the last, whose first input is added to the output; 0 if nothing is.
    """

    stride: Pair
    padding: Pair
    groups: int
    sets: int = 0
    shared: bool = False
    eps: float = 0.0
    relu: bool = False
    pool: int = 1
    spans: int = 0


@cache
def _kernels() -> ctypes.CDLL:
    """The library, told what each function takes: pointers and sizes are plain integers on this side."""
    found, size, at = library(), ctypes.c_int64, ctypes.c_void_p
    keep_freed()  # the kernels' working memory is fetched from the system in every step else, a tenth of its time
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
    ours = _shown(_run(_stored(x), Link(_alone((1, 1), (1, 1), 1), weight), 16)[0], 16)
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


class Sizes(NamedTuple):
    """A stage in numbers.

    Attributes:
        shape: The kernels' `Shape`.
        norm: The kernels' `Norm`, if one follows.
        inside: Floats of the convolution's output.
        statistics: Floats of the norm's means.
        out: Shape of the stage's output as stored, [H, W, C, L].
    """

    shape: Ints
    norm: Ints | None
    inside: int
    statistics: int
    out: tuple[int, int, int, int]


@lru_cache(maxsize=1024)
def _sizes(stage: Stage, x: tuple[int, ...], weight: tuple[int, ...], steps: tuple[int, ...], batch: int) -> Sizes:
    """Sizes for a stored input of shape `x`, [H, W, C, L], with `batch` examples, and a weight with strides `steps`."""
    (height, width, _, lanes), (outer, inner, *kernel) = x, weight
    given = zip((height, width), stage.padding, kernel, stage.stride, strict=True)
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in given]
    small = kernel == [3, 3] and stage.stride == (1, 1) and max(stage.padding) <= 2
    tile = TILE if small and inner >= 8 else 0
    sizes = (inner, outer // stage.groups, height, width, *out, *kernel)
    shape = _ints(lanes, stage.groups, *sizes, *stage.stride, *stage.padding, *steps, tile)
    each = (lanes, outer, stage.sets, *out, int(stage.relu), stage.pool, batch if stage.shared else 0)
    norm = _ints(*each) if stage.sets else None
    shown = (out[0] // stage.pool, out[1] // stage.pool, outer, lanes)
    return Sizes(shape, norm, out[0] * out[1] * outer * lanes, stage.sets * lanes, shown)


def _ints(*numbers: int) -> Ints:
    return (ctypes.c_int64 * len(numbers))(*numbers)


class Link(NamedTuple):
    """A stage with its tensors.

    Attributes:
        stage: What is done.
        weight: Of the convolution, [O, I, h, w].
        bias: Of the convolution, [O].
        gain: What the norm multiplies by, [O].
        shift: What the norm adds, [O].
        moments: Where BatchNorm leaves mean and unbiased variance of the batch, [2, O].
    """

    stage: Stage
    weight: Tensor
    bias: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    moments: Tensor | None = None


def _run(x: Tensor, link: Link, batch: int) -> tuple[Tensor, Tensor | None]:
    """The stage's output as stored, and what backward needs of a norm: y, mean and rate, one after another."""
    stage, weight, bias, gain, shift, moments = link
    sizes = _sizes(stage, x.shape, weight.shape, weight.stride(), batch)
    out = x.new_empty(sizes.out)
    given = (x.data_ptr(), weight.data_ptr(), bias.data_ptr() if bias is not None else None)
    if gain is None or shift is None:
        plain = (sizes.shape, None, 0.0, *given, None, None, out.data_ptr(), None, None, None, None)
        _check(_kernels().fm_stage_forward(*plain))
        return out, None
    kept = x.new_empty(sizes.inside + 2 * sizes.statistics)
    inside = (gain.data_ptr(), shift.data_ptr(), *_parts(kept, sizes))
    at_moments = moments.data_ptr() if moments is not None else None
    whole = (sizes.shape, sizes.norm, stage.eps, *given, *inside, at_moments, out.data_ptr())
    _check(_kernels().fm_stage_forward(*whole))
    return out, kept


def _slopes(
    x: Tensor, link: Link, kept: Tensor | None, dout: Tensor, batch: int, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Slopes on the stage's input (as stored), weight, bias, gain and shift; the first three where `needed`."""
    stage, weight, _, gain, shift, _ = link
    sizes = _sizes(stage, x.shape, weight.shape, weight.stride(), batch)
    dx = torch.empty_like(x) if needed[0] else None
    dw = torch.empty_strided(weight.shape, weight.stride()) if needed[1] else None
    db = x.new_empty(weight.shape[0]) if needed[2] else None
    dgain = dshift = None
    inside: tuple[int | None, ...] = (None,) * 5
    if gain is not None and shift is not None and kept is not None:
        dgain, dshift = torch.empty_like(gain), torch.empty_like(shift)
        inside = (gain.data_ptr(), shift.data_ptr(), *_parts(kept, sizes))
    slopes = (dx, dw, db, dgain, dshift)
    at = [None if tensor is None else tensor.data_ptr() for tensor in slopes]
    given = (sizes.shape, sizes.norm, x.data_ptr(), weight.data_ptr(), *inside, dout.data_ptr(), *at)
    _check(_kernels().fm_stage_backward(*given))
    return slopes


def _parts(kept: Tensor, sizes: Sizes) -> tuple[int, int, int]:
    """Where y, mean and rate begin."""
    start = kept.data_ptr()
    middle = start + 4 * sizes.inside
    return start, middle, middle + 4 * sizes.statistics


_OF_LINK = len(Link._fields) - 1


class _Chain(torch.autograd.Function):
    """One stage after another; its inputs are the image, the stages, and the tensors of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stages: tuple[Stage, ...], *tensors: Tensor | None) -> Tensor:
        stored = _stored(x)
        inputs: list[Tensor] = []
        kept: list[Tensor | None] = []
        for i, stage in enumerate(stages):
            link = Link(stage, *tensors[_OF_LINK * i : _OF_LINK * (i + 1)])  # type: ignore[arg-type]
            out, inside = _run(stored, link, x.shape[0])
            inputs.append(stored)
            kept.append(inside)
            stored = out.add_(inputs[-stage.spans]) if stage.spans else out
        ctx.save_for_backward(*tensors, *inputs, *kept)
        ctx.stages = stages
        return _shown(stored, x.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        stages, batch, saved = ctx.stages, slope.shape[0], ctx.saved_tensors
        tensors, inputs = saved[: _OF_LINK * len(stages)], saved[_OF_LINK * len(stages) :]
        kept = inputs[len(stages) :]
        dout: Tensor | None = _stored(slope)
        found: list[Tensor | None] = []
        passing: dict[int, Tensor] = {}  # slopes that go past stages, by the stage whose input they reach
        for i in reversed(range(len(stages))):
            first = 2 + _OF_LINK * i
            needed = (i > 0 or ctx.needs_input_grad[0], *ctx.needs_input_grad[first : first + 2])
            link, above = Link(stages[i], *tensors[_OF_LINK * i : _OF_LINK * (i + 1)]), cast("Tensor", dout)
            if stages[i].spans:
                passing[i + 1 - stages[i].spans] = above
            dout, *own = _slopes(inputs[i], link, kept[i], above, batch, needed)
            if i in passing and dout is not None:
                dout.add_(passing[i])
            found = [*own, None, *found]
        return None if dout is None else _shown(dout, batch), None, *found


def takes(x: Tensor, *links: Link) -> bool:
    """Whether the kernels can take an image through these stages: float32 on the CPU, a batch of a fitting size."""
    if x.ndim != 4 or not FEWEST_EXAMPLES <= x.shape[0] <= MOST_EXAMPLES:
        return False
    given = [x, *(tensor for link in links for tensor in link[1:] if tensor is not None)]
    plain = all(tensor.dtype is torch.float32 and tensor.is_cpu for tensor in given)
    dense = all(tensor is None or tensor.is_contiguous() for link in links for tensor in link[2:])
    sizes = tuple((link.stage, link.weight.shape, link.weight.stride()) for link in links)
    return plain and dense and _fits(tuple(x.shape[1:]), sizes) and available() is None


@lru_cache(maxsize=1024)
def _fits(image: tuple[int, ...], links: tuple[tuple[Stage, tuple[int, ...], tuple[int, ...]], ...]) -> bool:
    """Whether the sizes agree and every stage has an output; torch words the complaint where they do not."""
    channels, *sides = image
    seen = []
    for stage, (outer, inner, *kernel), steps in links:
        seen.append((channels, sides))
        if channels != inner * stage.groups or outer % stage.groups or min(steps) < 1:
            return False
        given = zip(sides, stage.padding, kernel, stage.stride, strict=True)
        sides = [((n + 2 * p - k) // s + 1) // stage.pool for n, p, k, s in given]
        channels = outer
        if min(sides) < 1 or (stage.spans and seen[-stage.spans] != (channels, sides)):
            return False
    return min(image) > 0


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
    link = Link(_alone(_pair(stride), _pair(padding), groups), weight, bias)
    if not takes(inputs, link):
        return functional.conv2d(inputs, weight, bias, stride, padding, groups=groups)
    return chained(inputs, [link])


@cache
def _alone(stride: Pair, padding: Pair, groups: int) -> Stage:
    return Stage(stride=stride, padding=padding, groups=groups)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def chained(inputs: Float[Tensor, "B I H W"], links: Sequence[Link]) -> Float[Tensor, "B O X Y"]:
    """One stage after another, in one step for autograd. Only for what `takes` says yes to."""
    tensors = [tensor for link in links for tensor in link[1:]]
    stages = tuple(link.stage for link in links)
    y: Tensor = _Chain.apply(inputs, stages, *tensors)  # type: ignore[no-untyped-call]
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
