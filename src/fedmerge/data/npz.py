"""Arrays of an .npz file, looked at before any of them is allocated; no Python object is ever made of one."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 2**34
"""Of all arrays of one file."""
MOST_MEMBERS = 10_000
_SUSPICIOUS_BYTES, _MOST_RATIO = 2**28, 200  # more than so many bytes, packed tighter than so: a bomb, not data


def read_arrays(path: Path, *, only: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of a file by name.

    Args:
        path: Of the file.
        only: If given, no other names are accepted.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no .npz file of plain arrays, or an array is not as large as the file says.
    """
    with path.open("rb") as stream:
        if not zipfile.is_zipfile(stream):
            stream.seek(0)
            alone = stream.read(6) == b"\x93NUMPY"
            raise ValueError(f"it is {'a single array under the name of an' if alone else 'no whole'} .npz file")
        stream.seek(0)
        _look(stream, path.stat().st_size, only)
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    for name in (name for name, array in arrays.items() if array.dtype.kind == "U" and not _are_letters(array)):
        raise ValueError(f"{name}.npy holds numbers that are no letters")
    return arrays


def _are_letters(texts: NDArray[Any]) -> bool:
    """Whether every letter of an array of texts is one; numpy crashes on others."""
    codes = np.ascontiguousarray(texts).reshape(-1)
    if not codes.size or not texts.dtype.itemsize:
        return True
    codes = codes.view(np.dtype(np.uint32).newbyteorder(texts.dtype.byteorder))
    return bool(((codes < 0xD800) | ((codes >= 0xE000) & (codes <= 0x10FFFF))).all())


def _look(stream: Any, packed: int, only: Sequence[str] | None) -> None:
    """Refuses an archive whose sizes are not what its arrays need, or that unpacks to more than can be meant."""
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(members) > MOST_MEMBERS or len({*names}) < len(names):
            raise ValueError(f"it has {len(members)} members; expected up to {MOST_MEMBERS}, each name once")
        strange = [name for name in names if only is not None and name not in only]
        if strange:
            raise LookupError(strange[0])
        total = sum(member.file_size for member in members)
        if total > MOST_BYTES or (total > _SUSPICIOUS_BYTES and total > _MOST_RATIO * packed):
            raise ValueError(f"its {packed:,} bytes unpack to {total:,}, which no file of examples does")
        for fault in (fault for member in members for fault in _faults(archive, member)):
            raise ValueError(fault)


def _faults(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[str]:
    """What is wrong with one member, from its first bytes alone."""
    name = member.filename
    if not name.endswith(".npy") or not name.isprintable():
        yield f"its member {name!r} is no array"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
        yield f"its member {name!r} is packed in a way that numpy does not write"
        return
    with archive.open(member) as file:
        shape, dtype, start = _header(file)
    if dtype.hasobject:
        yield f"{name} holds Python objects, which are never read"
    elif dtype.kind not in "buifcSU":
        yield f"{name} holds {dtype}; expected numbers or texts"
    elif math.prod(shape) * dtype.itemsize != member.file_size - start:
        yield (
            f"{name} is {dtype} {list(shape)}, which needs {math.prod(shape) * dtype.itemsize:,} bytes; it has "
            f"{member.file_size - start:,}"
        )


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, type and length of the header of an array."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it has an array of format {version}; expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(file)
    except Exception as error:  # numpy reads it as Python writes a table, and raises whatever that parser does
        raise ValueError(f"the header of an array is damaged: {type(error).__name__}") from error
    if any(size < 0 for size in shape):
        raise ValueError(f"an array has the shape {list(shape)}")
    return shape, dtype, file.tell()
