"""One run from start to end: loop, record, folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmerge.algorithms import ALGORITHMS
from fedmerge.data import FederatedData
from fedmerge.experiment.book import Book, new_run_folder
from fedmerge.experiment.config import Config, RunOptions, method_options, plain_options
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.forecast import Forecast, forecast
from fedmerge.experiment.record import RoundRecord, RunRecord, Status, select, write_run
from fedmerge.experiment.samples import written_samples
from fedmerge.experiment.serving import write_serving
from fedmerge.experiment.simulation import Progress, Setup, finetune, one_thread, prepare, rounds
from fedmerge.experiment.spread import dismiss
from fedmerge.experiment.store import versions, write_inputs, write_models
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
    setup, progress = prepare(algorithm, data, model, training, options)
    record = new_record(setup, data, model, label)
    with nullcontext() if folder is None else new_run_folder(folder):
        book = None
        if folder is not None:
            write_inputs(folder, config, data)
            write_serving(folder, model, training, options, data, setup.module)
            write_run(folder, record)
            book = Book(folder, setup, record.data_sha256)
        if foretell is not None:
            foretell(forecast(setup, progress))
        return play(setup, Journey(progress, progress), record, model=model, folder=folder, book=book, watch=watch)


@dataclass
class Journey:
    """Where a run is and was best; the one thing here that changes as it goes.

    Attributes:
        last: The state after the last round.
        selected: The state at the round that is selected so far.
        lines: The rounds so far.
        best: The selected round; None before the first evaluation.
        seconds: Wall time before this process took the run over.
    """

    last: Progress
    selected: Progress
    lines: list[RoundRecord] = field(default_factory=list)
    best: RoundRecord | None = None
    seconds: float = 0.0

    def follow(self, progress: Progress, line: RoundRecord, which: str) -> None:
        """Takes in one round."""
        self.last = progress
        self.lines.append(line)
        if line.test is None:
            return
        self.best = line if self.best is None or which == "last" else select((self.best, line))
        if self.best is line:
            self.selected = progress

    @property
    def choice(self) -> tuple[int, Progress]:
        """The selected round, −1 for none, and the state at it."""
        return (-1 if self.best is None else self.best.round), self.selected


def play(
    setup: Setup,
    journey: Journey,
    record: RunRecord,
    *,
    model: Any,
    folder: Path | None,
    book: Book | None,
    watch: Watcher | None,
) -> Outcome:
    """All rounds that are left of a run, and its end.

    Args:
        setup: Of the run.
        journey: Where it stands; goes along.
        record: What is known of it.
        model: Recipe, module or function that the run was given.
        folder: Where to write it, if anywhere; held by this process.
        book: Of that folder.
        watch: Called after every round, where there is a book when it is on the disk.
    """
    began = time.perf_counter() - journey.seconds
    try:
        with one_thread():
            for progress, line in rounds(setup, journey.last, begun=bool(journey.lines)):
                journey.follow(progress, line, setup.options.select)
                if book is not None:
                    book.note(line, journey.last, journey.choice, time.perf_counter() - began)
                _announce((line,) if book is None else book.written(), watch)
            _announce(() if book is None else book.written(wait=True), watch)
            record = _with_finetuning(record, setup, journey.selected)
            record = replace(record, samples=written_samples(setup, journey.selected, model))
    except BaseException as error:
        status: Status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError):  # a full disk, which `error` tells already
            if book is not None:
                book.stop()
            close_run(record, status, journey, time.perf_counter() - began, folder)
        raise
    finally:
        dismiss(setup.engine)
    record = close_run(record, "finished", journey, time.perf_counter() - began, folder)
    if book is not None:
        book.close()
    return Outcome(record, setup, journey.last, journey.selected, folder, model)


def _announce(lines: Iterable[RoundRecord], watch: Watcher | None) -> None:
    if watch is not None:
        for line in lines:
            watch(line)


def close_run(record: RunRecord, status: Status, journey: Journey, seconds: float, folder: Path | None) -> RunRecord:
    """The record of a run that has ended, written down with its last and its selected state.

    Args:
        record: What is known of it.
        status: How it ended.
        journey: Where it was and where it was best.
        seconds: Wall time.
        folder: Of the run, if it has one.
    """
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


def new_record(setup: Setup, data: FederatedData, model: Any, label: str) -> RunRecord:
    """The record of a run before its first round.

    Args:
        setup: Of the run.
        data: Its clients.
        model: Recipe, module or function that the run was given.
        label: How tables call the run.
    """
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
        select=setup.options.select,
        engine=setup.choice,
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
