"""Tensors on disk: a safetensors file is checked as a whole before anything of its size is allocated.

The library itself accepts keys that stand twice, headers of 99 MB and names such as ``../../etc/passwd``.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from fedmerge.core.errors import FedmergeError
from fedmerge.core.strict_json import parse_json_table
from fedmerge.core.text import brief, shortened

MOST_HEADER = 32 * 2**20
"""Bytes; 100,000 clients that keep three tensors each need 27 MB."""
MOST_TENSORS = 500_000
MOST_NAME = 500
"""Letters."""
MOST_DIMS = 32
_LENGTH = 8  # bytes before the header, which say how long it is
_METADATA = "__metadata__"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Forms = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of every tensor, by name."""


class TensorFile(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: By name.
        metadata: Texts by name.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_tensors(
    source: Path | bytes, *, name: str = "", most_bytes: int | None = None, forms: Forms | None = None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        source: The file, or its content.
        name: What messages call it; the path by default.
        most_bytes: Largest size of the whole file that is accepted.
        forms: Shape and type of every tensor that must be there; no others may.

    Raises:
        FedmergeError: naming the file and all that is wrong with it.
    """
    return read_tensor_file(source, name=name, most_bytes=most_bytes, forms=forms).tensors


def read_tensor_file(
    source: Path | bytes, *, name: str = "", most_bytes: int | None = None, forms: Forms | None = None
) -> TensorFile:
    """As `read_tensors`, with the texts that stand beside the tensors."""
    what = name or (str(source) if isinstance(source, Path) else "tensor file")
    try:
        with _opened(source) as file:
            size = _size(file, most_bytes)
            header = _header(file, size)
        found, metadata = _checked(header.table, size - header.stop)
        if forms is not None:
            _refuse_other_forms(found, forms)
        tensors = load(source) if isinstance(source, bytes) else load_file(source)
        _refuse_odd_truth(tensors)
    except (SafetensorError, OSError, ValueError) as error:
        raise FedmergeError(f"{shortened(what)} is damaged: {_reason(error)}") from error
    return TensorFile(tensors, metadata)


def _reason(error: Exception) -> str:
    return shortened((getattr(error, "strerror", None) or str(error) or type(error).__name__), 1000)


def _opened(source: Path | bytes) -> io.BufferedIOBase:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if source.exists() and not source.is_file():
        raise ValueError("it is not a plain file")
    return source.open("rb")


def _size(file: io.BufferedIOBase, most_bytes: int | None) -> int:
    size = file.seek(0, os.SEEK_END)
    if most_bytes is not None and size > most_bytes:
        raise ValueError(f"it has {size:,} bytes; expected {most_bytes:,} at most")
    file.seek(0)
    return size


class _Header(NamedTuple):
    table: dict[str, Any]
    stop: int  # place of the first byte after it


def _header(file: io.BufferedIOBase, size: int) -> _Header:
    """The header, read only if its length is plausible."""
    if size < _LENGTH:
        raise ValueError(f"it has {size} bytes; expected {_LENGTH} at least, which say how long its header is")
    length = int.from_bytes(file.read(_LENGTH), "little")
    if not 2 <= length <= min(MOST_HEADER, size - _LENGTH):
        raise ValueError(
            f"its header says that it has {length:,} bytes; expected 2..{min(MOST_HEADER, size - _LENGTH):,}"
        )
    try:
        return _Header(parse_json_table(file.read(length)), _LENGTH + length)
    except ValueError as error:
        raise ValueError(f"its header is no plain JSON: {error}") from error


class _Entry(NamedTuple):
    form: tuple[tuple[int, ...], torch.dtype]
    start: int
    stop: int


def _checked(table: Mapping[str, Any], size: int) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Entries and texts of a header in front of `size` bytes, which the tensors must fill without gap or overlap."""
    metadata = table.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{_METADATA} is {brief(metadata)}; expected texts by name")
    if len(table) > MOST_TENSORS:
        raise ValueError(f"it has {len(table):,} tensors; expected {MOST_TENSORS:,} at most")
    entries = {name: _entry(name, entry) for name, entry in table.items() if name != _METADATA}
    spans = sorted((entry.start, entry.stop) for entry in entries.values())
    for (_, stop), (start, _) in pairwise([(0, 0), *spans, (size, size)]):
        if start != stop:
            raise ValueError(
                f"of the {size:,} bytes after the header, one tensor's end at {stop:,} and the next ones begin at "
                f"{start:,}; expected tensors that fill them without gap or overlap"
            )
    return entries, metadata


def _entry(name: str, entry: Any) -> _Entry:
    """One tensor's entry, checked by itself."""
    if not 0 < len(name) <= MOST_NAME or not name.isprintable() or ".." in name or name[0] == "/" or "\\" in name:
        raise ValueError(
            f"a tensor is called {brief(name)}; expected up to {MOST_NAME} printable letters, without '..', a slash at "
            "the beginning or backslashes"
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: got {brief(entry)}; expected dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name}: got dtype {brief(dtype)}; expected one of {', '.join(DTYPES)}")
    if not _are_whole(shape) or len(shape) > MOST_DIMS or math.prod(max(1, n) for n in shape) >= 2**60:
        raise ValueError(f"{name}: got shape {brief(shape)}; expected up to {MOST_DIMS} whole numbers >= 0")
    if not _are_whole(span) or len(span) != 2:
        raise ValueError(f"{name}: got data_offsets {brief(span)}; expected two whole numbers >= 0")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if span[1] - span[0] != needed:
        raise ValueError(f"{name}: {dtype} {brief(shape)} needs {brief(needed)} bytes; got the range {brief(span)}")
    return _Entry((tuple(shape), DTYPES[dtype]), span[0], span[1])


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _refuse_other_forms(found: Mapping[str, _Entry], forms: Forms) -> None:
    """Names every difference between what is there and what must be."""
    faults = [f"it lacks {name}" for name in forms if name not in found]
    faults += [f"it has {name}, which does not belong there" for name in found if name not in forms]
    faults += [
        f"{name} is {_form_text(found[name].form)}; expected {_form_text(form)}"
        for name, form in forms.items()
        if name in found and found[name].form != (tuple(form[0]), form[1])
    ]
    if faults:
        more = f" (and {len(faults) - _MOST_FAULTS} more)" if len(faults) > _MOST_FAULTS else ""
        raise ValueError("; ".join(faults[:_MOST_FAULTS]) + more)


_MOST_FAULTS = 8


def _form_text(form: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{str(form[1]).removeprefix('torch.')} {list(form[0])}"


def _refuse_odd_truth(tensors: Mapping[str, Tensor]) -> None:
    """A byte other than 0 and 1 in a tensor of true and false has no meaning, and torch does not look."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise ValueError(f"{name}: a byte is neither true nor false")
