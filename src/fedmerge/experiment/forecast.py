"""What a run will take, measured on its own first steps before it begins."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedmerge.core.protocol import Batches, Task
from fedmerge.experiment.simulation import Progress, Setup, models_now, one_thread
from fedmerge.training import draw_batches, one_pass
from fedmerge.training.scores import tally

_TRIED = 16
"""Clients that are tried at once: as many as a vectorised engine runs together, at least."""


@dataclass(frozen=True)
class Forecast:
    """Time and memory of a run.

    Attributes:
        seconds: Training and evaluation together.
        peak_bytes: Of the whole process.
        base_bytes: Frozen parameters, which are there once.
        vector_bytes: What one client receives or sends in a round, at most.
        remembered_bytes: Outputs of frozen layers that are kept.
    """

    seconds: float
    peak_bytes: int
    base_bytes: int
    vector_bytes: int
    remembered_bytes: int

    def __str__(self) -> str:
        parts = [f"{_size(self.vector_bytes)} per client and direction"]
        if self.base_bytes:
            parts.append(f"frozen base {_size(self.base_bytes)}, once")
        if self.remembered_bytes:
            parts.append(f"frozen outputs {_size(self.remembered_bytes)}")
        return f"about {_duration(self.seconds)}, {_size(self.peak_bytes)} of memory ({'; '.join(parts)})"


def forecast(setup: Setup, progress: Progress) -> Forecast:
    """Times one step and one evaluation of a few clients and counts the rest up.

    Args:
        setup: Of the run.
        progress: Before the first round; stays as it is.
    """
    with one_thread():
        seconds = _training_seconds(setup, progress) + _evaluation_seconds(setup, progress)
    size = setup.layout.num_params * setup.layout.dtype.itemsize
    cohort = max(1, round(setup.options.fraction * len(setup.data.clients)))
    held = 8 * setup.played.cost(progress.state).server_floats + 3 * cohort * size
    frozen = {id(p): p for p in setup.module.parameters() if not p.requires_grad}
    cost = setup.played.cost(progress.state)
    return Forecast(
        seconds=seconds,
        peak_bytes=_peak_now() + held,
        base_bytes=sum(p.numel() * p.element_size() for p in frozen.values()),
        vector_bytes=max(cost.bytes_down, cost.bytes_up),
        remembered_bytes=getattr(getattr(setup.module, "memory", None), "num_bytes", 0),
    )


def _training_seconds(setup: Setup, progress: Progress) -> float:
    """One step of a few clients, after one to warm up, times the steps of the run."""
    clients = list(enumerate(setup.data.clients))[:_TRIED]
    steps = [
        draw_batches(c.train, setup.training, lr=setup.training.lr, seed=setup.options.seed, round_number=0, client=i)
        for i, c in clients
    ]
    start = setup.layout.read(setup.module)
    arguments = [(start, batches[:1]) for batches in steps]
    once = _timed(lambda: setup.engine.map(_one_step, arguments))
    per_round = sum(len(batches) for batches in steps) / len(steps) * setup.options.fraction * len(setup.data.clients)
    extra = setup.played.cost(progress.state).extra_backward
    return once / len(arguments) * per_round * setup.options.rounds * (1 + extra)


def _evaluation_seconds(setup: Setup, progress: Progress) -> float:
    clients = setup.data.clients[:_TRIED]
    models = models_now(setup, progress)[: len(clients)]
    passes: list[Batches] = [one_pass(client.validation, 64)[:1] + one_pass(client.test, 64)[:1] for client in clients]
    tried = sum(len(batch.targets) for batches in passes for batch in batches)
    if not tried:
        return 0.0
    once = _timed(lambda: setup.engine.map(tally, list(zip(models, passes, strict=True))))
    examples = sum(len(c.validation.targets) + len(c.test.targets) for c in setup.data.clients)
    times = 2 + setup.options.rounds // setup.options.evaluate_every
    return once / tried * examples * times


def _one_step(task: Task, params: Any, batches: Batches) -> Any:
    return task.train(params, batches)


def _timed(work: Callable[[], Sequence[Any]]) -> float:
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _peak_now() -> int:
    """Largest resident memory of this process so far, in bytes; the system counts in KiB on Linux, bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _duration(seconds: float) -> str:
    """Rounded as one would say it.

    >>> _duration(0.2), _duration(75), _duration(8000)
    ('a second', '1.2 min', '2.2 h')
    """
    if seconds < 1:
        return "a second"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    """Bytes in decimal units.

    >>> _size(900), _size(98304), _size(1_500_000_000)
    ('1 kB', '98 kB', '1.5 GB')
    """
    if count < 1_000_000:
        return f"{max(1, round(count / 1000))} kB"
    return f"{count / 1e6:.0f} MB" if count < 1_000_000_000 else f"{count / 1e9:.1f} GB"
