"""JSON that came from somewhere else: one meaning for one text, finite numbers, bounded in size and depth."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from fedmerge.core.text import brief

MOST_DEPTH = 32
"""Tables and lists inside one another; what this package writes has at most eight."""
MOST_FILE_BYTES = 256 * 2**20
"""Largest JSON file that is read; the partition of ten million rows has 90 MB."""


def parse_json(content: str | bytes) -> Any:
    """What a JSON text says.

    Args:
        content: A text, or its bytes in UTF-8.

    Raises:
        ValueError: if it is not JSON, names a key twice, holds NaN, a number that no float or no 64 bits can hold or
            half a surrogate pair, or is nested more than `MOST_DEPTH` deep.

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' stands twice
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_table,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_of_64_bits if _MANY_DIGITS.search(text) else None,  # a function for each of millions takes time
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    refuse_depth(value)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text: nothing can write it
    return value


def parse_json_table(content: str | bytes) -> dict[str, Any]:
    """What a JSON text says that must be an object.

    Raises:
        ValueError: as `parse_json`, and if it is anything else.
    """
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError(f"got {brief(value, 40)}; expected a JSON object")  # noqa: TRY004 - the text is at fault
    return value


def read_bounded(path: Path, most_bytes: int = MOST_FILE_BYTES) -> bytes:
    """A file's content, unless it is larger than anything of its kind.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it has more than `most_bytes`; no more than those are read, of a file on a disk none.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = bytearray()
        while size <= most_bytes and (piece := file.read(_PIECE)):  # a pipe does not say how much will come
            content += piece
            size = max(size, len(content))
    if size > most_bytes:
        raise ValueError(f"it has {size:,} bytes; expected {most_bytes:,} at most")
    return bytes(content)


_PIECE = 2**20


def refuse_depth(value: Any) -> None:
    """Refuses tables and lists that are nested more than `MOST_DEPTH` deep: other code walks them by recursion.

    Raises:
        ValueError: if they are.
    """
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [part for each in level for part in _parts(each)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")


def _parts(value: Any) -> list[Any]:
    """The tables and lists inside one."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in inside if isinstance(part, (dict, list))]


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {brief(twice)} stands twice")
    return table


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"got {word}; expected finite numbers")


_MANY_DIGITS = re.compile("[0-9]{19}")


def _of_64_bits(digits: str) -> int:
    number = int(digits)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"got {digits[:40]}, which no 64 bits can hold")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"got {digits[:40]}, which is beyond any number; expected finite numbers")
    return number
