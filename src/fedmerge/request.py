"""What the functions of the public API are asked for, checked: names, tables and objects become runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import UsageError
from fedmerge.core.options import build_options, option_fields
from fedmerge.core.protocol import Algorithm
from fedmerge.core.registry import Registry
from fedmerge.data import PARTITIONS, SOURCES, FederatedData, check_federation
from fedmerge.experiment.config import (
    Config,
    RunOptions,
    check_label,
    default_partition,
    spelled_out,
    unknown_option,
)
from fedmerge.experiment.federation import load_data
from fedmerge.models import NETWORKS
from fedmerge.training import LocalTraining


@dataclass(frozen=True)
class Request:
    """One run, checked but for what only the data can tell."""

    method: Algorithm[Any]
    model: Any
    training: LocalTraining
    options: RunOptions
    label: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.label}-seed{self.options.seed}"


def request_of(
    method: Any, model: Any, training: Any, options: Mapping[str, Any], *, label: Any, faults: list[str]
) -> Request | None:
    """The run that the arguments describe; None if there is a fault."""
    before = len(faults)
    known = option_fields(RunOptions)
    faults += [
        unknown_option(key, [*known, "training", "partition", "label", "out"]) for key in options if key not in known
    ]
    run_options = build_options(RunOptions, {k: v for k, v in options.items() if k in known}, "run", faults)
    local = _built_training(training, faults)
    chosen_model = model if isinstance(model, nn.Module) or _is_function(model) else _built(NETWORKS, model, faults)
    chosen_method = _built(ALGORITHMS, method, faults)
    check_label(label, faults)
    if len(faults) > before or run_options is None or local is None:
        return None
    return Request(chosen_method, chosen_model, local, run_options, label or ALGORITHMS.name_of(chosen_method))


def variant_of(method: Any, model: Any, training: Any, options: Mapping[str, Any], faults: list[str]) -> Request | None:
    """The run of one method of a comparison, whose table may hold a label and training options of its own."""
    if not isinstance(method, Mapping):
        return request_of(method, model, training, options, label="", faults=faults)
    bare = {key: value for key, value in method.items() if key not in ("label", "training")}
    own = _merged(training, method.get("training"))
    return request_of(bare, model, own, options, label=method.get("label", ""), faults=faults)


def _merged(shared: Any, own: Any) -> Any:
    """Training options with a method's own in place of the shared ones."""
    plain = dataclasses.asdict(shared) if isinstance(shared, LocalTraining) else shared or {}
    return {**plain, **own} if isinstance(plain, Mapping) and isinstance(own, Mapping) else own or plain


def faults_of_lists(methods: Any, seeds: Any, options: Mapping[str, Any]) -> list[str]:
    """What is wrong with a comparison apart from its single runs."""
    faults = [
        f"{key}: got one for a comparison; give {instead}"
        for key, instead in (("seed", "`seeds`"), ("label", "each method a table with a `label`"))
        if key in options
    ]
    for name, given, what in (("methods", methods, "methods"), ("seeds", seeds, "whole numbers")):
        if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence) or not given:
            faults.append(f"{name}: got {given!r}; expected a list of {what}, at least one")
        elif name == "seeds" and any(list(given).count(seed) > 1 for seed in given):
            faults.append(f"seeds: got {list(given)}; expected each once")
    return faults


def _is_function(model: Any) -> bool:
    """Whether it makes modules: any function or class, but for the class of a recipe."""
    return callable(model) and not (isinstance(model, type) and dataclasses.is_dataclass(model))


_WORKS: dict[str, str] = {"source": "load", "partition": "split", "model": "build", "method": "receive"}
"""What an object of each kind can do."""


def _built(registry: Registry[Any], value: Any, faults: list[str]) -> Any:
    """The object that a name or table stands for, or the object itself."""
    kind = registry.what
    value = spelled_out(kind, value)
    if isinstance(value, str):
        return registry.build({"name": value}, kind, faults)
    if isinstance(value, Mapping):
        return registry.build(value, kind, faults)
    if isinstance(value, type) or not dataclasses.is_dataclass(value) or not hasattr(value, _WORKS[kind]):
        also = {"model": ", a torch.nn.Module, a function that makes one,", "source": ", your own clients"}.get(
            kind, ""
        )
        faults.append(
            f"{kind}: got {_brief(value)}; expected a name, a table with a name and options{also} or a {kind} object. "
            f"Names: {', '.join(registry)}"
        )
    return value


def _brief(value: Any) -> str:
    return f"the class {value.__name__} itself" if isinstance(value, type) else f"a {type(value).__name__}"


def _built_training(training: Any, faults: list[str]) -> LocalTraining | None:
    if isinstance(training, LocalTraining):
        return training
    if training is not None and not isinstance(training, Mapping):
        faults.append(f"training: got {_brief(training)}; expected a table or a LocalTraining")
        return None
    return build_options(LocalTraining, training or {}, "training", faults)


@dataclass(frozen=True)
class Dealer:
    """How the clients of a seed come about.

    Attributes:
        own: The user's own clients, the same for every seed; None for those of a source.
        source: Where the items come from.
        partition: How they are dealt out.
    """

    own: FederatedData | None = None
    source: Any = None
    partition: Any = None

    def clients(self, seed: int, model: Any) -> FederatedData:
        """Those of a seed, for a model: texts are read as it reads them."""
        if self.own is None:
            return load_data(self.source, self.partition, seed, model)
        check_federation(self.own)
        return self.own

    def config_of(self, request: Request) -> Config | None:
        """The configuration that makes the same run again; None where clients or network are the user's own."""
        if self.own is not None or not dataclasses.is_dataclass(request.model):
            return None
        return Config(
            source=self.source,
            partition=self.partition,
            model=request.model,
            method=request.method,
            training=request.training,
            run=request.options,
            label=request.label if request.label != ALGORITHMS.name_of(request.method) else "",
        )


def dealer_of(data: Any, partition: Any, faults: list[str]) -> Dealer:
    """How clients come about; appends what is wrong with the request for them."""
    if isinstance(data, FederatedData):
        if partition is not None:
            faults.append("partition: got one for your own clients, who have their items already; leave it out")
        return Dealer(own=data)
    source = _built(SOURCES, data, faults)
    default = default_partition(SOURCES.name_of(source))
    wanted = default if partition is None else partition
    if isinstance(wanted, Mapping) and "name" not in wanted:
        wanted = {**default, **wanted}
    return Dealer(source=source, partition=_built(PARTITIONS, wanted, faults))


def known_model(model: Any) -> Any:
    """The network that a name, table, module or function stands for.

    Raises:
        UsageError: if it stands for none.
    """
    faults: list[str] = []
    known = model if isinstance(model, nn.Module) or _is_function(model) else _built(NETWORKS, model, faults)
    if faults:
        raise UsageError("\n".join(faults))
    return known
