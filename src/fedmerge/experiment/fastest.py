"""Which engine runs a long run: the one that was fastest when it was measured on this machine for the first time.

The engine decides the last bits of a run. So that one command gives one result, what was measured is kept in the cache
folder for this network, size of batch, version of torch and processor; a run that is short follows a rule.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedmerge._version import __version__
from fedmerge.core.errors import FedmergeError
from fedmerge.core.files import make_folder, write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.strict_json import parse_json_table, read_bounded
from fedmerge.core.vector import Layout
from fedmerge.data import FederatedData
from fedmerge.data.cache import cache_folder
from fedmerge.experiment.choice import RUNTIMES, Choice, Kernels, Runtime, Trial, choose_engine
from fedmerge.runtime import Engine
from fedmerge.runtime.place import HERE, Place
from fedmerge.runtime.rounds import plain_training
from fedmerge.training import Descent, LocalTraining, Planned
from fedmerge.training.folded.fold import why_not
from fedmerge.training.task import has_dropout

log = logging.getLogger(__name__)

_LONG = 1e12
"""Floating-point operations of a run from which measuring pays: half a minute and more."""
_FOLDS = (2, 4, 8, 16, 32, 64)
_GAIN = 0.95
"""A faster engine is taken if it needs at most this share of the sequential one's time."""
_WORTH = 0.98
"""Twice as many clients at once are tried until two doublings have not brought the time down to this share."""
_PATIENCE = 0.5
"""Seconds that a measurement may take to be repeated."""


@dataclass(frozen=True)
class Workload:
    """How much a run has to do.

    Attributes:
        training: What a client does in a round.
        rounds: Their number.
        fraction: Share of the clients in a round.
    """

    training: LocalTraining
    rounds: int
    fraction: float


def fastest_engine(
    runtime: Runtime,
    module: nn.Module,
    layout: Layout,
    descent: Descent,
    data: FederatedData,
    work: Workload,
    most: int | None = None,
    place: Place = HERE,
    kernels: Kernels = "auto",
) -> tuple[Engine, Choice]:
    """`choose_engine`, but for ``auto`` and a long run by measurement.

    Args:
        runtime: What was asked for.
        module: The network.
        layout: Of the module.
        descent: The local optimiser.
        data: The clients, in the run's precision.
        work: What the run has to do.
        most: Clients at once, if that was asked for.
        place: Where clients are computed.
        kernels: Whether convolutions may or must go through compiled kernels.
    """
    trial = Trial(module, layout, descent, data, place)
    measures = runtime == "auto" and kernels != "compiled" and not has_dropout(module)
    if not measures or _operations(trial, data, work) < _LONG:
        return choose_engine(trial, runtime, most, kernels)
    path = cache_folder() / "engines" / f"{_key(module, layout, descent, data, work, most, place, kernels)}.json"
    choice = _remembered(path)
    if choice is None:
        choice = _measured(trial, data, work, most, kernels)
        log.info("engine: %s (%s)", choice.runtime, choice.why)
        try:
            make_folder(path.parent)
            write_atomically(path, json.dumps(asdict(choice)))
        except OSError as error:
            log.info("what was measured could not be kept: %s", error)
    return choice.engine(module, layout, descent, trial.objective, place), choice


def _operations(trial: Trial, data: FederatedData, work: Workload) -> float:
    """Floating-point operations of a run as torch counts them; 0 where it cannot."""
    plans = [Planned(client.train, work.training, 0.0, 0, 1, i) for i, client in enumerate(data.clients)]
    steps = sum(len(plan.sizes()) for plan in plans)
    largest = max(data.clients, key=lambda client: client.num_train).train
    once = replace(work.training, epochs=LocalTraining.epochs, steps=1)
    try:
        with FlopCounterMode(display=False) as counter:
            trial.sequential.map(
                plain_training, [(trial.layout.read(trial.module), Planned(largest, once, 0.0, 0, 1, 0))]
            )
    except Exception as error:  # a user's module may not like to be watched
        log.info("the work of a step cannot be counted: %s", error)
        return 0.0
    return float(counter.get_total_flops()) * steps * work.rounds * work.fraction


