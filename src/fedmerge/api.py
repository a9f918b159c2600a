"""The public Python API: run one method, compare several, read what they left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Algorithm
from fedmerge.data import FederatedData
from fedmerge.data.sources import Source
from fedmerge.experiment.comparison import refuse_taken
from fedmerge.experiment.config import (
    Config,
    build_config,
)
from fedmerge.experiment.execute import Outcome, Watcher, execute, execute_config
from fedmerge.experiment.record import RoundRecord, RunRecord, read_run
from fedmerge.experiment.resume import resume_run
from fedmerge.experiment.simulation import prepare
from fedmerge.exporting import Exported, client_of, export_client, trained_of_folder, trained_of_outcome
from fedmerge.models import Network
from fedmerge.onboarding import Onboarded, onboard_server, server_of_folder, server_of_outcome
from fedmerge.request import Dealer, Request, dealer_of, faults_of_lists, known_model, request_of, variant_of
from fedmerge.results import Comparison, Run
from fedmerge.training import LocalTraining

T = TypeVar("T")
Data = FederatedData | Source | str | Mapping[str, Any]
Partition = str | Mapping[str, Any] | Any | None
Model = str | Mapping[str, Any] | nn.Module | Callable[..., nn.Module] | Network
Method = str | Mapping[str, Any] | Algorithm[Any]
Training = LocalTraining | Mapping[str, Any] | None


def run(
    data: Data = "digits",
    *,
    partition: Partition = None,
    model: Model = "mlp",
    method: Method = "fedmerge",
    training: Training = None,
    label: str = "",
    out: Path | str | None = None,
    watch: Watcher | None = None,
    **options: Any,
) -> Run:
    """Trains one model per client.

    Args:
        data: Your own clients (`fedmerge.data.from_arrays` and its siblings), or a source's name.
        partition: How a source's items are dealt out, 'rotations' by default; not for your own clients.
        model: A network's name, your module, or a function or class that makes one (it is given `input_shape` and
            `num_classes` if it takes them).
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
    deal = dealer_of(data, partition, faults)
    request = request_of(method, model, training, options, label=label, faults=faults)
    if request is None or faults:
        raise UsageError("\n".join(faults))
    clients = deal.clients(request.options.seed, request.model)
    return _start(request, deal, clients, None if out is None else Path(out), watch)


def compare(
    data: Data = "digits",
    *,
    methods: Sequence[Method] = ("fedmerge", "fedavg", "local", "fesem"),
    seeds: Sequence[int] = (0,),
    partition: Partition = None,
    model: Model = "mlp",
    training: Training = None,
    out: Path | str | None = None,
    watch: Callable[[str, int, RoundRecord], None] | None = None,
    **options: Any,
) -> Comparison:
    """Runs several methods on the same clients, initial weights, cohorts and local budget, once per seed.

    Args:
        data: As for `run`. A source is dealt out anew for every seed; your own clients stay as they are.
        methods: As for `run`. A table may also hold ``label`` and a ``training`` table, whose entries replace those
            of `training` for this method.
        seeds: Of the runs.
        partition: As for `run`.
        model: As for `run`.
        training: As for `run`; shared by all methods.
        out: Folder that receives one run folder per method and seed.
        watch: Called with (label, seed, round record).
        options: As for `run`, but for ``seed`` and ``label``.

    Raises:
        UsageError: naming every fault of the request; nothing has been trained or written then.
        DataError: if the data cannot be used.
    """
    faults = faults_of_lists(methods, seeds, options)
    deal = dealer_of(data, partition, faults)
    if faults:
        raise UsageError("\n".join(faults))
    asked = [(method, {**options, "seed": seed}) for seed in seeds for method in methods]
    requests = [variant_of(method, model, training, own, faults) for method, own in asked]
    ready = [request for request in requests if request is not None]
    names = [request.name for request in ready]
    faults += [f"two runs are called {n!r}; give each method a `label` of its own" for n in names if names.count(n) > 1]
    if faults:
        raise UsageError("\n".join(dict.fromkeys(faults)))
    return Comparison(_run_all(ready, deal, None if out is None else Path(out), watch))


def _start(request: Request, deal: Dealer, data: FederatedData, folder: Path | None, watch: Watcher | None) -> Run:
    return Run(
        execute(
            request.method,
            data,
            request.model,
            request.training,
            request.options,
            label=request.label,
            folder=folder,
            watch=watch,
            config=deal.config_of(request),
        )
    )


def _run_all(
    requests: Sequence[Request],
    deal: Dealer,
    out: Path | None,
    watch: Callable[[str, int, RoundRecord], None] | None,
) -> tuple[RunRecord, ...]:
    """Runs them seed by seed; those of the first seed are prepared before any training, so that they all can start."""
    if out is not None:
        refuse_taken([request.name for request in requests], out)
    seed = requests[0].options.seed
    data = deal.clients(seed, requests[0].model)
    for request in (request for request in requests if request.options.seed == seed):
        prepare(request.method, data, request.model, request.training, request.options)
    records = []
    for request in requests:
        if request.options.seed != seed:
            seed = request.options.seed
            data = deal.clients(seed, request.model)
        folder = None if out is None else out / request.name
        tell = None if watch is None else partial(watch, request.label, seed)
        records.append(_start(request, deal, data, folder, tell).record)
    return tuple(records)


