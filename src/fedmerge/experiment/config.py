"""A run as data: typed options from TOML and command-line overrides, with every fault reported at once."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch

from fedmerge.algorithms import ALGORITHMS
from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.core.defences import Defences
from fedmerge.core.errors import UsageError, together, unknown_name
from fedmerge.core.options import build_options, check_options, option, option_fields
from fedmerge.core.registry import Registry
from fedmerge.core.strict_json import read_bounded, refuse_depth
from fedmerge.core.text import brief, shortened
from fedmerge.data import PARTITIONS, SOURCES, FolderOptions
from fedmerge.experiment.attacks import Attack
from fedmerge.experiment.participation import Participation
from fedmerge.models import NETWORKS
from fedmerge.models.mlp import Mlp
from fedmerge.training import LocalTraining

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]


@dataclass(frozen=True)
class RunOptions:
    """How a run goes, apart from data, model and method."""

    rounds: int = option(100, at_least=1, help="number of rounds")
    fraction: float = option(1.0, above=0, at_most=1, help="share of clients in each round's cohort")
    evaluate_every: int = option(10, at_least=1, help="rounds between two evaluations; the last is always evaluated")
    finetune_epochs: int = option(0, at_least=0, help="local epochs at the end, reported beside the plain result")
    seed: int = option(0, at_least=0, help="decides split, initial model, cohorts and batches")
    runtime: Literal["auto", "sequential", "vectorised", "folded"] = option(
        "auto", help="how clients are executed; auto measures before a long run"
    )
    kernels: Literal["auto", "torch", "compiled"] = option(
        "auto",
        help="of convolutions; compiled: made here (float32, sequential or folded); auto: if measured faster",
    )
    fold: int | None = option(None, at_least=1, help="clients that run at once, where several do; found out by default")
    workers: int = option(1, at_least=1, help="processes that train clients at the same time; numbers stay the same")
    cluster: str | None = option(
        None, help="address of a Ray cluster whose actors are the workers, or 'local' to start one here"
    )
    buffers: Literal["merge", "local", "recalibrate"] = option(
        "merge", help="whose BatchNorm statistics a client's model has"
    )
    precision: Literal["float32", "float64", "tf32", "bfloat16"] = option(
        "float32", help="of inputs and parameters; with tf32 and bfloat16 products alone have fewer bits"
    )
    device: str = option("cpu", help="where clients are computed, cpu or cuda; the server stays on the cpu")
    head: str | None = option(None, help="sub-module that is the output layer; the last one with parameters by default")
    frozen: tuple[str, ...] = option((), help="sub-modules whose parameters are neither trained nor sent")
    keep: tuple[str, ...] = option(
        (), help="sub-modules whose parameters are trained and never leave their client; 'head' is the output layer"
    )

    merging: Literal["auto", "factors", "product"] = option(
        "auto",
        help="how LoRA factors are averaged: each alone, or as products (auto: while the two differ by over 0.3)",
    )
    select: Literal["validation", "last"] = option(
        "validation", help="which round is reported and deployed: the best one on validation, or the last"
    )
    checkpoint_every: int = option(
        1, at_least=0, help="rounds between two checkpoints, after which the run can go on; 0: none"
    )
    participation: Participation = option(Participation(), help="who is asked and who answers in time")
    defences: Defences = option(Defences(), help="what is believed of a reply (list defences)")
    attack: Attack = option(Attack(), help="clients that lie, for simulations (list attack)")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and parameters: `precision` as torch knows it."""
        return torch.float64 if self.precision == "float64" else torch.float32


OPTION_TABLES: dict[str, type] = {
    "training": LocalTraining,
    "participation": Participation,
    "defences": Defences,
    "attack": Attack,
}
"""Tables of options beside those of data, network and method."""


@dataclass(frozen=True)
class Config:
    """Everything a run is made from.

    Attributes:
        source: Where the items come from.
        partition: How they are dealt out; None for a folder of a user's own clients.
        model: The network's recipe.
        method: The algorithm with its hyper-parameters.
        training: What a client does in a round.
        run: Rounds, seed and the like.
        label: How tables call the run; the method's name by default.
    """

    source: Any
    partition: Any
    model: Any = field(default_factory=Mlp)
    method: Any = field(default_factory=FedMerge)
    training: LocalTraining = field(default_factory=LocalTraining)
    run: RunOptions = field(default_factory=RunOptions)
    label: str = ""

    @property
    def name(self) -> str:
        """The label, or the method's registered name."""
        return self.label or ALGORITHMS.name_of(self.method)


