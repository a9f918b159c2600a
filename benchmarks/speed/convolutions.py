"""The compiled kernels against torch: layers of ResNet-9, whole training steps, and how far each is from exact.

Run from the repository's root::

    python benchmarks/speed/convolutions.py

Writes ``benchmarks/results/speed/convolutions.md``. One thread, float32, batch 32. Times are the thread's own
(processor time), variants interleaved, medians.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmerge import __version__
from fedmerge.models.cnn import Cnn
from fedmerge.models.resnet9 import Residual, ResNet9
from fedmerge.training import native
from fedmerge.training.native import functions

PAGE = Path("benchmarks/results/speed/convolutions.md")
BATCH = 32
LAYERS = ((3, 8, 32, 1), (8, 16, 32, 1), (16, 16, 16, 2), (16, 32, 16, 1), (32, 64, 8, 1), (64, 64, 4, 2))
"""Channels in and out, side of the image, and how often ResNet-9 has the layer."""
Work = Callable[[], object]
TILES = {0: "ours, plain sum", 2: "ours, F(2)", 4: "ours, F(4)"}


def _draw(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def _seconds(work: Work) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def _interleaved(works: dict[str, Work], repeats: int) -> dict[str, list[float]]:
    """Seconds of each work, by name; two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 2):
        for name, work in works.items():
            seconds = _seconds(work)
            if number >= 2:
                times[name].append(seconds)
    return times


def layer_works(inner: int, outer: int, side: int) -> dict[str, tuple[Work, Work, Work]]:
    """Forward, slope on the input, slope on the weight, for each way to compute them; folded ones for two clients."""
    works: dict[str, tuple[Work, Work, Work]] = {}
    for clients, last in ((1, False), (1, True), (2, True)):
        x, weight = _draw(BATCH, clients * inner, side, side, seed=0), _draw(clients * outer, inner, 3, 3, seed=1)
        dy = _draw(BATCH, clients * outer, side, side, seed=2)
        if last:
            x, weight, dy = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight, dy))
        name = f"torch, {'channels last' if last else 'channels first'}{', 2 folded' if clients == 2 else ''}"
        works[name] = _torch_works(x, weight, dy, clients)
    for tile, name in TILES.items():
        works[name] = _our_works(inner, outer, side, tile)
    return works


def _torch_works(x: Tensor, weight: Tensor, dy: Tensor, groups: int) -> tuple[Work, Work, Work]:
    def slopes(*wanted: bool) -> Work:
        return lambda: torch.ops.aten.convolution_backward(
            dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups, list(wanted)
        )

    forward: Work = lambda: functional.conv2d(x, weight, padding=1, groups=groups)  # noqa: E731
    return forward, slopes(True, False, False), slopes(False, True, False)


def _our_works(inner: int, outer: int, side: int, tile: int) -> tuple[Work, Work, Work]:
    """On images as the kernels keep them; through the library itself, to time one direction at a time."""
    functions.TILE = tile
    functions._sizes.cache_clear()
    stage = functions._alone((1, 1), (1, 1), 1)
    x, dy = _draw(side, side, inner, BATCH, seed=0), _draw(side, side, outer, BATCH, seed=2)
    weight = _draw(outer, inner, 3, 3, seed=1).contiguous(memory_format=torch.channels_last)
    shape = functions._sizes(stage, x.shape, weight.shape, weight.stride(), BATCH).shape
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)
    kernels = functions._kernels()
    at_x, at_w, at_dy = x.data_ptr(), weight.data_ptr(), dy.data_ptr()
    empty = [None] * 5

    def backward(on_x: Tensor | None, on_w: Tensor | None) -> object:
        slopes = [None if on is None else on.data_ptr() for on in (on_x, on_w)]
        return kernels.fm_stage_backward(shape, None, at_x, at_w, *empty, at_dy, *slopes, None, None, None)

    def forward() -> object:
        return kernels.fm_stage_forward(shape, None, 0.0, at_x, at_w, None, None, None, y.data_ptr(), *[None] * 4)

    return forward, lambda: backward(dx, None), lambda: backward(None, dw)


def layers_table(repeats: int) -> list[str]:
    rows = ["| layer | way | forward | on input | on weight |", "|---|---|---|---|---|"]
    sums: dict[str, list[float]] = {}
    for inner, outer, side, count in LAYERS:
        flops = 2 * BATCH * inner * outer * 9 * side * side
        works = layer_works(inner, outer, side)
        flat = {f"{name}/{i}": work for name, three in works.items() for i, work in enumerate(three)}
        times = _interleaved(flat, repeats)
        for name in works:
            clients = 2 if "folded" in name else 1
            medians = [statistics.median(times[f"{name}/{i}"]) / clients for i in range(3)]
            skipped = inner == 3  # the images need no slope
            cells = [f"{1e3 * t:.2f} ({flops / t / 1e9:.0f})" for t in medians]
            row = [f"{inner} to {outer}, {side} x {side}", name, cells[0], "-" if skipped else cells[1], cells[2]]
            rows.append(f"| {' | '.join(row)} |")
            spent = sums.setdefault(name, [0.0] * 3)
            for i in range(3):
                spent[i] += 0.0 if skipped and i == 1 else count * medians[i]
    for name, spent in sums.items():
        rows.append(f"| all eight | {name} | {' | '.join(f'{1e3 * t:.2f}' for t in spent)} |")
    return rows


