"""A run that was interrupted goes on and ends with the bits of one that was not."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmerge.core.errors import UsageError
from fedmerge.data import FederatedData
from fedmerge.experiment.book import Book, held, standing
from fedmerge.experiment.checkpoint import remove_all
from fedmerge.experiment.config import config_of
from fedmerge.experiment.execute import Journey, Outcome, Watcher, play
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import RunRecord, read_run, read_run_alone, write_run
from fedmerge.experiment.serving import Serving, method_of, read_serving
from fedmerge.experiment.simulation import prepare
from fedmerge.experiment.store import versions
from fedmerge.models import NETWORKS

log = logging.getLogger(__name__)


def resume_run(
    folder: Path, *, data: FederatedData | None = None, model: Any = None, watch: Watcher | None = None
) -> Outcome:
    """Goes on with a run from its last checkpoint.

    Args:
        folder: Of the run.
        data: Its clients, for a run that was given clients of the user's own.
        model: Its module or function, for a run that was given one.
        watch: Called after every round.

    Raises:
        UsageError: if the run is finished or in use, or what it was made from is not there or has changed.
        FedmergeError: if the folder is damaged.
    """
    read_run_alone(folder)  # refuses what is no run before anything is written there
    with held(folder):
        record = read_run_alone(folder)
        refuse_finished(folder, record)
        method, training, options, recipe, clients = _asked(folder, record, data, model)
        if clients.sha256() != record.data_sha256:
            raise UsageError(
                f"{folder} was made on other data than are there now; bring the same data, or make a new run"
            )
        setup, start = prepare(method, clients, recipe, training, options, choice=record.engine)
        stand = standing(folder, setup, start, record.data_sha256)
        _tell_versions(record)
        record = replace(record, status="running", versions=versions())
        write_run(folder, record)
        journey = Journey(start, start)
        if stand.found is not None:
            found = stand.found
            best = next((line for line in stand.lines if line.round == found.manifest.selected), None)
            journey = Journey(found.last, found.selected, list(stand.lines), best, found.manifest.seconds)
        book = Book(folder, setup, record.data_sha256, stand.found)
        return play(setup, journey, record, model=recipe, folder=folder, book=book, watch=watch)


def refuse_finished(folder: Path, record: RunRecord) -> None:
    """Raises UsageError if a run needs no more rounds; it may have been killed before it removed its checkpoints."""
    if record.status == "finished":
        remove_all(folder)
        record = read_run(folder)
        raise UsageError(
            f"run {record.label!r} (seed {record.seed}) is finished after {record.last().round} rounds; there is "
            "nothing to resume"
        )


def _asked(
    folder: Path, record: RunRecord, data: FederatedData | None, model: Any
) -> tuple[Any, Any, Any, Any, FederatedData]:
    """Method, training, options, network and clients of a run."""
    config = config_of(folder)
    if config is not None:
        if data is not None or model is not None:
            raise UsageError(f"{folder} says itself which data and network it needs; leave `data` and `model` out")
        clients = load_data(config.source, config.partition, config.run.seed, config.model)
        return config.method, config.training, config.run, config.model, clients
    serving = read_serving(folder)
    if serving is None:
        raise UsageError(f"{folder} has neither config.toml nor serving.json; it cannot be resumed")
    if data is None:
        raise UsageError(
            f"{folder} was made on clients of your own; give them again: fedmerge.resume(folder, data=...)"
        )
    return method_of(record), serving.training, serving.options, _network_of(folder, serving, model), data


def _network_of(folder: Path, serving: Serving, model: Any) -> Any:
    if model is not None:
        return model
    if serving.model is None:
        raise UsageError(
            f"{folder} was made with a network of your own; give it again: fedmerge.resume(folder, model=...)"
        )
    return NETWORKS.build(serving.model, "model", [])  # it was checked when the file was read


def _tell_versions(record: RunRecord) -> None:
    now, then = versions(), record.versions
    changed = [f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]]
    if changed:
        log.warning("the run goes on with other versions, which may change its last bits: %s", ", ".join(changed))
