"""Reads a suite from a TOML file and checks it as a whole before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fedmerge.bench.suite import Goal, Method, Protocol, Setting, Suite, method_table
from fedmerge.core.errors import UsageError, together, unknown_name
from fedmerge.core.options import build_options, option, option_fields
from fedmerge.core.text import brief
from fedmerge.experiment.config import Table, build_config, check_label, read_toml

BUILT_IN = ("short", "full", "lora")
TOLD = "d"
"""In a method's ``told``: its option ``num_models`` receives the setting's number of models."""


def suite_path(name: str) -> Path:
    """The file of a built-in suite by name, or the path itself.

    Raises:
        UsageError: if it is neither a built-in name nor a file.
    """
    if name in BUILT_IN:
        return Path(str(resources.files("fedmerge.bench") / "suites" / f"{name}.toml"))
    if not Path(name).is_file():
        hint = "" if name.endswith(".toml") else f"; {unknown_name('suite', name, BUILT_IN)}"
        raise UsageError(f"no such suite file: {name}{hint}. Expected {' or '.join(BUILT_IN)}, or a TOML file")
    return Path(name)


def read_suite(name: str) -> Suite:
    """A suite from a built-in name or a file.

    Raises:
        UsageError: with one line per fault, all of them together.
    """
    return suite_of(read_toml(suite_path(name)))


@dataclass(frozen=True)
class _SettingOptions:
    title: str = option("")
    note: str = option("")
    groups: int = option(0, at_least=0)
    told: int | None = option(None, at_least=1)
    methods: tuple[str, ...] | None = option(None)
    also: tuple[str, ...] = option(())
    exclude: tuple[str, ...] = option(())


@dataclass(frozen=True)
class _MethodOptions:
    lr: tuple[float, ...] | None = option(None, above=0)
    needs: Literal["groups"] | None = option(None)
    told: str | None = option(None)
    options_grid: dict[str, Any] | None = option(None)
    everywhere: bool = option(True)
    control: bool = option(False)


MOST_EXTRA_RUNS = 2
"""Runs that a method's options grid may add to its tuning."""


def suite_of(table: Mapping[str, Any]) -> Suite:
    """A suite from its table.

    Raises:
        UsageError: with one line per fault, all of them together.
    """
    faults: list[str] = []
    parts = {key: _tables(table, key, faults) for key in ("settings", "methods")}
    defaults = _plain_table(table.get("defaults", {}), "defaults", faults)
    head = {key: value for key, value in table.items() if key not in {"settings", "methods", "goals", "defaults"}}
    protocol = build_options(Protocol, head, "suite", faults)
    if protocol is None:
        raise UsageError(together(faults))
    methods = {label: _method(label, given, protocol, faults) for label, given in parts["methods"].items()}
    settings = {key: _setting(key, given, defaults, methods, faults) for key, given in parts["settings"].items()}
    goals = tuple(_goals(table.get("goals", []), settings, faults))
    faults += _faults_of_protocol(protocol, settings, methods)
    if faults:
        raise UsageError(together(dict.fromkeys(faults)))
    return Suite(protocol, settings, methods, goals)


def _plain_table(value: Any, where: str, faults: list[str]) -> Table:
    if isinstance(value, Mapping):
        return dict(value)
    faults.append(f"{where}: got {brief(value)}; expected a table")
    return {}


def _tables(table: Mapping[str, Any], key: str, faults: list[str]) -> dict[str, Table]:
    """The sub-tables below a key; there must be one at least."""
    entries = _plain_table(table.get(key, {}), key, faults)
    found = {name: _plain_table(given, f"{key}.{name}", faults) for name, given in entries.items()}
    if not found:
        faults.append(f"{key}: none; expected at least one [{key}.NAME]")
    return found


def _split(cls: type, table: Table) -> tuple[Table, Table]:
    """The keys that are fields of `cls`, and the others."""
    known = option_fields(cls)
    return (
        {key: value for key, value in table.items() if key in known},
        {key: value for key, value in table.items() if key not in known},
    )


def _method(label: str, given: Table, protocol: Protocol, faults: list[str]) -> Method:
    where = f"methods.{label}"
    ours, table = _split(_MethodOptions, given)
    options = build_options(_MethodOptions, ours, where, faults) or _MethodOptions()
    check_label(label, faults)
    if "name" not in table:
        faults.append(f"{where}.name: missing; expected the name of a method, as `fedmerge list methods` gives them")
    _refuse_rate(where, table, faults)
    rates = tuple(sorted(options.lr if options.lr is not None else protocol.lr))
    strange = [rate for rate in rates if rate not in protocol.ladder]
    if strange or not rates:
        faults.append(
            f"{where}.lr: got {brief(list(rates))}; expected rates of the ladder {brief(list(protocol.ladder))}"
        )
    told = "num_models" if options.told == TOLD else options.told
    grid = _options_grid(where, options.options_grid or {}, faults)
    method = Method(label, table, rates, options.needs, told, grid, options.everywhere, options.control)
    trials = [{}, *({name: value} for name, values in grid.items() for value in values)]
    for extra in trials:
        _complain(where, method_table({}, method, extra, models=1 + bool(told)), faults)
    return method


