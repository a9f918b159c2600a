"""Letters as Flower's records and back. Tensors travel as plain bytes in little-endian order, whatever is in them.

Flower's own form of an array is a file of numpy's, whose header may claim any size; here sizes are checked before
anything of that size is made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedmerge.core.errors import FedmergeError
from fedmerge.core.tensor_files import MOST_DIMS
from fedmerge.core.text import brief, shortened
from fedmerge.deploy.messages import Letter

_FORM = "fedmerge.bytes"
_LETTER, _TENSORS, _FAILURE = "letter", "tensors", "failure"
_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
MOST_REASON = 1000
"""Letters of what a site says."""
_SWAPPED = sys.byteorder == "big"


def records_of(letter: Letter) -> RecordDict:
    """A letter as Flower carries it."""
    arrays = ArrayRecord({name: _array(tensor) for name, tensor in letter.tensors.items()})
    return RecordDict({_LETTER: ConfigRecord({"text": letter.text}), _TENSORS: arrays})


class Refused(NamedTuple):
    """A site says why it does not answer.

    Attributes:
        reason: In its words.
        busy: Whether it is only at work on something else.
    """

    reason: str
    busy: bool


def failure_records(reason: str, *, busy: bool = False) -> RecordDict:
    """Why a site does not answer.

    Args:
        reason: In its words.
        busy: Whether it is only at work on something else.
    """
    return RecordDict({_FAILURE: ConfigRecord({"reason": reason, "busy": busy})})


def letter_from(records: RecordDict) -> Letter | Refused:
    """The letter that Flower brought, or the reason that the site gave for not answering.

    Raises:
        FedmergeError: if it is damaged.
    """
    failure = records.config_records.get(_FAILURE)
    if failure is not None:
        return Refused(shortened(str(failure.get("reason", "")), MOST_REASON), failure.get("busy") is True)
    config = records.config_records.get(_LETTER)
    text = None if config is None else config.get("text")
    if not isinstance(text, str):
        raise FedmergeError("a message holds no letter; both sides need the same version of fedmerge")
    arrays: Mapping[str, Array] = records.array_records.get(_TENSORS, ArrayRecord())
    return Letter(text, {name: _tensor(name, array) for name, array in arrays.items()})


def _array(tensor: Tensor) -> Array:
    values = tensor.detach().cpu().contiguous()
    name = str(values.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise TypeError(f"tensors of {values.dtype} do not travel; expected one of {', '.join(_DTYPES)}")
    numbers = values.numpy()
    data = (numbers.byteswap() if _SWAPPED else numbers).tobytes()
    return Array(dtype=name, shape=tuple(values.shape), stype=_FORM, data=data)


def _tensor(name: str, array: Array) -> Tensor:
    dtype, shape = _DTYPES.get(array.dtype), tuple(array.shape)
    if array.stype != _FORM or dtype is None:
        raise FedmergeError(
            f"tensor {brief(name)}: got {brief(array.stype)} of {brief(array.dtype)}; expected plain bytes"
        )
    sound = len(shape) <= MOST_DIMS and all(type(size) is int and size >= 0 for size in shape)
    if not sound or math.prod(shape) * dtype.itemsize != len(array.data):
        raise FedmergeError(
            f"tensor {brief(name)}: {len(array.data)} bytes are no {array.dtype} of shape {brief(list(shape))}"
        )
    numbers = np.frombuffer(array.data, dtype=np.dtype(array.dtype)).copy()
    found = torch.from_numpy(numbers.byteswap() if _SWAPPED else numbers).reshape(shape)
    if dtype == torch.bool and bool((found.view(torch.uint8) > 1).any()):
        raise FedmergeError(f"tensor {brief(name)}: a truth value is neither 0 nor 1")
    return found
