"""One run from start to end: loop, record, folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmerge.algorithms import ALGORITHMS
from fedmerge.data import FederatedData
from fedmerge.experiment.config import Config, RunOptions, method_options, plain_options
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.forecast import Forecast, forecast
from fedmerge.experiment.record import RoundRecord, RunRecord, Status, append_round, select, write_run
from fedmerge.experiment.samples import written_samples
from fedmerge.experiment.serving import write_serving
from fedmerge.experiment.simulation import Progress, Setup, finetune, one_thread, prepare, rounds
from fedmerge.experiment.store import create_run_folder, versions, write_inputs, write_models
from fedmerge.training import LocalTraining

_MOST_OPTIONS = 6
Watcher = Callable[[RoundRecord], None]
"""Called after every round."""
Teller = Callable[[Forecast], None]
"""Called before the first round."""


@dataclass(frozen=True)
class Outcome:
    """What is at hand when a run has ended.

    Attributes:
        record: The whole run.
        setup: What it ran on.
        progress: Its state after the last round.
        selected: Its state at the round that validation selects, whose scores are reported.
        folder: Where it was written, if anywhere.
        model: Recipe, module or function that the run was given.
    """

    record: RunRecord
    setup: Setup
    progress: Progress
    selected: Progress
    folder: Path | None
    model: Any = None


def execute_config(
    config: Config,
    *,
    data: FederatedData | None = None,
    folder: Path | None = None,
    watch: Watcher | None = None,
    foretell: Teller | None = None,
) -> Outcome:
    """Runs a configuration.

    Args:
        config: What to run.
        data: The clients, if they are loaded already; they must be those of the configuration.
        folder: Where to write the run; created, must be empty.
        watch: Called after every round.
        foretell: Called once before the first round with what the run will take; measuring that takes a few steps.
    """
    data = load_data(config.source, config.partition, config.run.seed, config.model) if data is None else data
    return execute(
        config.method,
        data,
        config.model,
        config.training,
        config.run,
        label=config.name,
        folder=folder,
        watch=watch,
        config=config,
        foretell=foretell,
    )


def execute(
    algorithm: Any,
    data: FederatedData,
    model: Any,
    training: LocalTraining,
    options: RunOptions,
    *,
    label: str,
    folder: Path | None = None,
    watch: Watcher | None = None,
    config: Config | None = None,
    foretell: Teller | None = None,
) -> Outcome:
    """Runs a method on a federation.

    A run that is interrupted or fails keeps its rounds so far, its last state and a status that says so; the
    exception is passed on.

    Args:
        algorithm: The method.
        data: The clients.
        model: A recipe, a module, or a function that makes one.
        training: What a client does in a round.
        options: Rounds, seed and the like.
        label: How tables call the run.
        folder: Where to write the run; created, must be empty.
        watch: Called after every round.
        config: Written into the folder, where the run was made from one.
        foretell: As for `execute_config`.
    """
    began = time.perf_counter()
    setup, progress = prepare(algorithm, data, model, training, options)
    record = _new_record(setup, data, model, label)
    if folder is not None:
        create_run_folder(folder)
        write_inputs(folder, config, data)
        write_serving(folder, model, training, options, data, setup.module)
        write_run(folder, record)
    if foretell is not None:
        foretell(forecast(setup, progress))
    journey = _Journey(progress, progress, [])
    try:
        with one_thread():
            for progress_now, line in rounds(setup, progress):
                journey.follow(progress_now, line)
                if folder is not None:
                    append_round(folder, line)
                if watch is not None:
                    watch(line)
            record = _with_finetuning(record, setup, journey.selected)
            record = replace(record, samples=written_samples(setup, journey.selected, model))
    except BaseException as error:
        status: Status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        _close(record, status, journey, time.perf_counter() - began, folder)
        raise
    record = _close(record, "finished", journey, time.perf_counter() - began, folder)
    return Outcome(record, setup, journey.last, journey.selected, folder, model)


@dataclass
class _Journey:
    """Where a run is and was best; the one thing here that changes as it goes."""

    last: Progress
    selected: Progress
    lines: list[RoundRecord]
    best: RoundRecord | None = None

    def follow(self, progress: Progress, line: RoundRecord) -> None:
        """Takes in one round."""
        self.last = progress
        self.lines.append(line)
        if line.test is None:
            return
        self.best = line if self.best is None else select((self.best, line))
        if self.best is line:
            self.selected = progress


def _close(record: RunRecord, status: Status, journey: _Journey, seconds: float, folder: Path | None) -> RunRecord:
    record = replace(record, status=status, seconds=seconds, rounds=tuple(journey.lines))
    if folder is not None:
        write_models(folder / "models.safetensors", journey.selected)
        write_models(folder / "last.safetensors", journey.last)
        write_run(folder, record)
    return record


def _with_finetuning(record: RunRecord, setup: Setup, progress: Progress) -> RunRecord:
    if not setup.options.finetune_epochs:
        return record
    validation, test = finetune(setup, progress)
    return replace(record, finetuned_validation=validation, finetuned=test)


def _new_record(setup: Setup, data: FederatedData, model: Any, label: str) -> RunRecord:
    return RunRecord(
        label=label,
        method=ALGORITHMS.name_of(setup.algorithm),
        options=method_options(setup.algorithm, setup.training),
        seed=setup.options.seed,
        status="running",
        client_names=tuple(client.name for client in data.clients),
        groups=data.groups,
        num_train=tuple(client.num_train for client in data.clients),
        num_validation=tuple(len(client.validation.targets) for client in data.clients),
        num_test=tuple(len(client.test.targets) for client in data.clients),
        class_names=data.class_names,
        num_params=setup.layout.num_params,
        setting=f"{data.source}, {_model_text(model)}, {setup.options.rounds} rounds, {_cohort_text(setup)}",
        data_sha256=data.sha256(),
        versions=versions(),
        class_counts=data.class_counts(),
        tasks=data.tasks,
    )


def _model_text(model: Any) -> str:
    if callable(model):  # a module, a class or a function
        return str(getattr(model, "__name__", type(model).__name__))
    options, name = plain_options(model), type(model).__name__
    if len(options) > _MOST_OPTIONS:  # only what says more than the name does
        defaults = {field.name: field.default for field in dataclasses.fields(model)}
        options = {key: value for key, value in options.items() if getattr(model, key) != defaults[key]}
    return name + (f"({', '.join(f'{key}={value}' for key, value in options.items())})" if options else "")


def _cohort_text(setup: Setup) -> str:
    fraction = setup.options.fraction
    return "all clients each round" if fraction == 1 else f"{100 * fraction:g} % of the clients each round"
