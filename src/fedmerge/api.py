"""The public Python API: run one method, compare several, read what they left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from torch import Tensor, nn

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.options import build_options
from fedmerge.core.protocol import Algorithm
from fedmerge.core.registry import Registry
from fedmerge.data import PARTITIONS, SOURCES, FederatedData, check_federation
from fedmerge.experiment.config import Config, RunOptions, build_config
from fedmerge.experiment.execute import Outcome, Watcher, execute, execute_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import RunRecord, read_run
from fedmerge.experiment.simulation import models_now, one_thread
from fedmerge.models import NETWORKS
from fedmerge.report import Table, clients_frame, comparison_table, runs_frame, write_report
from fedmerge.training import LocalTraining

Data = FederatedData | str | Mapping[str, Any]
Model = str | Mapping[str, Any] | nn.Module | Callable[[], nn.Module] | Any
Method = str | Mapping[str, Any] | Algorithm[Any]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        outcome: Record, final state and what it ran on.
    """

    outcome: Outcome

    @property
    def record(self) -> RunRecord:
        """Everything measured."""
        return self.outcome.record

    @property
    def accuracy(self) -> float:
        """Mean test accuracy over clients at the round that validation selects, 0..1."""
        scores = self.record.selected().test
        assert scores is not None  # noqa: S101 - selected rounds are evaluated
        return scores.mean_accuracy()

    def mixing(self) -> Tensor | None:
        """[N, d] merging weights of every client; None for methods without them."""
        return self.outcome.setup.algorithm.mixing(self.outcome.progress.state)

    def client_model(self, client: str | int) -> nn.Module:
        """The network that one client would deploy: its own merge, ready to use, in evaluation mode.

        Args:
            client: Its name or index.
        """
        setup, names = self.outcome.setup, self.record.client_names
        if client not in names and client not in range(len(names)):
            raise UsageError(unknown_name("client", client, names))
        index = client if isinstance(client, int) else names.index(client)
        with one_thread():
            params = models_now(setup, self.outcome.progress)[index]
        module = copy.deepcopy(setup.module)
        setup.layout.write(params, module)
        return module.eval()

    def frame(self) -> pd.DataFrame:
        """One row per client: its scores at the selected and at the last round."""
        return clients_frame([self.record])

    def report(self, target: Path | str) -> Path:
        """Writes one self-contained HTML page."""
        return write_report([self.record], Path(target))


@dataclass(frozen=True)
class Comparison:
    """Several methods on the same data, seeds, cohorts and local budget.

    Attributes:
        records: One per method and seed.
    """

    records: tuple[RunRecord, ...]

    def frame(self) -> pd.DataFrame:
        """One row per run."""
        return runs_frame(self.records)

    def clients_frame(self) -> pd.DataFrame:
        """One row per run and client."""
        return clients_frame(self.records)

    def table(self, reference: str | None = None) -> Table:
        """Methods with intervals and paired differences to `reference`."""
        return comparison_table(self.records, reference=reference)

    def report(self, target: Path | str, reference: str | None = None) -> Path:
        """Writes one self-contained HTML page."""
        return write_report(self.records, Path(target), reference=reference)


def run(
    data: Data = "digits",
    *,
    partition: str | Mapping[str, Any] = "class-clusters",
    model: Model = "mlp",
    method: Method = "fedmerge",
    training: LocalTraining | Mapping[str, Any] | None = None,
    label: str = "",
    out: Path | str | None = None,
    watch: Watcher | None = None,
    **options: Any,
) -> Run:
    """Trains one model per client.

    Args:
        data: Your own clients (`fedmerge.data.from_arrays` and its siblings), or a source's name.
        partition: How a source's items are dealt out; not used for your own clients.
        model: A network's name, your module, or a function that makes one.
        method: A registered name, a table with options, or an algorithm object.
        training: Learning rate, batch size, epochs and the like.
        label: How tables call the run.
        out: Folder for the run; created, must be empty.
        watch: Called with a `RoundRecord` after every round.
        options: Fields of `RunOptions`: rounds, seed, fraction, evaluate_every, ...

    Raises:
        UsageError: naming every fault of the request.
        DataError: if the data cannot be used.

    >>> import fedmerge
    >>> result = fedmerge.run("digits", method="fedavg", partition={"name": "iid", "clients": 4, "test": 20}, rounds=2)
    >>> result.record.status
    'finished'
    """
    faults: list[str] = []
    run_options = build_options(RunOptions, options, "run", faults)
    local = training if isinstance(training, LocalTraining) else build_options(
        LocalTraining, training or {}, "training", faults
    )
    chosen_model = _built(NETWORKS, model, "model", faults)
    chosen_method = _built(ALGORITHMS, method, "method", faults)
    if faults or run_options is None or local is None:
        raise UsageError("\n".join(faults))
    federation = _federation(data, partition, run_options.seed)
    outcome = execute(
        chosen_method,
        federation,
        chosen_model,
        local,
        run_options,
        label=label or ALGORITHMS.name_of(chosen_method),
        folder=None if out is None else Path(out),
        watch=watch,
    )
    return Run(outcome)


