"""A user's own module, named by import path."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.options import check_options, option
from fedmerge.models._registry import accepted, network


@network("import")
@dataclass(frozen=True)
class Imported:
    """Your own nn.Module class or function, as ``package.module:Name`` or ``path/to/file.py:Name``.

    It is called with `options` as keywords, and with ``input_shape`` and ``num_classes`` if it takes them.
    """

    path: str = option(help="'package.module:Name' or 'path/to/file.py:Name'")
    options: dict[str, Any] | None = option(None, help="keyword arguments for it")

    def __post_init__(self) -> None:
        check_options(self)
        if self.path.count(":") != 1:
            raise UsageError(f"model path {self.path!r} has no name; expected 'package.module:Name' or 'file.py:Name'")

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Imports and calls it.

        Raises:
            UsageError: if it cannot be imported or called, or does not give a module.
        """
        factory = own_callable(self.path, "model", "a torch.nn.Module")
        try:
            wanted = accepted(factory, {"input_shape": input_shape, "num_classes": num_classes})
            module = factory(**{**wanted, **(self.options or {})})
        except TypeError as error:
            raise UsageError(f"model {self.path!r} could not be called: {error}") from error
        except Exception as error:
            raise UsageError(f"model {self.path!r} could not be built: {type(error).__name__}: {error}") from error
        if not isinstance(module, nn.Module):
            raise UsageError(f"model {self.path!r} gave a {type(module).__name__}; expected a torch.nn.Module")
        return module


def own_callable(path: str, what: str, gives: str) -> Callable[..., Any]:
    """A class or function that a user names, ``package.module:Name`` or ``path/to/file.py:Name``; its module is run.

    Args:
        path: Comes from the user alone, never from what somebody sent.
        what: It is, for messages.
        gives: What it should give, for messages.

    Raises:
        UsageError: if it cannot be imported or called.
    """
    location, _, name = path.rpartition(":")
    module = _module_from_file(Path(location)) if location.endswith(".py") else _module_by_name(location)
    if not hasattr(module, name):
        raise UsageError(unknown_name(f"name in {location}", name, [n for n in vars(module) if not n.startswith("_")]))
    found: object = getattr(module, name)
    if not callable(found):
        raise UsageError(
            f"{what} {path!r} is a {type(found).__name__}, which cannot be called; expected a class or a function that "
            f"gives {gives}"
        )
    return found


def _module_by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"cannot import {name!r}: {error}; is it installed, or did you mean a path ending in .py?"
        ) from error
    except Exception as error:
        raise UsageError(f"{name} could not be run: {type(error).__name__}: {error}") from error


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"no such file: {path} (looked from {Path.cwd()})")
    name = f"_fedmerge_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # noqa: S101 - the suffix is .py
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{path} could not be run: {type(error).__name__}: {error}") from error
    return module
