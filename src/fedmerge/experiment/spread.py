"""Whether the clients of a run are computed by several workers, and what speaks against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fedmerge.core.errors import UsageError
from fedmerge.core.vector import Layout
from fedmerge.data import Examples, FederatedData
from fedmerge.experiment.choice import Choice, objective_of
from fedmerge.experiment.config import RunOptions
from fedmerge.runtime import Engine
from fedmerge.runtime.processes import Processes, safe_start
from fedmerge.runtime.ray import Actors
from fedmerge.runtime.workers import DRAWS, Workers
from fedmerge.training import Descent
from fedmerge.training.task import has_dropout


@dataclass(frozen=True)
class _Like:
    """Makes an engine like another one; a plain value, so that other processes can."""

    choice: Choice
    module: nn.Module
    layout: Layout
    descent: Descent
    facts: FederatedData

    def __call__(self) -> Engine:
        return self.choice.engine(self.module, self.layout, self.descent, objective_of(self.facts))


def spread(
    engine: Engine,
    choice: Choice,
    module: nn.Module,
    layout: Layout,
    descent: Descent,
    data: FederatedData,
    options: RunOptions,
) -> Engine:
    """The engine, or one that spreads its clients over the workers that were asked for.

    Args:
        engine: Of this process; the numbers are its own either way.
        choice: What it is.
        module: The network.
        layout: Of the module.
        descent: The local optimiser.
        data: The clients, in the run's precision.
        options: Say how many workers there are, and where.

    Raises:
        UsageError: for a network whose training draws random numbers, or where Ray is asked for and missing.
    """
    if options.workers == 1 and options.cluster is None:
        return engine
    if options.device != "cpu":
        raise UsageError(
            f"workers: got {options.workers} with device {options.device!r}, on which one process computes many "
            "clients at once; leave workers and cluster out"
        )
    if has_dropout(module):
        raise UsageError(DRAWS)
    facts = FederatedData((), data.class_names, kind=data.kind, class_tasks=data.class_tasks)
    like, known = _Like(choice, module, layout, descent, facts), examples_of(data)
    if options.cluster is not None:
        return Workers(engine, Actors(like, options.workers, known, address=options.cluster))
    start = safe_start()
    make = like if start == "spawn" else lambda: engine  # a forked process has the engine itself
    return Workers(engine, Processes(make, options.workers, known, start=start))


def examples_of(data: FederatedData) -> list[Examples]:
    """Every split of every client."""
    return [split for client in data.clients for split in (client.train, client.validation, client.test)]


def dismiss(engine: Any) -> None:
    """Ends the workers of an engine that has some; it can still be used, and starts others then."""
    if isinstance(engine, Workers):
        engine.close()
