"""Which engine runs the clients, and how many of them at once: what was asked for, a rule, or a measurement.

The engine decides the last bits of a run. So that one command gives one result, a run that is short takes the engine
of a rule, and a long one that which was fastest when it was measured here for the first time: what was measured is kept
in the cache folder for this network, size of batch, version of torch and processor. Every run writes down what it took.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedmerge._version import __version__
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.files import make_folder, write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.protocol import Batches, Task
from fedmerge.core.randomness import generator
from fedmerge.core.strict_json import parse_json_table, read_bounded
from fedmerge.core.vector import Layout
from fedmerge.data import Examples, FederatedData
from fedmerge.data.cache import cache_folder
from fedmerge.models.resnet9 import Residual
from fedmerge.runtime import Engine, Folded, Sequential, Vectorised
from fedmerge.runtime.place import HERE, Place
from fedmerge.runtime.rounds import plain_training
from fedmerge.training import Descent, LocalTraining, Planned, draw_batches
from fedmerge.training.folded.fold import form_of, looks_at_numbers, why_not
from fedmerge.training.native import accelerated, available
from fedmerge.training.objective import CLASSES, TOKENS, Objective, classes_of_tasks
from fedmerge.training.task import has_dropout, is_batch_coupled

log = logging.getLogger(__name__)

Runtime = Literal["auto", "sequential", "vectorised", "folded"]
Kernels = Literal["auto", "torch", "compiled"]
RUNTIMES = ("sequential", "vectorised", "folded")
"""What `auto` chooses from."""
_LONG = 1e12
"""Floating-point operations of a run from which measuring pays: half a minute and more."""
_FOLDS = (2, 4, 8, 16, 32, 64)
_GAIN = 0.95
"""A faster engine is taken if it needs at most this share of the sequential one's time."""
_CONVOLUTIONS_AT_ONCE = 4
_WORTH = 0.98
"""Twice as many clients at once are tried until two doublings have not brought the time down to this share."""
_PATIENCE = 0.5
"""Seconds that a measurement may take to be repeated."""


@dataclass(frozen=True)
class Choice:
    """An engine by name.

    Attributes:
        runtime: Its name.
        most: Clients that run at once; None for one, or for as many as the engine thinks best.
        why: Why this one.
        kernels: Whether convolutions go through kernels compiled on this machine (see `training.native`).
    """

    runtime: str
    most: int | None = None
    why: str = ""
    kernels: bool = False

    def engine(
        self, module: nn.Module, layout: Layout, descent: Descent, objective: Objective, place: Place = HERE
    ) -> Engine:
        """Such an engine.

        Raises:
            UsageError: if it cannot run the network.
        """
        if self.runtime == "sequential":
            module = _with_kernels(module) if self.kernels else module
            return Sequential(module, layout, descent, objective=objective, place=place)
        kind = (
            partial(Folded, finish=_with_kernels if self.kernels else None) if self.runtime == "folded" else Vectorised
        )
        return kind(module, layout, descent, objective=objective, most=self.most, place=place)


def _with_kernels(module: nn.Module) -> nn.Module:
    return accelerated(module, (Residual,))


def objective_of(data: FederatedData) -> Objective:
    """What a network's outputs are held against on these clients."""
    if data.kind != "classes":
        return TOKENS
    return classes_of_tasks(data.class_tasks) if len(set(data.class_tasks)) > 1 else CLASSES


def choose_engine(
    runtime: Runtime,
    module: nn.Module,
    layout: Layout,
    descent: Descent,
    data: FederatedData,
    most: int | None = None,
    place: Place = HERE,
    kernels: Kernels = "auto",
) -> tuple[Engine, Choice]:
    """The engine that was asked for; for ``auto`` that of the rule.

    The rule: perceptrons and the like (no convolutions, BatchNorm, dropout or frozen base) run folded, or vectorised
    where a layer cannot be folded, if a step on a few examples gives the same numbers; everything else sequentially.

    Args:
        runtime: What was asked for.
        module: The network.
        layout: Of the module.
        descent: The local optimiser.
        data: The clients, in the run's precision.
        most: Clients at once, if that was asked for.
        place: Where clients are computed.
        kernels: Whether convolutions may or must go through compiled kernels.

    Raises:
        UsageError: if an engine was asked for and does not give the sequential numbers.
    """
    return _chosen(Trial(module, layout, descent, data, place), runtime, most, kernels)


def _chosen(trial: Trial, runtime: Runtime, most: int | None, kernels: Kernels) -> tuple[Engine, Choice]:
    if kernels == "compiled":
        return trial.compiled(runtime, most)
    if runtime != "auto":
        return trial.asked(runtime, most)
    reason = "the rule for networks like this"
    if _is_plain(trial.module):
        for name in ("folded", "vectorised"):
            found = trial.tried(Choice(name, most, reason))
            if isinstance(found, Engine):
                return found, Choice(name, most, reason)
            log.info("%s does not run %s, because it %s", type(trial.module).__name__, name, found)
    return trial.sequential, Choice("sequential", None, reason)


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
        return _chosen(trial, runtime, most, kernels)
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


# ---------------------------------------------------------------- trying


