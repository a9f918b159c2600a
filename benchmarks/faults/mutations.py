"""Changes to good input: of bytes, of tables, of names. Everything is drawn from the generator that is given."""

from __future__ import annotations

import copy
import json
import string
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

Draws = np.random.Generator

HOSTILE_NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 2**31, -(2**31), 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5,
    float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 5e-324,
)  # fmt: skip
HOSTILE_TEXTS: tuple[str, ...] = (
    "", " ", "0", "1", "nan", "true", "x", "name", "../../etc/passwd", "/", "..", "a/b", "a\\b", "a\x00b", "a\nb",
    "\x1b[2J",
    "\u202eabc", "\ud800", "\ufeff", "é", "𝔘", "[bold]", "%s", "{0}", "<script>", "=1+1", "x" * 300, "x" * 5000,
    "hf:", "hf:/",
)  # fmt: skip
HOSTILE_TABLES: tuple[Any, ...] = (
    None, True, False, [], [[]], [0], [-1], [float("nan")], ["x"], [None], [1, "x"], [[1], [2, 3]], {}, {"name": "x"},
    {"name": 5}, {"a": {"b": {}}}, {"": 1}, [{}], list(range(2000)),
)  # fmt: skip
TOKENS: tuple[bytes, ...] = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"NaN", b"Infinity", b"-", b"1e999", b"9" * 30, b"9" * 5000,
    b"[" * 40, b"[" * 2000, b"{", b"}", b'"', b"'", b"\\", b"\\ud800", b"=", b",", b":", b"null", b"[[x]]", b"[x]",
    b"PK\x03\x04", b"../", b"\x1b[31m",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What was done to a table.

    Attributes:
        kind: ``value``, ``key`` (one that does not exist), ``lost`` (a key is missing), ``many`` (several of them).
        path: Keys down to what was changed.
    """

    kind: str
    path: tuple[str, ...] = ()


T = TypeVar("T")


def one_of(draws: Draws, values: Sequence[T]) -> T:
    """One of a sequence."""
    return values[int(draws.integers(len(values)))]


def hostile_value(draws: Draws) -> Any:
    """A value that most options do not expect."""
    values: Sequence[Any] = one_of(draws, (HOSTILE_NUMBERS, HOSTILE_NUMBERS, HOSTILE_TEXTS, HOSTILE_TABLES))
    if draws.integers(50) == 0:
        return nested(int(draws.integers(1, 400)), one_of(draws, values))
    return copy.deepcopy(one_of(draws, values))


def nested(depth: int, value: Any) -> Any:
    """A value inside so many lists and tables."""
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def typo(draws: Draws, name: str) -> str:
    """A name with one letter inserted, deleted or substituted, or two neighbours exchanged."""
    at = int(draws.integers(len(name)))
    letter = one_of(draws, string.ascii_lowercase + "_")
    kind = int(draws.integers(4))
    if kind == 0:
        return name[:at] + letter + name[at:]
    if kind == 1:
        return name[:at] + name[at + 1 :]
    if kind == 2:
        return name[:at] + letter + name[at + 1 :]
    return name[:at] + name[at + 1 : at + 2] + name[at : at + 1] + name[at + 2 :]


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value inside tables and lists; of long lists the first few."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:4]
    for key, inner in items:
        yield (*here, key)
        yield from paths(inner, (*here, key))


def changed_table(draws: Draws, table: dict[str, Any]) -> tuple[dict[str, Any], Change]:
    """A copy of a table with one thing changed, or in one of eight cases several."""
    result: dict[str, Any] = copy.deepcopy(table)
    change = _change_once(draws, result)
    if draws.integers(8) == 0:
        for _ in range(int(draws.integers(1, 5))):
            if result:
                _change_once(draws, result)
        change = Change("many", change.path)
    return result, change


def _change_once(draws: Draws, table: dict[str, Any]) -> Change:
    path = one_of(draws, list(paths(table)))
    holder: Any = table
    for key in path[:-1]:
        holder = holder[key]
    words = tuple(str(key) for key in path if isinstance(key, str))
    last, kind = path[-1], int(draws.integers(8))
    if kind == 0:
        del holder[last]
        return Change("lost", words)
    if kind == 1 and isinstance(last, str) and last:
        holder[typo(draws, last)] = holder.pop(last)
        return Change("key", words)
    if kind == 2 and isinstance(holder, list):
        holder.insert(last, hostile_value(draws))
    elif kind == 2:
        holder[one_of(draws, HOSTILE_TEXTS)] = hostile_value(draws)
        return Change("key", words)
    elif kind == 3:
        holder[last] = _near(draws, holder[last])
    else:
        holder[last] = hostile_value(draws)
    return Change("value", words)


def _near(draws: Draws, value: Any) -> Any:
    """A value of the same kind as one that is accepted."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return one_of(draws, (value + 1, value - 1, -value, value * 1000, value // 3, -value // 3, str(value)))
    if isinstance(value, str):
        return typo(draws, value) if value else "x"
    if isinstance(value, list):
        return one_of(draws, (value + value, value[:-1], value[::-1]))
    return [value]


