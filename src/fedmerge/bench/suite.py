"""A suite: settings, methods, seeds and goals."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.options import option
from fedmerge.experiment.config import Table


@dataclass(frozen=True)
class Setting:
    """Data, partition, network and rounds that methods are compared on.

    Attributes:
        key: Its name in the suite.
        base: What all its runs share, as for `fedmerge.experiment.config.build_config`.
        labels: The methods that run on it, in the suite's order.
        title: For the page.
        note: What a reader must know beside the numbers.
        groups: Number of true groups, where the partition knows them; 0 elsewhere.
        told: Number of models for methods that must be told it; `groups` where nothing is said.
        ranked: Whether it counts in the ranking over settings: it runs every method of the suite.
    """

    key: str
    base: Table
    labels: tuple[str, ...]
    title: str
    note: str
    groups: int
    told: int
    ranked: bool


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        label: Its name in the suite.
        table: The method's name and options; may hold a ``training`` table.
        lr: First rates of its grid, ascending.
        needs: ``groups`` skips settings without known groups.
        told: Option that receives the setting's number of models.
        options_grid: Values that are tried at the best rate, each beside the method's default.
        everywhere: Runs on every setting that does not name its methods; otherwise only where it is named.
        control: Not a rival: left out of the ranking and of the count of wins and losses.
    """

    label: str
    table: Table
    lr: tuple[float, ...]
    needs: Literal["groups"] | None
    told: str | None
    options_grid: Mapping[str, tuple[Any, ...]]
    everywhere: bool
    control: bool


@dataclass(frozen=True)
class Goal:
    """A demand on the mean paired difference of two methods over seeds.

    Attributes:
        key: Short name.
        setting: Key of a setting.
        left: A label.
        right: One label or several; of several the one with the best mean counts.
        demand: In percentage points: left − right must be at least this.
        text: What is asked for, in words.
    """

    key: str = option(help="short name")
    setting: str = option(help="key of a setting")
    left: str = option(help="a label")
    right: str | tuple[str, ...] = option(help="a label, or a list of which the best counts")
    demand: float = option(help="percentage points")
    text: str = option("", help="what is asked for, in words")

    @property
    def rivals(self) -> tuple[str, ...]:
        """The right side as a tuple."""
        return (self.right,) if isinstance(self.right, str) else self.right


@dataclass(frozen=True)
class Protocol:
    """What holds for the whole suite.

    Attributes:
        protocol: Number that is part of every result's key: raise it when results must be made again.
        title: For the page.
        seeds: Reported ones.
        tuning_seed: Decides rates and options; not among the reported ones.
        ladder: All rates that any grid may hold, ascending.
        lr: First rates of a method that names none.
        extensions: How many rates a grid may grow by on each side.
        reference: The label that every other one is compared with.
    """

    protocol: int = option(1, at_least=1)
    title: str = option("Benchmark")
    seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), at_least=0)
    tuning_seed: int = option(1000, at_least=0)
    ladder: tuple[float, ...] = option((0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), above=0)
    lr: tuple[float, ...] = option((0.03, 0.1, 0.3), above=0)
    extensions: int = option(2, at_least=0)
    reference: str = option("fedmerge")


@dataclass(frozen=True)
class Suite:
    """All of it.

    Attributes:
        protocol: Seeds, ladder and the like.
        settings: Key -> setting, in order.
        methods: Label -> method, in order.
        goals: In order.
    """

    protocol: Protocol
    settings: Mapping[str, Setting]
    methods: Mapping[str, Method]
    goals: tuple[Goal, ...]


def method_table(base: Table, method: Method, extra: Mapping[str, Any], models: int) -> Table:
    """A setting's table with a method in it.

    Args:
        base: The setting's.
        method: Which one.
        extra: Options on top of the method's own.
        models: What a method that must be told the number of models is told.
    """
    own = {**copy.deepcopy(method.table), **({method.told: models} if method.told else {}), **extra}
    training = {**base.get("training", {}), **_mapping(own.pop("training", {}))}
    return {**base, "label": method.label, "training": training, "method": own}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"training": value}


def narrowed(
    suite: Suite,
    *,
    settings: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Suite:
    """The suite with some of its settings, methods and seeds only; what is not given stays whole.

    Raises:
        UsageError: for a name or a seed that the suite does not have or that is given twice, and for an empty list.
    """
    asked: Mapping[str, Sequence[Any] | None] = {"--settings": settings, "--methods": methods, "--seeds": seeds}
    faults = [unknown_name("setting", key, suite.settings) for key in settings or () if key not in suite.settings]
    faults += [unknown_name("method", label, suite.methods) for label in methods or () if label not in suite.methods]
    faults += [
        f"--seeds: got {seed}; the suite has {list(suite.protocol.seeds)}"
        for seed in seeds or ()
        if seed not in suite.protocol.seeds
    ]
    faults += [
        f"{flag}: got {list(given)}; expected at least one, each once"
        for flag, given in asked.items()
        if given is not None and (not given or len({*given}) < len(given))
    ]
    if faults:
        raise UsageError("\n".join(faults))
    wanted = suite.methods if methods is None else methods
    kept = {
        key: dataclasses.replace(setting, labels=tuple(label for label in setting.labels if label in wanted))
        for key, setting in suite.settings.items()
        if settings is None or key in settings
    }
    protocol = suite.protocol if seeds is None else dataclasses.replace(suite.protocol, seeds=tuple(seeds))
    return dataclasses.replace(suite, settings=kept, protocol=protocol)
