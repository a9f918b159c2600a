"""How a driver answers `rivals.py`: one word per line comes in, one JSON object per line goes out.

``round`` plays a round; ``evaluated`` plays one with the evaluation that the contestant has or does of itself;
``count`` plays one and counts the steps that were really done; ``profile`` plays one and times its parts; ``end`` ends.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import dataloader
from workloads import Workload, network, workload_of

Watched = tuple[Any, str, str]
"""A class or module, the name of a function in it, and the part of a round that the function's time counts as."""

WATCHED: tuple[Watched, ...] = (
    (nn.Module, "__call__", "forward and loss"),
    (functional, "cross_entropy", "forward and loss"),
    (torch.autograd, "backward", "backward"),
    (torch.autograd, "grad", "backward"),
    (torch.optim.SGD, "step", "optimiser"),
    (torch.optim.Optimizer, "zero_grad", "optimiser"),
    (dataloader.DataLoader, "__iter__", "batches"),
    (dataloader._BaseDataLoaderIter, "__next__", "batches"),
    (copy, "deepcopy", "copies"),
    (nn.Module, "load_state_dict", "copies"),
    (nn.Module, "state_dict", "copies"),
)


@dataclass(frozen=True)
class Peer:
    """A contestant that is ready.

    Attributes:
        play: One round without evaluation, as far as the contestant lets one switch it off.
        evaluated: One round with evaluation, where the contestant has one in its round.
        counted: One round; gives the steps that clients did. None: they are counted in this process, in training mode.
        profiled: One round; gives processor seconds of parts of it. None: those of the functions that are watched.
        watched: Functions of the contestant's own to watch beside torch's.
        package: Whose version is told.
        facts: What else the table should say.
    """

    play: Callable[[], object]
    evaluated: Callable[[], object] | None = None
    counted: Callable[[], dict[str, Any]] | None = None
    profiled: Callable[[], dict[str, float]] | None = None
    watched: tuple[Watched, ...] = ()
    package: str = "torch"
    facts: dict[str, Any] = field(default_factory=dict)


def options() -> argparse.Namespace:
    """What `rivals.py` says on the command line; `workload` is the workload itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--variant", default="")
    parser.add_argument("--checkout", default="")
    found = parser.parse_args()
    found.workload = workload_of(found.workload, found.clients)
    torch.set_num_threads(1)
    return found


def marked_network(workload: Workload) -> nn.Module:
    """The network, marked so that its own calls can be told from those of its parts and counted."""
    module = network(workload)
    module.is_counted = True  # type: ignore[assignment]
    return module


@contextmanager
def counting() -> Iterator[list[int]]:
    """Within the block every call of a marked network in training mode adds the size of its batch to the list."""
    sizes: list[int] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        if getattr(module, "is_counted", False) and module.training and torch.is_grad_enabled():
            sizes.append(len(inputs[0]))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield sizes
    finally:
        handle.remove()


def own_channel() -> TextIO:
    """The way back to `rivals.py`; whatever else is printed goes to the error stream from now on."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return channel


def serve(peer: Peer, channel: TextIO) -> None:
    """Answers until told to end."""
    _say(channel, _greeting(peer))
    for line in sys.stdin:
        word = line.strip()
        if word == "end":
            return
        began = time.perf_counter(), time.process_time()
        answer = _ANSWERS[word](peer)
        taken = time.perf_counter() - began[0], time.process_time() - began[1]
        _say(channel, {"seconds": taken[0], "own_cpu_seconds": taken[1], **answer})


def _say(channel: TextIO, answer: dict[str, Any]) -> None:
    channel.write(json.dumps(answer) + "\n")


def _greeting(peer: Peer) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", peer.package)}
    versions["python"] = platform.python_version()
    return {"ready": True, "versions": versions, "evaluates": peer.evaluated is not None, **peer.facts}


def _round(peer: Peer) -> dict[str, Any]:
    peer.play()
    return {}


def _evaluated(peer: Peer) -> dict[str, Any]:
    assert peer.evaluated is not None
    peer.evaluated()
    return {}


def _count(peer: Peer) -> dict[str, Any]:
    if peer.counted is not None:
        return peer.counted()
    with counting() as sizes:
        peer.play()
    return {"steps": len(sizes), "examples": sum(sizes)}


def _profile(peer: Peer) -> dict[str, Any]:
    if peer.profiled is not None:
        return {"parts": peer.profiled()}
    with timing((*WATCHED, *peer.watched)) as parts:
        peer.play()
    return {"parts": parts}


@contextmanager
def timing(watched: tuple[Watched, ...]) -> Iterator[dict[str, float]]:
    """Within the block the processor seconds of these functions are added up by parts.

    A function that is called by another watched one counts as part of that: parts do not overlap.
    """
    parts = dict.fromkeys((part for _, _, part in watched), 0.0)
    inside: list[str] = []

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **keywords: Any) -> Any:
            if inside:
                return function(*arguments, **keywords)
            inside.append(part)
            began = time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                parts[part] += time.process_time() - began
                inside.pop()

        return run

    before = [(owner, name, getattr(owner, name)) for owner, name, _ in watched]
    try:
        for owner, name, part in watched:
            setattr(owner, name, timed(getattr(owner, name), part))
        yield parts
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


_ANSWERS = {"round": _round, "evaluated": _evaluated, "count": _count, "profile": _profile}
