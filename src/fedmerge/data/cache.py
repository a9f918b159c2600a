"""The folder where fetched archives and parsed pools are kept, with files that are whole or absent.

Everything in it can be deleted at any time; it is rebuilt when it is needed again. ``FEDMERGE_CACHE`` names another
folder than the user's cache folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from fedmerge.core.errors import DataError, FedmergeError
from fedmerge.data.npz import read_arrays
from fedmerge.data.pool import Pool

log = logging.getLogger(__name__)

_ARRAYS = ("inputs", "targets", "user", "domain", "item", "answers")
_NAMES = ("class_names", "user_names", "domain_names", "class_tasks")
Arrays = dict[str, NDArray[Any]]
_DAMAGED = (
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    DataError,
)


def cache_folder() -> Path:
    """``$FEDMERGE_CACHE``, or fedmerge's folder in the user's cache folder; it need not exist yet."""
    return Path(os.environ.get("FEDMERGE_CACHE") or platformdirs.user_cache_dir("fedmerge"))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within the block `folder` exists; a fault of the file system becomes one clear message.

    Raises:
        FedmergeError: if the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise FedmergeError(
            f"cannot write to the cache folder {folder}: {error.strerror or error}. "
            "Make room or rights there, or set FEDMERGE_CACHE to a folder that you can write to"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within the block this process alone holds `path`'s lock; the system frees it when the process ends.

    The lock is a file beside `path`; waiting for another process is logged.

    Raises:
        FedmergeError: if the folder cannot be made or written to.
    """
    with writing(path.parent):
        file = path.with_name(path.name + ".lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that is making %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_pool(name: str, key: Sequence[str], build: Callable[[], Pool]) -> Pool:
    """The pool that was built under this key before, or `build`'s, which is kept.

    Args:
        name: Of the source; begins the file's name.
        key: All that the pool depends on: options, hashes of what is read, version of the code that reads it.
        build: Makes the pool if it is not there or damaged; only one process at a time runs it for one key.

    Raises:
        FedmergeError: if the cache cannot be written to.
    """
    return _pool_of(_cached("pools", name, key, lambda: _arrays_of(build()), _pool_of))


def cached_arrays(name: str, key: Sequence[str], build: Callable[[], Arrays]) -> Arrays:
    """The arrays that were built under this key before, or `build`'s, which are kept.

    Args:
        name: Begins the file's name.
        key: All that the arrays depend on.
        build: As for `cached_pool`.

    Raises:
        FedmergeError: if the cache cannot be written to.
    """
    return _cached(name, name, key, build, dict)


def _cached(
    folder: str, name: str, key: Sequence[str], build: Callable[[], Arrays], check: Callable[[Arrays], object]
) -> Arrays:
    path = cache_folder() / folder / f"{name}-{hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:16]}.npz"
    arrays = _read(path, check)
    if arrays is not None:
        return arrays
    with locked(path):
        arrays = _read(path, check)  # another process may have made it while this one waited
        if arrays is None:
            arrays = build()
            _write(path, arrays)
        return arrays


def _read(path: Path, check: Callable[[Arrays], object]) -> Arrays | None:
    """The arrays in `path`; None if there are none or they are damaged (numpy checks the checksum of every array)."""
    if not path.is_file():
        return None
    try:
        arrays = read_arrays(path)
        check(arrays)
    except _DAMAGED as error:
        log.warning("%s is damaged (%s): it is built again", path, error)
        return None
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    """Writes the arrays so that a reader sees all of them or nothing. The caller holds the lock."""
    temporary = path.with_name(path.name + ".part")
    named: dict[str, Any] = {**arrays}
    with writing(path.parent), temporary.open("wb") as file:
        np.savez(file, **named)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _arrays_of(pool: Pool) -> Arrays:
    arrays = {name: getattr(pool, name) for name in _ARRAYS if getattr(pool, name) is not None}
    return arrays | {name: np.array(getattr(pool, name), dtype=np.str_) for name in ("name", *_NAMES)}


def _pool_of(arrays: Arrays) -> Pool:
    fields: dict[str, Any] = {name: arrays[name] for name in _ARRAYS if name in arrays}
    fields |= {name: tuple(str(text) for text in arrays[name]) for name in _NAMES if name in arrays}
    return Pool(name=str(arrays["name"]), **fields)