def networks() -> dict[str, tuple[nn.Module, tuple[int, int, int]]]:
    return {
        "ResNet-9, GroupNorm": (ResNet9().build((3, 32, 32), 10), (3, 32, 32)),
        "ResNet-9, BatchNorm": (ResNet9(norm="batch").build((3, 32, 32), 10), (3, 32, 32)),
        "CNN": (Cnn().build((1, 28, 28), 10), (1, 28, 28)),
    }


def _step(module: nn.Module, x: Tensor, targets: Tensor) -> Work:
    parameters = list(module.parameters())

    def step() -> None:
        module.zero_grad()
        functional.cross_entropy(module(x), targets).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.01)

    return step


def step_works(module: nn.Module, shape: Sequence[int]) -> dict[str, Work]:
    x, targets = _draw(BATCH, *shape, seed=3), torch.arange(BATCH) % 10
    last = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {
        "torch, channels first": _step(copy.deepcopy(module), x, targets),
        "torch, channels last": _step(last, x.contiguous(memory_format=torch.channels_last), targets),
        "ours": _step(native.accelerated(last, (Residual,)), x, targets),
    }


def _conv_flops(module: nn.Module, shape: Sequence[int]) -> int:
    """Of forward and both slopes by the plain sum; the first layer has no slope on its input."""
    flops: list[int] = []

    def note(layer: nn.Module, _: tuple[Tensor], outputs: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        flops.append(2 * layer.weight.numel() * outputs.shape[2] * outputs.shape[3] * BATCH)

    for layer in (copied := copy.deepcopy(module)).modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    copied(_draw(2, *shape, seed=0))
    return 3 * sum(flops) - flops[0]


def steps_table(repeats: int) -> list[str]:
    rows = ["| network | way | ms | GFLOP/s | times as fast | smallest - largest |", "|---|---|---|---|---|---|"]
    for name, (module, shape) in networks().items():
        times = _interleaved(step_works(module, shape), repeats)
        flops, base = _conv_flops(module, shape), times["torch, channels first"]
        for way, seconds in times.items():
            ratios = [a / b for a, b in zip(base, seconds, strict=True)]
            median = statistics.median(seconds)
            spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
            fast = statistics.median(base) / median
            rows.append(f"| {name} | {way} | {1e3 * median:.2f} | {flops / median / 1e9:.0f} | {fast:.2f} | {spread} |")
    return rows


def _gradient(module: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    functional.cross_entropy(module(x), targets).backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.double().reshape(-1) for p in module.parameters() if p.grad is not None])


def errors_table(draws: int = 5) -> list[str]:
    rows = ["| network | way | median error | largest |", "|---|---|---|---|"]
    for name, (module, shape) in networks().items():
        found: dict[str, list[float]] = {}
        for seed in range(draws):
            x, targets = _draw(BATCH, *shape, seed=seed), torch.arange(BATCH) % 10
            exact = _gradient(copy.deepcopy(module).double(), x.double(), targets)
            gradients = {"torch": _gradient(copy.deepcopy(module), x, targets)}
            for tile, way in TILES.items():
                functions.TILE = tile
                functions._sizes.cache_clear()
                gradients[way] = _gradient(native.accelerated(module), x, targets)
            for way, gradient in gradients.items():
                found.setdefault(way, []).append(float((gradient - exact).norm() / exact.norm()))
        for way, errors in found.items():
            rows.append(f"| {name} | {way} | {statistics.median(errors):.1e} | {max(errors):.1e} |")
    return rows


def page(repeats: int) -> str:
    standard = functions.TILE
    layers = layers_table(repeats)
    errors = errors_table()
    functions.TILE = standard
    functions._sizes.cache_clear()
    steps = steps_table(repeats)
    parts = [
        "# Convolutions: compiled kernels against torch",
        f"Command: `python benchmarks/speed/convolutions.py --repeats {repeats}`; fedmerge {__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, vectors of "
        f"{functions._width()} floats. One thread, float32, batch {BATCH}. Milliseconds of processor time, variants "
        f"interleaved, {repeats} repeats, medians. In all columns the C library keeps freed memory, as it does once "
        "the kernels are loaded; torch alone is slower without that.",
        "## Whole steps",
        "Forward, loss, backward, SGD. GFLOP/s count the plain sums of the convolutions and nothing else. The last "
        "column is of single repeats, the one before of medians, both against torch with channels first.",
        "\n".join(steps),
        "## Layers of ResNet-9",
        "Milliseconds per client, and GFLOP/s of the plain sum in brackets: Winograd's F(2) and F(4) need fewer "
        "products than that, so they can exceed what the processor can do. The images need no slope, so the first "
        "layer's is not counted.",
        "\n".join(layers),
        "## Rounding",
        "Norm of the error of a network's whole gradient over its norm, against float64, for five batches. Where a "
        "rounding flips a ReLU or a maximum the error is 1e-4 and more, whoever rounds. F(4) is the standard.",
        "\n".join(errors),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    reason = native.available()
    if reason is not None:
        raise SystemExit(f"no compiled kernels: {reason}")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(repeats), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