def _measured(trial: Trial, data: FederatedData, work: Workload, most: int | None, kernels: Kernels) -> Choice:
    """The fastest of the engines that give the sequential numbers."""
    size = min(64, max(1, round(work.fraction * len(data.clients))))
    plain = Choice("sequential")
    times = {plain: _milliseconds(trial.sequential, trial, data, work, 1)}

    def measure(choice: Choice) -> float:
        """Its time; infinite if it does not run."""
        found = trial.tried(choice)
        if isinstance(found, str):
            log.info("%s does not run %s, because it %s", type(trial.module).__name__, _text(choice), found)
            return math.inf
        times[choice] = _milliseconds(found, trial, data, work, min(choice.most or size, size))
        return times[choice]

    reason = "is not asked to" if kernels == "torch" else trial.without_kernels()
    if reason is not None:
        log.info("%s does not run with compiled kernels, because it %s", type(trial.module).__name__, reason)
    with_kernels = reason is None and measure(replace(plain, kernels=True)) < times[plain]
    best, in_vain = math.inf, 0
    for choice in _folds(trial, most, size) or [Choice("vectorised", most)]:
        now = measure(replace(choice, kernels=with_kernels and choice.runtime == "folded"))
        in_vain = 0 if now < _WORTH * best else in_vain + 1
        best = min(best, now)
        if in_vain == 2:
            break  # more clients at once gain nothing any more
    fastest = min(times, key=lambda choice: times[choice])
    if times[fastest] > _GAIN * times[plain]:
        fastest = plain
    why = ", ".join(f"{_text(choice)} {value:.3g}" for choice, value in times.items())
    return replace(fastest, why=f"measured milliseconds per step of a client: {why}")


def _text(choice: Choice) -> str:
    name = choice.runtime if choice.most is None else f"{choice.runtime} by {choice.most}"
    return f"{name} with compiled kernels" if choice.kernels else name


def _folds(trial: Trial, most: int | None, size: int) -> Sequence[Choice]:
    reason = why_not(trial.module, trial.layout)
    if reason is not None:
        log.info("%s is not folded: %s", type(trial.module).__name__, reason)
        return []
    return [Choice("folded", count) for count in ((most,) if most else _FOLDS) if count <= size or count == most]


def _milliseconds(engine: Engine, trial: Trial, data: FederatedData, work: Workload, clients: int) -> float:
    """Processor time per step of a client, the best of up to three after one that warms up."""
    few = _few_steps(work.training)
    chosen = [data.clients[i % len(data.clients)].train for i in range(clients)]
    plans = [Planned(examples, few, 1e-3, 0, 1, i) for i, examples in enumerate(chosen)]
    start, steps = trial.layout.read(trial.module), sum(len(plan.sizes()) for plan in plans)

    def once() -> float:
        clock = time.process_time if trial.place.is_here else time.perf_counter
        began = clock()
        engine.map(plain_training, [(start, plan) for plan in plans])  # gives vectors on the CPU: it has ended
        return clock() - began

    warm = once()
    return 1000 * min(once() for _ in range(3 if warm < _PATIENCE else 1)) / steps


def _few_steps(training: LocalTraining) -> LocalTraining:
    """A few steps of a round: loading and reading the vectors weighs at most as much as in a whole one."""
    return replace(training, epochs=LocalTraining.epochs, steps=min(training.steps or 4, 4))


def _remembered(path: Path) -> Choice | None:
    """What was measured before; None if that is not there, or not to be read."""
    try:
        choice = build_options(Choice, parse_json_table(read_bounded(path, 1 << 16).decode()), "engine", [])
    except (OSError, ValueError, FedmergeError):
        return None
    sound = choice is not None and choice.runtime in RUNTIMES and 0 < (choice.most or 1) < 1 << 16
    return choice if sound else None


def _key(
    module: nn.Module,
    layout: Layout,
    descent: Descent,
    data: FederatedData,
    work: Workload,
    most: int | None,
    place: Place,
    kernels: Kernels,
) -> str:
    """What a measurement depends on, as the name of a file."""
    facts = [
        repr(module),
        repr(layout),
        repr(descent),
        repr(_few_steps(work.training)),
        [list(data.clients[0].train.inputs.shape[1:]), str(data.clients[0].train.inputs.dtype), data.kind],
        [round(work.fraction * len(data.clients)), most],
        [torch.__version__, __version__, _processor(), _card(place), place.arithmetic, kernels],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _card(place: Place) -> str:
    return torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else place.device.type


def _processor() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