class Trial:
    """Tries engines on a network and a few examples.

    Args:
        module: The network.
        layout: Of the module.
        descent: The local optimiser.
        data: The clients, in the run's precision.
        place: Where clients are computed.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, descent: Descent, data: FederatedData, place: Place = HERE
    ) -> None:
        self.place, self.module, self.layout, self.descent = place, module, layout, descent
        self.objective = objective_of(data)
        self.sequential: Engine = Sequential(module, layout, descent, objective=self.objective, place=place)
        self._examples = data.clients[0].train

    def asked(self, runtime: str, most: int | None) -> tuple[Engine, Choice]:
        """The engine of this name.

        Raises:
            UsageError: if it cannot run the network.
        """
        choice = Choice(runtime, most, "asked for")
        if runtime == "sequential":
            return self.sequential, replace(choice, most=None)
        if runtime == "folded" and most is None and form_of(self.module, self.layout) == "channels":
            choice = replace(choice, most=_CONVOLUTIONS_AT_ONCE)
        self._engine(choice, self.place)  # says itself why it refuses a network
        found = self.tried(choice)
        if isinstance(found, str):
            raise UsageError(
                f"runtime {runtime!r} cannot run {type(self.module).__name__}: {found}. Use runtime 'auto' or "
                "'sequential'"
            )
        return found, choice

    def compiled(self, runtime: str, most: int | None) -> tuple[Engine, Choice]:
        """One by one or folded, with compiled kernels.

        Raises:
            UsageError: if there are none, they do not fit, or another runtime is asked for.
        """
        found = "cannot use them in runtime 'vectorised'" if runtime == "vectorised" else self.without_kernels()
        choice = Choice("sequential", why="asked for", kernels=True)
        if runtime == "folded":
            choice = replace(choice, runtime=runtime, most=most or _CONVOLUTIONS_AT_ONCE)
        engine = self.tried(choice) if found is None else found
        if isinstance(engine, str):
            raise UsageError(f"kernels: got 'compiled', but {type(self.module).__name__} {engine}; expected 'torch'")
        return engine, choice

    def without_kernels(self) -> str | None:
        """Why compiled kernels are of no use here; None if they are."""
        if self.layout.dtype != torch.float32 or self.place != HERE:
            return "is not computed in float32 on the CPU"
        if not any(isinstance(part, nn.Conv2d) for part in self.module.modules()):
            return "has no convolutions"
        reason = available()
        return None if reason is None else f"has none on this machine: {reason}"

    def tried(self, choice: Choice) -> Engine | str:
        """The engine, or why it cannot stand in for the sequential one."""
        try:
            engine = self._engine(choice, self.place)
        except UsageError as error:
            return str(error)
        if choice.runtime == "folded" and self._looks_at_numbers:
            return "looks at numbers in its tensors, which would be those of several clients"
        return self._disagreement(choice) or engine

    def _engine(self, choice: Choice, place: Place) -> Engine:
        return choice.engine(self.module, self.layout, self.descent, self.objective, place)

    @cached_property
    def _looks_at_numbers(self) -> bool:
        try:
            return looks_at_numbers(self.module, self.layout, next(iter(self._batches()))[0].inputs)
        except Exception:  # whatever torch says about a user's module: the trial that follows tells
            return False

    def _disagreement(self, choice: Choice) -> str | None:
        """Why its numbers are not those of the sequential engine; None if both make the same step, in full precision.

        Two clients of different vectors; of unequal size where batches may be padded, so that padding is tried too.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # torch warns where it would fall back to a slow loop
                found = self._stepped(choice)
        except Exception as error:  # whatever torch says about a user's module
            return f"it fails ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        close = all(
            torch.allclose(a, b, rtol=0, atol=1e-3 * float(b.abs().max()) + 1e-6)
            for ours, theirs in zip(found, self._wanted, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )
        return None if close else "its numbers differ from the sequential ones: some layer looks across a batch"

    @cached_property
    def _wanted(self) -> list[tuple[Tensor, Tensor]]:
        return self._stepped(Choice("sequential"))

    def _stepped(self, choice: Choice) -> list[tuple[Tensor, Tensor]]:
        """What such an engine makes of the two clients."""
        start, T = self.layout.read(self.module), self.layout.num_trainable
        shift = torch.from_numpy(generator(0, "trial").standard_normal(T)).to(start)
        moved = start.clone()
        moved[:T] += 0.1 * shift * start[:T].abs()
        engine = self._engine(choice, Place(self.place.device))
        return engine.map(step_and_loss, list(zip((start, moved), self._batches(), strict=True)))

    def _batches(self) -> Iterator[Batches]:
        inputs, targets = self._examples
        size = min(4, len(targets))
        once = LocalTraining(steps=1)
        for n in (size, size if is_batch_coupled(self.module) else max(1, size - 1)):
            own = Examples(inputs[:n], targets[:n])
            yield draw_batches(own, once, lr=1.0, seed=0, round_number=1, client=0)


def step_and_loss(task: Task, params: Tensor, steps: Batches) -> tuple[Tensor, Tensor]:
    """How far one step goes, and the loss before it."""
    return params - task.train(params, steps), task.loss(params, steps[0])


def _is_plain(module: nn.Module) -> bool:
    """No convolutions, BatchNorm, dropout or frozen base, whose products are large already."""
    if any(not parameter.requires_grad for parameter in module.parameters()):
        return False
    convolutions = any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
    return not convolutions and not is_batch_coupled(module) and not has_dropout(module)


# ---------------------------------------------------------------- measuring


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