def _refuse_rate(where: str, table: Table, faults: list[str]) -> None:
    training = table.get("training")
    if isinstance(training, Mapping) and "lr" in training:
        faults.append(
            f"{where}.training.lr: got {brief(training['lr'])}, but rates are tuned; give `lr = [...]` to a method"
        )


def _options_grid(where: str, given: Mapping[str, Any], faults: list[str]) -> dict[str, tuple[Any, ...]]:
    plain = {
        name: tuple(values)
        for name, values in given.items()
        if isinstance(values, list) and values and not any(isinstance(value, (list, dict)) for value in values)
    }
    runs = sum(map(len, plain.values()))
    if len(plain) < len(given) or runs > MOST_EXTRA_RUNS:
        faults.append(
            f"{where}.options_grid: got {brief(dict(given))}; expected lists of plain values, {MOST_EXTRA_RUNS} in all "
            "at most"
        )
    return plain


def _complain(where: str, table: Table, faults: list[str]) -> None:
    try:
        build_config(table)
    except UsageError as error:
        faults += [f"{where}: {line}" for line in str(error).splitlines()]


def _setting(key: str, given: Table, defaults: Table, methods: Mapping[str, Method], faults: list[str]) -> Setting:
    where = f"settings.{key}"
    if set(key) & {"/", "\\"} or not key.isprintable():
        faults.append(
            f"{where}: got {brief(key)}; expected a name of one line without slashes: figures are called by it"
        )
    ours, base = _split(_SettingOptions, given)
    options = build_options(_SettingOptions, ours, where, faults) or _SettingOptions()
    base = _merged(defaults, base)
    for taken in ("method", "label", "seed"):
        if taken in base:
            faults.append(f"{where}.{taken}: got one for a setting; methods and seeds are the suite's")
            base.pop(taken)
    _refuse_rate(where, base, faults)
    _complain(where, base, faults)
    named = {*(options.methods or ()), *options.also, *options.exclude}
    faults += [f"{where}: {unknown_name('method', label, methods)}" for label in sorted(named - {*methods})]
    told = options.told if options.told is not None else options.groups
    labels = tuple(label for label, method in methods.items() if _takes_part(method, options))
    if not told and any(methods[label].told for label in labels):
        faults.append(f"{where}.told: missing; expected the number of models that methods are told here, or `groups`")
    if not labels:
        faults.append(f"{where}: no method runs on it")
    return Setting(key, base, labels, options.title or key, options.note, options.groups, told, options.methods is None)


def _takes_part(method: Method, options: _SettingOptions) -> bool:
    chosen = method.everywhere if options.methods is None else method.label in options.methods
    possible = options.groups > 0 or method.needs != "groups"
    return (chosen or method.label in options.also) and method.label not in options.exclude and possible


def _merged(defaults: Table, own: Table) -> Table:
    """The setting's keys over the defaults; the training tables are merged."""
    result = {**copy.deepcopy(defaults), **copy.deepcopy(own)}
    if isinstance(defaults.get("training"), Mapping) and isinstance(own.get("training"), Mapping):
        result["training"] = {**defaults["training"], **own["training"]}
    return result


def _goals(given: Any, settings: Mapping[str, Setting], faults: list[str]) -> list[Goal]:
    if not isinstance(given, list):
        faults.append(f"goals: got {brief(given)}; expected tables [[goals]]")
        return []
    goals = []
    for number, entry in enumerate(given, 1):
        name = entry.get("key", number) if isinstance(entry, Mapping) else number
        goal = build_options(Goal, _plain_table(entry, f"goals.{name}", faults), f"goals.{name}", faults)
        if goal is None:
            continue
        goals.append(goal)
        if goal.setting not in settings:
            faults.append(f"goals.{name}.setting: {unknown_name('setting', goal.setting, settings)}")
            continue
        labels = settings[goal.setting].labels
        faults += [
            f"goals.{name}: {unknown_name(f'method of setting {goal.setting!r}', label, labels)}"
            for label in (goal.left, *goal.rivals)
            if label not in labels
        ]
    return goals


def _faults_of_protocol(
    protocol: Protocol, settings: Mapping[str, Setting], methods: Mapping[str, Method]
) -> list[str]:
    faults = []
    if protocol.tuning_seed in protocol.seeds:
        faults.append(f"suite.tuning_seed: got {protocol.tuning_seed}, which is among the reported seeds")
    if len({*protocol.seeds}) < len(protocol.seeds) or not protocol.seeds:
        faults.append(f"suite.seeds: got {brief(list(protocol.seeds))}; expected at least one, each once")
    if list(protocol.ladder) != sorted({*protocol.ladder}):
        faults.append(f"suite.ladder: got {brief(list(protocol.ladder))}; expected ascending rates, each once")
    if methods and protocol.reference not in methods:
        faults.append(f"suite.reference: {unknown_name('method', protocol.reference, methods)}")
    faults += [
        f"settings.{key}: lacks the reference {protocol.reference!r} among its methods"
        for key, setting in settings.items()
        if protocol.reference in methods and protocol.reference not in setting.labels
    ]
    return faults
