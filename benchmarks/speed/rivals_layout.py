"""Processor milliseconds of each kind of layer in one training step of a workload, images laid out in two ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Workload, examples, network

LAYOUTS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}


def fastest(run: Callable[[], object], times: int = 10) -> float:
    """Processor seconds of the fastest of some calls, after one that is not timed."""
    run()
    seconds = []
    for _ in range(times):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds)


def layers_by_layout(workload: Workload) -> dict[str, dict[str, float]]:
    """Forward and backward of all layers of a kind together, for each layout; one thread."""
    torch.set_num_threads(1)
    return {name: _layers(workload, layout) for name, layout in LAYOUTS.items()}


def _layers(workload: Workload, layout: torch.memory_format) -> dict[str, float]:
    module: Any = network(workload).train()
    module = module.to(memory_format=layout)
    inputs = examples(workload, 0).inputs[: workload.batch].contiguous(memory_format=layout)
    found: dict[str, float] = {}
    for layer, seen in _seen(module, inputs):
        kind = type(layer).__name__
        found[kind] = found.get(kind, 0.0) + 1000 * fastest(_there_and_back(layer, seen))
    return found


def _seen(module: nn.Module, inputs: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Each layer without parts, and what it is given."""
    seen: list[tuple[nn.Module, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda layer, given, _: seen.append((layer, given[0].detach())))
        for layer in module.modules()
        if not any(True for _ in layer.children())
    ]
    module(inputs)
    for handle in handles:
        handle.remove()
    return seen


def _there_and_back(layer: nn.Module, given: Tensor) -> Callable[[], object]:
    inputs = given.clone(memory_format=torch.preserve_format).requires_grad_()
    slope = torch.ones_like(layer(inputs))
    wanted = [inputs, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(inputs), wanted, slope)