def run_config(table: Mapping[str, Any], *, out: Path | str | None = None, watch: Watcher | None = None) -> Run:
    """Runs a configuration table, as read from TOML."""
    return Run(execute_config(build_config(table), folder=None if out is None else Path(out), watch=watch))


def resume(
    folder: Path | str, *, data: FederatedData | None = None, model: Model | None = None, watch: Watcher | None = None
) -> Run:
    """Goes on with an interrupted run from its last checkpoint; it ends with the bits of an uninterrupted one.

    Args:
        folder: That `run` wrote.
        data: The clients, for a run on clients of your own.
        model: The network again, for a run with a module or function of your own.
        watch: Called with a `RoundRecord` after every round.

    Raises:
        UsageError: if the run is finished or in use, was made from another configuration or other data, or needs
            arguments.
        FedmergeError: if the folder is damaged.
    """
    return Run(resume_run(Path(folder), data=data, model=None if model is None else known_model(model), watch=watch))


def load_run(folder: Path | str) -> RunRecord:
    """What a run folder says: configuration, rounds, scores."""
    return read_run(folder)


def onboard(
    run: Run | Path | str,
    data: Any,
    *,
    validation: Any = None,
    way: str = "auto",
    model: Model | None = None,
    label_column: str | None = None,
    seed: int = 0,
) -> Onboarded:
    """A model for a new client from a handful of its labelled samples; the run's server models stay as they are.

    Args:
        run: What `fedmerge.run` gave, or a run folder.
        data: The client's samples: the path of a file (.npz, .csv, .parquet) or of a folder with the files of this
            one client; ``(inputs, labels)`` as in the raw data, scaled here as at training; or `Examples`, which are
            scaled already. Labels are the run's class names or numbers.
        validation: Further samples, which are only used to compare the ways and to estimate.
        way: ``auto`` compares all of them on held-out samples; else one of ``weights`` (learn the merging weights),
            ``fine-tune``, ``weights-then-fine-tune``, ``single``, ``nearest``, ``mean`` or ``uniform``.
        model: The network again, for a run folder that was made with a module or function of your own.
        label_column: Of .csv and .parquet files; the run's own by default.
        seed: Of folds and batches.

    Raises:
        UsageError: if the run's method keeps no models on the server, or an argument is wrong.
        DataError: naming what is wrong with the samples.

    >>> import fedmerge
    >>> dealt = {"name": "permuted", "clients": 6, "groups": 2, "test": 20}
    >>> federation = fedmerge.run("digits", partition=dealt, rounds=8)
    >>> newcomer = federation.outcome.setup.data.clients[0].test
    >>> fedmerge.onboard(federation, newcomer).fit.verdict
    'like known clients'
    """
    server = _read(run, model, server_of_outcome, server_of_folder)
    return onboard_server(server, data, validation=validation, way=way, label_column=label_column, seed=seed)


def export(
    run: Run | Path | str,
    client: str | int,
    out: Path | str,
    *,
    kind: str | None = None,
    model: Model | None = None,
    row: bool = False,
) -> Exported:
    """Writes the model that one client would use as a folder that other programs load, with a model card.

    Args:
        run: What `fedmerge.run` gave, or a run folder.
        client: Its name or index.
        out: Folder; created, must be empty.
        kind: Of a pretrained model ``peft`` (the adapter, and the output layer; the default), ``merged`` (full
            weights) or ``mergekit`` (the server's models and a recipe); of another network ``torch`` (its tensors; the
            default) or ``onnx``.
        model: The network again, for a run folder that was made with a module or function of your own.
        row: Whether the card tells the client's merging weights, which say whom it is like, and is its owner's then.

    Raises:
        UsageError: if there is no such client or kind, the kind does not fit the network or the method, the network
            must be given, or the folder is not empty.
        FedmergeError: if the run is not finished, its folder is damaged, or a library is missing.

    >>> import fedmerge
    >>> dealt = {"name": "iid", "clients": 4, "test": 20}
    >>> federation = fedmerge.run("digits", method="fedavg", partition=dealt, rounds=2)
    >>> fedmerge.export(federation, 0, "client").files
    ('README.md', 'inputs.json', 'model.safetensors')
    """
    trained = _read(run, model, trained_of_outcome, trained_of_folder)
    return export_client(client_of(trained, client), Path(out), kind, row=row)


def _read(run: Any, model: Any, of_outcome: Callable[[Outcome], T], of_folder: Callable[[Path, Any], T]) -> T:
    """A run, in memory or in a folder, as one of two functions reads it."""
    if isinstance(run, Run):
        if model is not None:
            raise UsageError("model: got one for a Run object, which has its network already; leave it out")
        return of_outcome(run.outcome)
    if isinstance(run, (str, Path)):
        return of_folder(Path(run), None if model is None else known_model(model))
    raise UsageError(f"run: got a {type(run).__name__}; expected a Run or the path of a run folder")


__all__ = [
    "Comparison",
    "Config",
    "Exported",
    "Onboarded",
    "Run",
    "compare",
    "export",
    "load_run",
    "onboard",
    "resume",
    "run",
    "run_config",
]
