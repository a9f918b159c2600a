"""Which engine runs the clients, and how many of them at once: what was asked for, or a rule.

The engine decides the last bits of a run, so that every run writes down what it took. `fedmerge.experiment.fastest`
measures where that pays.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn

from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Batches, Task
from fedmerge.core.randomness import generator
from fedmerge.core.vector import Layout
from fedmerge.data import Examples, FederatedData
from fedmerge.models.resnet9 import Residual
from fedmerge.runtime import Engine, Folded, Sequential, Vectorised
from fedmerge.runtime.place import HERE, Place
from fedmerge.training import Descent, LocalTraining, draw_batches
from fedmerge.training.folded.fold import form_of, looks_at_numbers
from fedmerge.training.native import accelerated, available
from fedmerge.training.objective import CLASSES, TOKENS, Objective, classes_of_tasks
from fedmerge.training.task import has_dropout, is_batch_coupled

log = logging.getLogger(__name__)

Runtime = Literal["auto", "sequential", "vectorised", "folded"]
Kernels = Literal["auto", "torch", "compiled"]
RUNTIMES = ("sequential", "vectorised", "folded")
"""What `auto` chooses from."""
_CONVOLUTIONS_AT_ONCE = 4


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
    trial: Trial, runtime: Runtime, most: int | None = None, kernels: Kernels = "auto"
) -> tuple[Engine, Choice]:
    """The engine that was asked for; for ``auto`` that of the rule.

    The rule: perceptrons and the like (no convolutions, BatchNorm, dropout or frozen base) run folded, or vectorised
    where a layer cannot be folded, if a step on a few examples gives the same numbers; everything else sequentially.

    Args:
        trial: Of the network on the clients' data.
        runtime: What was asked for.
        most: Clients at once, if that was asked for.
        kernels: Whether convolutions may or must go through compiled kernels.

    Raises:
        UsageError: if an engine was asked for and does not give the sequential numbers.
    """
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
