"""A method's messages as plain texts and tensors: what a method sends is a tree, what travels is a form and a list.

The form names the tuples of methods by module and class. The reader takes them from modules that are loaded already and
belong to this package or to the method itself: nothing that arrives can make it import or call anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fedmerge.core.errors import FedmergeError
from fedmerge.core.text import brief

_TENSOR = "tensor"


def form_of(tree: Any) -> Any:
    """The form of a tree of tensors, as what JSON knows.

    >>> import torch
    >>> form_of((torch.zeros(2), {"a": torch.ones(1)}, ()))
    ['tuple', ['tensor'], ['dict', ['a', ['tensor']]], ['tuple']]

    Raises:
        TypeError: if something else than tuples, lists, tables, None and tensors is in it.
    """
    if isinstance(tree, Tensor):
        return [_TENSOR]
    if tree is None:
        return ["none"]
    if isinstance(tree, dict):
        return ["dict", *([str(key), form_of(value)] for key, value in tree.items())]
    if isinstance(tree, (tuple, list)):
        return [_name_of(tree), *(form_of(value) for value in tree)]
    raise TypeError(f"a message holds a {type(tree).__name__}; expected tensors in tuples, lists and tables")


def _name_of(tree: Any) -> str:
    if type(tree) in (tuple, list):
        return type(tree).__name__
    return f"{type(tree).__module__}:{type(tree).__qualname__}"


def tree_from(form: Any, tensors: Sequence[Tensor], *, modules: Sequence[str] = ()) -> Any:
    """The tree of this form with these tensors, in order.

    Args:
        form: From `form_of`, out of a message.
        tensors: All of the tree.
        modules: Names of modules, beside this package, whose tuples it may hold.

    Raises:
        FedmergeError: if the form is damaged, names anything but a tuple, or does not fit the number of tensors.
    """
    left = iter(tensors)
    tree = _grown(form, left, tuple(modules))
    if next(left, None) is not None:
        raise FedmergeError(f"a message holds {len(tensors)} tensors; its form has fewer")
    return tree


def _grown(form: Any, left: Iterator[Tensor], modules: tuple[str, ...]) -> Any:
    if not isinstance(form, list) or not form or not isinstance(form[0], str):
        raise FedmergeError(f"got {brief(form)} for a part of a message; expected its form")
    name, parts = form[0], form[1:]
    if name == _TENSOR and not parts:
        found = next(left, None)
        if found is None:
            raise FedmergeError("a message holds fewer tensors than its form")
        return found
    if name == "none" and not parts:
        return None
    if name == "dict":
        return {_key(part): _grown(part[1], left, modules) for part in parts}
    values = [_grown(part, left, modules) for part in parts]
    if name == "tuple":
        return tuple(values)
    return values if name == "list" else _tuple_named(name, values, modules)


def _key(part: Any) -> str:
    if isinstance(part, list) and len(part) == 2 and isinstance(part[0], str):
        return part[0]
    raise FedmergeError(f"got {brief(part)} for an entry of a table in a message; expected its name and its form")


def _tuple_named(name: str, values: list[Any], modules: tuple[str, ...]) -> Any:
    where, _, qualname = name.partition(":")
    known = where in modules or where.partition(".")[0] == __name__.partition(".")[0]
    found = getattr(sys.modules.get(where), qualname, None) if known else None
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise FedmergeError(f"a message names {brief(name)}, which is no tuple of this method; use the same version")
    if len(values) != len(found._fields):
        raise FedmergeError(f"a message gives {len(values)} parts of {name}; expected {len(found._fields)}")
    return found(*values)