def changed_bytes(draws: Draws, content: bytes) -> bytes:
    """A copy with one to four changes of bytes, tokens, lengths or order."""
    result = content
    for _ in range(1 if draws.integers(2) else int(draws.integers(1, 5))):
        result = _BYTE_CHANGES[int(draws.integers(len(_BYTE_CHANGES)))](draws, result or b"x")
    return result


def _place(draws: Draws, content: bytes) -> int:
    return int(draws.integers(len(content)))


def _flip(draws: Draws, content: bytes) -> bytes:
    at = _place(draws, content)
    return content[:at] + bytes([content[at] ^ (1 << int(draws.integers(8)))]) + content[at + 1 :]


def _set(draws: Draws, content: bytes) -> bytes:
    at = _place(draws, content)
    return content[:at] + bytes([int(draws.integers(256))]) + content[at + 1 :]


def _insert(draws: Draws, content: bytes) -> bytes:
    at = _place(draws, content)
    token: bytes = one_of(draws, TOKENS)
    return content[:at] + token + content[at:]


def _replace(draws: Draws, content: bytes) -> bytes:
    at = _place(draws, content)
    token: bytes = one_of(draws, TOKENS)
    return content[:at] + token + content[at + len(token) :]


def _cut(draws: Draws, content: bytes) -> bytes:
    return content[: _place(draws, content)]


def _delete(draws: Draws, content: bytes) -> bytes:
    at = _place(draws, content)
    return content[:at] + content[at + int(draws.integers(1, 40)) :]


def _repeat(draws: Draws, content: bytes) -> bytes:
    at = _place(draws, content)
    piece = content[at : at + int(draws.integers(1, 200))]
    return content[:at] + piece * int(draws.integers(1, 5)) + content[at:]


def _swap(draws: Draws, content: bytes) -> bytes:
    first, second = sorted((_place(draws, content), _place(draws, content)))
    return content[:first] + content[second:] + content[first:second]


def _count(draws: Draws, content: bytes) -> bytes:
    """Four or eight bytes become a number that a length or a place may be."""
    at, size = _place(draws, content), one_of(draws, (2, 4, 8))
    number: int = one_of(draws, (0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**12)) % 256**size
    return content[:at] + number.to_bytes(size, "little") + content[at + size :]


_BYTE_CHANGES: tuple[Callable[[Draws, bytes], bytes], ...] = (
    _flip, _set, _insert, _replace, _cut, _delete, _repeat, _swap, _count,
)  # fmt: skip


def changed_json(draws: Draws, content: bytes) -> bytes:
    """A JSON object changed as a table or as bytes; numbers that JSON does not know are written as Python does."""
    if draws.integers(3) == 0:
        return changed_bytes(draws, content)
    return json.dumps(changed_table(draws, json.loads(content))[0]).encode("utf-8", "surrogatepass")


def changed_lines(draws: Draws, content: bytes) -> bytes:
    """The same for one JSON object per line."""
    lines = content.splitlines()
    at = int(draws.integers(len(lines)))
    lines[at] = changed_json(draws, lines[at])
    return b"\n".join(lines) + b"\n"


def changed_tensors(draws: Draws, content: bytes) -> bytes:
    """A safetensors file changed in its header's values, in its header's text, or in any byte."""
    if draws.integers(3) == 0:
        return changed_bytes(draws, content)
    (length,) = struct.unpack("<Q", content[:8])
    header = changed_json(draws, content[8 : 8 + length])
    stated = len(header) if draws.integers(10) else int(one_of(draws, (0, 1, 2**31, 2**63, 2**64 - 1)))
    return struct.pack("<Q", stated) + header + content[8 + length :]
