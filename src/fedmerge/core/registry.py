"""Names for the things a configuration chooses between: methods, sources, partitions, networks.

An entry is a frozen dataclass whose fields are its options, so that the command line, the configuration file and
the documentation are generated from the registry alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Generic, TypeVar, cast

from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.options import build_options

T = TypeVar("T")
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered dataclass and where it comes from."""

    name: str
    cls: type[T]
    citation: str

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (self.cls.__doc__ or "").strip().splitlines()[0]


class Registry(Generic[T]):
    """Entries of one kind by name.

    Args:
        what: The kind in messages, for example ``method``.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, citation: str = "") -> Callable[[C], C]:
        """Decorator that files a frozen dataclass under `name`.

        Raises:
            TypeError: if it is not a dataclass.
            ValueError: if the name is taken.
        """

        def file(cls: C) -> C:
            if not is_dataclass(cls):
                raise TypeError(f"{cls.__name__} must be a dataclass: its fields are its options")
            if name in self._entries:
                raise ValueError(
                    f"two {self.what}s are called {name!r}: {self._entries[name].cls.__name__} and {cls.__name__}"
                )
            self._entries[name] = Entry(name, cast("type[T]", cls), citation)
            return cls

        return file

    def __getitem__(self, name: str) -> Entry[T]:
        if name not in self._entries:
            raise UsageError(unknown_name(self.what, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def name_of(self, instance: T) -> str:
        """The name under which an instance's class is filed; its class name if it is not."""
        return next(
            (entry.name for entry in self._entries.values() if entry.cls is type(instance)), type(instance).__name__
        )

    def build(self, table: Mapping[str, Any], where: str, faults: list[str]) -> T | None:
        """An instance from a table with a ``name`` and options; faults are collected, not raised."""
        options = dict(table)
        if "name" not in options:
            faults.append(f"{where}.name: missing; known: {', '.join(self)}")
            return None
        name = options.pop("name")
        if not isinstance(name, str) or name not in self._entries:
            faults.append(f"{where}.name: {unknown_name(self.what, name, self._entries)}")
            return None
        return build_options(self._entries[name].cls, options, where, faults)
