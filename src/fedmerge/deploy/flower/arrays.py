"""A network's tensors as Flower's own arrays and back, for apps whose clients know nothing of this package.

What comes back is in numpy's format, whose header may claim anything: it is read first, and nothing is made that the
bytes at hand do not hold.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from fedmerge.core.errors import FedmergeError
from fedmerge.core.tensor_files import MOST_DIMS
from fedmerge.core.text import brief
from fedmerge.core.vector import Layout

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def travelling_tensors(module: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The part of a module's state dict that is trained or a buffer; frozen parameters stay where they are."""
    frozen = {id(module.get_parameter(name)) for name in layout.frozen}
    own = module.state_dict(keep_vars=True)
    return {name: t.detach() for name, t in own.items() if isinstance(t, Tensor) and id(t) not in frozen}


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors in Flower's form; the record holds copies."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()})


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a record that came from a client.

    Raises:
        FedmergeError: if an array is not what it says.
    """
    return {name: _tensor(name, array) for name, array in record.items()}


def _tensor(name: str, array: Array) -> Tensor:
    try:
        flat, shape, order = _numbers(array.data)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise FedmergeError(f"array {brief(name)} is no tensor in numpy's format: {brief(str(error))}") from error
    return torch.from_numpy(flat.reshape(shape, order=order).copy())


def _numbers(data: bytes) -> tuple[np.ndarray[Any, Any], tuple[int, ...], Literal["C", "F"]]:
    """What a file of numpy's holds: its numbers, their shape, and whether columns (F) or rows (C) come first."""
    stream = io.BytesIO(data)
    shape, columns_first, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
    start = stream.tell()
    whole = len(shape) <= MOST_DIMS and math.prod(shape) * dtype.itemsize == len(data) - start
    if not whole or dtype.kind not in "fiub" or not dtype.isnative:
        raise ValueError(f"{dtype} of shape {shape} in {len(data) - start} bytes")
    numbers = np.frombuffer(data, dtype=dtype, offset=start)
    torch.from_numpy(np.empty(0, dtype))  # refuses what torch has not
    return numbers, shape, "F" if columns_first else "C"