_CHOICES: dict[str, Registry[Any]] = {
    "source": SOURCES,
    "partition": PARTITIONS,
    "model": NETWORKS,
    "method": ALGORITHMS,
}
_DEFAULTS: dict[str, Table] = {
    "source": {"name": "digits"},
    "partition": {"name": "rotations"},
    "model": {"name": "mlp"},
    "method": {"name": "fedmerge"},
}
_SMALL_PARTITION: Table = {"name": "rotations", "clients": 20, "train": 50, "validation": 12, "test": 25}
"""Of the embedded digits, which have 1,797 items only, where no partition is asked for."""


MOST_TOML_BYTES = 2**20


def read_toml(path: Path | str) -> Table:
    """A TOML file as a table.

    Raises:
        UsageError: if it cannot be read or is not TOML; names the file and the place.
    """
    try:
        table = tomllib.loads(read_bounded(Path(path), MOST_TOML_BYTES).decode("utf-8"))
        refuse_depth(table)
    except OSError as error:
        raise UsageError(f"cannot read configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number too long, tables too deep
        raise UsageError(f"{path} is not valid TOML: {shortened(str(error))}") from error
    return table


def config_of(folder: Path) -> Config | None:
    """What a run folder was made from; None if it does not say (the clients or the network were the user's own).

    Raises:
        UsageError: naming all that is wrong with its ``config.toml``.
    """
    path = folder / "config.toml"
    return build_config(read_toml(path)) if path.is_file() else None


def parse_value(text: str) -> Any:
    """A command-line word as the plain value it spells: number, true/false, list, table, or else a text.

    >>> parse_value("0.1"), parse_value("true"), parse_value("[1, 2]"), parse_value("cosine")
    (0.1, True, [1, 2], 'cosine')
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed["value"] if len(parsed) == 1 else text  # a line break could begin another key
    return text if isinstance(value, float) and not math.isfinite(value) else value  # no option is NaN; a name may be


def override(table: Mapping[str, Any], assignments: Sequence[str]) -> Table:
    """A copy of `table` with ``dotted.key=value`` words applied; ``source=digits`` stands for ``source.name=digits``.

    Choosing another name drops the options that `table` holds for the old one; the order of the words is irrelevant
    to that.

    Raises:
        UsageError: for a word without ``=`` or a key that runs through a plain value.
    """
    result: Table = copy.deepcopy(dict(table))
    for kind in _CHOICES:
        if isinstance(result.get(kind), str):
            result[kind] = {"name": result[kind]}
    paths = {word: _path(word) for word in assignments}
    for word in sorted(assignments, key=lambda word: not _chooses(paths[word])):
        assign(result, paths[word], parse_value(word.partition("=")[2]), word)
    return result


def _path(word: str) -> list[str]:
    key, equals, _ = word.partition("=")
    if not equals or not key:
        raise UsageError(f"got {brief(word)}; expected key=value, for example rounds=50 or training.lr=0.05")
    path = key.split(".")
    return [*path, "name"] if path[0] in _CHOICES and len(path) == 1 else path


def _chooses(path: Sequence[str]) -> bool:
    return len(path) == 2 and path[0] in _CHOICES and path[1] == "name"


def assign(table: Table, path: Sequence[str], value: Any, word: str) -> None:
    """Sets the value at a path of keys in place, making tables on the way.

    Args:
        table: Changed.
        path: One key or more.
        value: What to set.
        word: What the user wrote, for the message.

    Raises:
        UsageError: if a key on the way holds a plain value.
    """
    inner = table
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UsageError(f"got {brief(word)}; {part!r} is a plain value, not a table")
    if _chooses(path) and inner.get("name") != value:
        inner.clear()
    inner[path[-1]] = value


def build_config(table: Mapping[str, Any]) -> Config:
    """A configuration from a table with ``source``, ``partition``, ``model``, ``method``, ``training`` and run options.

    Raises:
        UsageError: with one line per fault, all of them together.
    """
    faults: list[str] = []
    rest = {key: value for key, value in table.items() if key not in {*_CHOICES, "training", "label"}}
    _complain_of_unknown(rest, faults)
    known = option_fields(RunOptions)
    run = build_options(RunOptions, {key: value for key, value in rest.items() if key in known}, "run", faults)
    training = build_options(LocalTraining, subtable(table, "training", faults), "training", faults)
    chosen = {kind: _chosen(kind, table, faults) for kind in _CHOICES}
    label = table.get("label", "")
    check_label(label, faults)
    if faults or run is None or training is None:
        raise UsageError(together(faults))
    return Config(**chosen, training=training, run=run, label=label)


def check_label(label: Any, faults: list[str]) -> None:
    """Appends a fault if a label cannot be a row's heading and a folder's name."""
    fits = isinstance(label, str) and (label.isprintable() or not label) and not set(label) & {"/", "\\"}
    if not fits or label.startswith(".") or len(label.encode()) > 200:
        faults.append(
            f"label: got {brief(label)}; expected a text of one line, up to 200 bytes, without slashes and no dot "
            "first: it also names the run's folder"
        )


def _complain_of_unknown(rest: Table, faults: list[str]) -> None:
    known = {*option_fields(RunOptions), *_CHOICES, "training", "label"}
    faults += [unknown_option(key, known) for key in rest if key not in known]


def unknown_option(key: str, known: Iterable[str]) -> str:
    """What to say of a run option that does not exist: where it belongs, or the nearest name."""
    for table, cls in OPTION_TABLES.items():
        if key in option_fields(cls):
            return f"unknown option {key!r}: it belongs to {table} ({table}.{key})"
    owners = [name for name in ALGORITHMS if key in option_fields(ALGORITHMS[name].cls)]
    if owners:
        return f"unknown option {key!r}: it belongs to a method (method.{key}, of {', '.join(owners)})"
    return unknown_name("option", key, known)


def subtable(table: Mapping[str, Any], key: str, faults: list[str]) -> Table:
    """The table at a key, an empty one where there is none; appends a fault if something else is there."""
    value = table.get(key, {})
    if isinstance(value, Mapping):
        return dict(value)
    faults.append(f"{key}: got {brief(value)}; expected a table")
    return {}


def _chosen(kind: str, table: Mapping[str, Any], faults: list[str]) -> Any:
    value = spelled_out(kind, table.get(kind, _default(kind, _source_name(table))))
    given: Table = {"name": value} if isinstance(value, str) else subtable({kind: value}, kind, faults)
    if kind == "source" and given.get("name") == "folder":
        return build_options(FolderOptions, {k: v for k, v in given.items() if k != "name"}, "source", faults)
    name = given.get("name")
    if kind == "source" and isinstance(name, str) and name not in SOURCES:
        faults.append(f"source.name: {unknown_name('source', name, [*SOURCES, 'folder'])}")
        return None
    if kind == "partition" and _is_folder(table):
        if "partition" in table:
            faults.append("partition: got one for source 'folder', whose files are the clients; leave it out")
        return None
    return _CHOICES[kind].build(
        given if "name" in given else {**_default(kind, _source_name(table)), **given}, kind, faults
    )


def spelled_out(kind: str, value: Any) -> Any:
    """``"hf:PATH"`` for a model, as its own value or as its name, is the table of a pretrained model at that path.

    >>> spelled_out("model", "hf:minilm")
    {'name': 'hf', 'path': 'minilm'}
    """
    name = value.get("name") if isinstance(value, Mapping) else value
    if kind != "model" or not isinstance(name, str) or not name.startswith("hf:"):
        return value
    rest = dict(value) if isinstance(value, Mapping) else {}
    return {**rest, "name": "hf", "path": name.removeprefix("hf:")}


def _default(kind: str, source_name: Any) -> Table:
    return default_partition(source_name) if kind == "partition" else _DEFAULTS[kind]


def default_partition(source_name: Any) -> Table:
    """How a source is dealt out if the user does not say."""
    return {"digits": _SMALL_PARTITION, "text-tasks": {"name": "task"}}.get(str(source_name), _DEFAULTS["partition"])


def _source_name(table: Mapping[str, Any]) -> Any:
    source = table.get("source", _DEFAULTS["source"])
    return source.get("name", "digits") if isinstance(source, Mapping) else source


def _is_folder(table: Mapping[str, Any]) -> bool:
    return bool(_source_name(table) == "folder")


def to_table(config: Config) -> Table:
    """The inverse of `build_config`: plain values, everything resolved, None left out."""
    table: Table = {**({"label": config.label} if config.label else {}), **plain_options(config.run)}
    for kind, registry in _CHOICES.items():
        chosen = getattr(config, kind)
        if chosen is not None:
            name = "folder" if isinstance(chosen, FolderOptions) else registry.name_of(chosen)
            table[kind] = {"name": name, **plain_options(chosen)}
    table["training"] = plain_options(config.training)
    return table


def plain_options(options: Any) -> Table:
    """An options dataclass as plain values, None left out."""
    plain = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.init}
    return {key: _plain_value(value) for key, value in plain.items() if value is not None}


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return plain_options(value)
    return list(value) if isinstance(value, tuple) else value


def method_options(method: Any, training: LocalTraining) -> dict[str, Any]:
    """A method's options, resolved, with a ``training`` table: what records and results say of a method."""
    return {**plain_options(method), "training": plain_options(training)}


def config_text(config: Config) -> str:
    """A configuration as TOML that `build_config` reads back to the same one."""
    return tomli_w.dumps(to_table(config))