def compare(
    data: Data = "digits",
    *,
    methods: Sequence[Method] = ("fedmerge", "fedavg", "local", "fesem"),
    seeds: Sequence[int] = (0,),
    out: Path | str | None = None,
    watch: Callable[[str, int, Any], None] | None = None,
    **arguments: Any,
) -> Comparison:
    """Runs several methods on the same clients, initial weights, cohorts and local budget, once per seed.

    Args:
        data: As for `run`. A source is dealt out anew for every seed; your own clients stay as they are.
        methods: As for `run`. A table may also hold ``label`` and a ``training`` table of its own.
        seeds: Of the runs.
        out: Folder that receives one run folder per method and seed.
        watch: Called with (label, seed, round record).
        arguments: As for `run`.
    """
    labels = [_label_of(method) for method in methods]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise UsageError(f"methods: {', '.join(sorted(twice))} is there twice; give each a `label` of its own")
    records = []
    for seed in seeds:
        federation = _federation(data, arguments.get("partition", "class-clusters"), seed)
        for method, label in zip(methods, labels, strict=True):
            bare, own = _without_own_settings(method)
            merged = {**arguments, "seed": seed, "label": label, **({"training": own} if own else {})}
            folder = None if out is None else Path(out) / f"{label}-seed{seed}"
            tell = None if watch is None else _told(watch, label, seed)
            records.append(run(federation, method=bare, out=folder, watch=tell, **merged).record)
    return Comparison(tuple(records))


def _told(watch: Callable[[str, int, Any], None], label: str, seed: int) -> Watcher:
    return lambda record: watch(label, seed, record)


def _label_of(method: Method) -> str:
    if isinstance(method, str):
        return method
    if isinstance(method, Mapping):
        return str(method.get("label", method.get("name", "?")))
    return ALGORITHMS.name_of(method)


def _without_own_settings(method: Method) -> tuple[Method, Mapping[str, Any] | None]:
    if not isinstance(method, Mapping):
        return method, None
    return {k: v for k, v in method.items() if k not in ("label", "training")}, method.get("training")


def _built(registry: Registry[Any], value: Any, where: str, faults: list[str]) -> Any:
    if isinstance(value, str):
        return registry.build({"name": value}, where, faults)
    return registry.build(value, where, faults) if isinstance(value, Mapping) else value


def _federation(data: Data, partition: str | Mapping[str, Any], seed: int) -> FederatedData:
    if isinstance(data, FederatedData):
        check_federation(data)
        return data
    faults: list[str] = []
    source = _built(SOURCES, data, "data", faults)
    dealer = _built(PARTITIONS, partition, "partition", faults)
    if faults:
        raise UsageError("\n".join(faults))
    return load_data(source, dealer, seed)


def run_config(table: Mapping[str, Any], *, out: Path | str | None = None, watch: Watcher | None = None) -> Run:
    """Runs a configuration table, as read from TOML."""
    return Run(execute_config(build_config(table), folder=None if out is None else Path(out), watch=watch))


def load_run(folder: Path | str) -> RunRecord:
    """What a run folder says: configuration, rounds, scores."""
    return read_run(folder)


__all__ = [
    "Comparison",
    "Config",
    "Run",
    "compare",
    "load_run",
    "run",
    "run_config",
]
