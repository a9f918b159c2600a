"""Options as frozen dataclasses: one place that checks types, ranges and names.

A field declares its range beside its default, ``lr: float = option(0.1, above=0)``. ``check_options`` (called
from ``__post_init__``) and ``build_options`` (called for a TOML table or command-line words) apply the same rules
and report every fault at once. Comparisons are written so that NaN fails them.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union

from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.text import brief

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str = "",
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field with a range and a line of help; ranges apply to every number inside the value."""
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {"help": help, "bounds": {name: bound for name, bound in bounds.items() if bound is not None}}
    return dataclasses.field(default=default, metadata=metadata)


_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "above": ("> {}", operator.gt),
    "at_least": (">= {}", operator.ge),
    "below": ("< {}", operator.lt),
    "at_most": ("<= {}", operator.le),
}


def range_text(bounds: Mapping[str, float]) -> str:
    """Readable form of a field's range, for example ``> 0 and <= 1``."""
    return " and ".join(_BOUNDS[name][0].format(bound) for name, bound in bounds.items())


def type_text(annotation: Any) -> str:
    """Readable form of a field's type, for messages and help."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(part) for part in typing.get_args(annotation))
    if origin is tuple:
        return "a list of " + type_text(typing.get_args(annotation)[0])
    if dataclasses.is_dataclass(annotation):
        return "a table"
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        dict: "a table",
        Mapping: "a table",
    }
    words |= {Any: "anything", type(None): "none"}
    return words.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def accepted_text(field: dataclasses.Field[Any], annotation: Any) -> str:
    """What a field accepts: its type and range, for messages and help.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Example:
    ...     steps: int | None = option(None, at_least=1)
    >>> accepted_text(*option_fields(Example)["steps"])
    'a whole number >= 1 or none'
    """
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kinds = " or ".join(type_text(part) for part in parts if part is not type(None))
    bounds = range_text(field.metadata.get("bounds", {}))
    return kinds + (f" {bounds}" if bounds else "") + (" or none" if type(None) in parts else "")


class _MisfitError(Exception):
    """A value does not fit; the message says what was expected."""


def _convert_number(annotation: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _MisfitError
    if annotation is int:
        if isinstance(value, float) or not -(2**63) <= value < 2**63:
            raise _MisfitError
        return value
    try:
        number = float(value)
    except OverflowError as error:  # a whole number beyond any float
        raise _MisfitError from error
    if not math.isfinite(number):
        raise _MisfitError
    return number


class _TableError(_MisfitError):
    """A table of options does not fit; holds one fault per line, each beginning with ``.key`` or ``: ``."""


def _convert_table(cls: Any, table: Mapping[str, Any]) -> Any:
    faults: list[str] = []
    built = build_options(cls, table, "", faults)
    if built is None:
        raise _TableError("\n".join(faults))
    return built


def _convert_union(annotation: Any, value: Any) -> Any:
    for part in typing.get_args(annotation):
        with suppress(_MisfitError):
            return _convert(part, value)
    raise _MisfitError


def _convert(annotation: Any, value: Any) -> Any:
    """The value as the field's type, or ``_MisfitError``. Only lossless conversions: int to float, list to tuple."""
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(annotation, value)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in typing.get_args(annotation)):
            return value
        raise _MisfitError
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _MisfitError
        return tuple(_convert(typing.get_args(annotation)[0], item) for item in value)
    if annotation in (int, float):
        return _convert_number(annotation, value)
    return _convert_object(annotation, value)


def _convert_object(annotation: Any, value: Any) -> Any:
    origin = typing.get_origin(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(value, Mapping):
        return _convert_table(annotation, value)
    if isinstance(value, origin or annotation) and not (isinstance(value, bool) and annotation is not bool):
        return value
    raise _MisfitError


def _numbers(value: Any) -> list[float]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def _field_fault(field: dataclasses.Field[Any], annotation: Any, value: Any) -> tuple[Any, str | None]:
    bounds = field.metadata.get("bounds", {})
    try:
        converted = _convert(annotation, value)
    except _TableError as error:
        return value, str(error)
    except _MisfitError:
        return value, _misfit_text(field, annotation, value)
    for number in _numbers(converted):
        if not all(_BOUNDS[name][1](number, bound) for name, bound in bounds.items()):
            return value, _misfit_text(field, annotation, value)
    return converted, None


def _misfit_text(field: dataclasses.Field[Any], annotation: Any, value: Any) -> str:
    given = value if isinstance(value, (list, tuple)) else [value]
    huge = any(isinstance(part, int) and not -(2**63) <= part < 2**63 for part in given)
    return f": got {brief(value)}; expected {accepted_text(field, annotation)}" + (" and < 2^63" if huge else "")


def option_fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Name -> (field, resolved type) of every option of a dataclass."""
    return dict(_option_fields(cls))


@lru_cache(maxsize=256)  # resolving the types of a method's options takes longer than checking them
def _option_fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def check_options(instance: Any) -> None:
    """Checks and normalises every field of a frozen dataclass in place; call it first in ``__post_init__``.

    Raises:
        UsageError: naming every field that is out of range or of the wrong type.
    """
    faults = []
    for name, (field, annotation) in option_fields(type(instance)).items():
        value, fault = _field_fault(field, annotation, getattr(instance, name))
        if fault:
            faults += [f"{type(instance).__name__}.{name}{line}" for line in fault.splitlines()]
        object.__setattr__(instance, name, value)
    if faults:
        raise UsageError("\n".join(faults))


def build_options(cls: type[T], table: Mapping[str, Any], where: str, faults: list[str]) -> T | None:
    """A dataclass from a table of plain values; appends every fault to `faults` and returns None if there is one.

    Args:
        cls: The options dataclass.
        table: Keys and plain values (numbers, texts, lists, sub-tables).
        where: The table's name in messages, for example ``training``.
        faults: Receives one line per fault.
    """
    fields = option_fields(cls)
    before = len(faults)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            faults.append(f"{where}: {unknown_name('option', key, fields)}")
            continue
        field, annotation = fields[key]
        values[key], fault = _field_fault(field, annotation, value)
        if fault:
            faults += [f"{where}.{key}{line}" for line in fault.splitlines()]
    for name, (field, annotation) in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            faults.append(f"{where}.{name}: missing; expected {accepted_text(field, annotation)}")
    if len(faults) > before:
        return None
    try:
        return cls(**values)
    except UsageError as error:  # rules between fields
        faults.extend(_told_of(where, cls.__name__, line) for line in str(error).splitlines())
        return None


def _told_of(where: str, name: str, line: str) -> str:
    """A fault that names the class and its field, as the user knows them.

    >>> _told_of("training", "LocalTraining", "LocalTraining.lr: too high"), _told_of("training", "A", "too high")
    ('training.lr: too high', 'training: too high')
    """
    own = line.removeprefix(f"{name}.")
    return f"{where}.{own}" if own != line else f"{where}: {line}"
