"""Who gets which item of a pool: a saved, hashed file, so that every method sees the same split.

A partition file is strict JSON that ends with the hash of its own content. `Partition.load` refuses a file whose
hash, indices or fields are not right, and `fedmerge.data.deal` a pool other than the one that it was made for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedmerge.core.errors import MOST_FAULTS, DataError
from fedmerge.core.files import write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.strict_json import parse_json_table, read_bounded
from fedmerge.core.text import brief, shortened
from fedmerge.data.pool import Ints

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_FORMAT = "fedmerge partition 1"


@dataclass(frozen=True, eq=False)
class ClientPart:
    """One client's rows of the pool and what is done to them.

    Attributes:
        name: Unique within the partition.
        train: Row numbers, at least one.
        validation: Row numbers.
        test: Row numbers.
        group: True group where the kind of partition has groups, else None.
        relabel: [K] the label that class k gets, a permutation; None leaves labels alone.
        rotation: Degrees by which images are turned counter-clockwise.
        invert: Whether images are turned into their negative.
    """

    name: str
    train: Ints
    validation: Ints
    test: Ints
    group: int | None = None
    relabel: tuple[int, ...] | None = None
    rotation: float = 0.0
    invert: bool = False

    def split(self, split: Split) -> Ints:
        """Row numbers of one split."""
        rows: Ints = getattr(self, split)
        return rows


@dataclass(frozen=True, eq=False)
class Partition:
    """A pool dealt out to clients; two partitions are the same if their `sha256` is.

    Attributes:
        kind: Registered name of the way it was made.
        seed: Decides every draw.
        options: Of the kind, plain values.
        pool_name: Of the pool, for messages.
        pool_sha256: `Pool.sha256` of the pool that the row numbers belong to.
        pool_size: Number of the pool's rows, n.
        clients: In client-id order, at least one.

    Raises:
        DataError: if a row number is not 0..n-1, a row is used on two sides of a split, a client has nothing to
            train on or two clients have one name.
    """

    kind: str
    seed: int
    options: Mapping[str, Any]
    pool_name: str
    pool_sha256: str
    pool_size: int
    clients: tuple[ClientPart, ...]

    def __post_init__(self) -> None:
        if not self.clients:
            raise DataError(f"partition {self.kind!r}: no clients; expected at least one")
        names = [client.name for client in self.clients]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"partition {self.kind!r}: two clients are called {twice!r}; expected one name for each")
        for client in self.clients:
            _check_part(client, self.pool_size)
        check_sides(self, None, "row")

    def plain(self) -> dict[str, Any]:
        """All that the hash covers, as plain values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format": _FORMAT, **fields, "clients": [_plain_part(client) for client in self.clients]}

    def sha256(self) -> str:
        """Hash of everything in the partition; equal for the same kind, options, seed and pool."""
        return hashlib.sha256(_canonical(self.plain()).encode()).hexdigest()

    def save(self, path: Path | str, *, private: bool = False) -> None:
        """Writes the partition so that a reader sees all of it or nothing; a private file only its owner may read."""
        text = _canonical({**self.plain(), "sha256": self.sha256()}) + "\n"
        write_atomically(Path(path), text, private=private)

    @classmethod
    def load(cls, path: Path | str) -> Partition:
        """Reads what `save` wrote.

        Raises:
            DataError: if there is no such file or anything in it is not as it was written.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such partition file; give one that `Partition.save` wrote")
        try:
            return partition_from(read_bounded(path))
        except ValueError as error:
            raise DataError(
                f"{path} is not a whole partition file: {shortened(str(error), 1000)}. Make it again from its seed, or "
                "take a good copy"
            ) from error


def partition_from(content: bytes) -> Partition:
    """The partition that the content of its file describes.

    Raises:
        ValueError: if anything is not as it was written.
    """
    plain = parse_json_table(content)
    written = plain.pop("sha256", None)
    try:
        partition = _from_plain(plain)
    except DataError as error:
        raise ValueError(str(error)) from error
    found = partition.sha256()
    if written != found:
        raise ValueError(f"it says sha256 {brief(written)}, its content has {found}")
    return partition


def _check_part(client: ClientPart, pool_size: int) -> None:
    for split in SPLITS:
        rows = client.split(split)
        if rows.ndim != 1 or rows.dtype != np.int64:
            raise DataError(f"client {client.name!r}: {split} rows are {rows.dtype} {rows.shape}; expected int64 [n]")
        if len(rows) and (rows.min() < 0 or rows.max() >= pool_size):
            raise DataError(
                f"client {client.name!r}: {split} rows run from {rows.min()} to {rows.max()}; "
                f"expected 0..{pool_size - 1}, the pool has {pool_size} items"
            )
        if len(np.unique(rows)) < len(rows):
            raise DataError(f"client {client.name!r}: a row stands twice in its {split} rows; expected each once")
    if not len(client.train):
        raise DataError(f"client {client.name!r} has nothing to train on; expected at least one train row")
    if client.relabel is not None and sorted(client.relabel) != list(range(len(client.relabel))):
        raise DataError(f"client {client.name!r}: relabel {client.relabel} is not a permutation of 0..K-1")
    if not math.isfinite(client.rotation):
        raise DataError(f"client {client.name!r}: rotation {client.rotation} is not a number of degrees")


def check_sides(partition: Partition, identity: Ints | None, what: str) -> None:
    """Refuses a partition in which one thing is on two sides, here or at another client.

    Args:
        partition: Whose row numbers may be of a pool that is not at hand.
        identity: Of each row of the pool; None for the row itself.
        what: The thing in messages.

    Raises:
        DataError: naming the first such thing and both sides.
    """
    seen: list[Ints] = []
    for split in SPLITS:
        rows = np.concatenate([client.split(split) for client in partition.clients])
        used = np.unique(rows if identity is None else identity[rows])
        clash = np.intersect1d(used, np.concatenate([used[:0], *seen]))
        if len(clash):
            other = next(name for name, before in zip(SPLITS, seen, strict=False) if clash[0] in before)
            raise DataError(
                f"partition {partition.kind!r}: {what} {clash[0]} is used for {other} and for {split} "
                f"({len(clash)} such); expected every {what} on one side in the whole federation"
            )
        seen.append(used)


def _plain_part(client: ClientPart) -> dict[str, Any]:
    plain = {field.name: getattr(client, field.name) for field in dataclasses.fields(client)}
    return {**plain, **{split: client.split(split).tolist() for split in SPLITS}, "rotation": float(client.rotation)}


def _canonical(plain: Any) -> str:
    """One text for one content: sorted keys, no spaces, no NaN."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _from_plain(plain: dict[str, Any]) -> Partition:
    """The partition that plain values describe; raises DataError with everything that does not fit."""
    faults: list[str] = []
    if plain.pop("format", None) != _FORMAT:
        faults.append(f"its format is not {_FORMAT!r}")
    parts = plain.get("clients")
    clients = tuple(_part(part, faults) for part in (parts if isinstance(parts, list) else ()))
    partition = None if faults else build_options(Partition, {**plain, "clients": clients}, "partition", faults)
    if partition is None:
        raise DataError("; ".join(faults[:MOST_FAULTS]))
    return partition


def _part(plain: Any, faults: list[str]) -> ClientPart | None:
    if not isinstance(plain, dict):
        faults.append(f"a client is {plain!r}; expected an object")
        return None
    where = f"client {plain.get('name')!r}"
    rows: dict[str, Any] = {split: _row_numbers(plain.get(split), f"{where}, {split}", faults) for split in SPLITS}
    return build_options(ClientPart, {**plain, **rows}, where, faults)


def _row_numbers(plain: Any, where: str, faults: list[str]) -> Ints:
    if isinstance(plain, list) and all(type(row) is int and abs(row) < 2**63 for row in plain):
        return np.array(plain, dtype=np.int64)
    faults.append(f"{where}: expected a list of whole numbers")
    return np.empty(0, dtype=np.int64)
