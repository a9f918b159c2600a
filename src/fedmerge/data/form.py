"""What raw inputs look like and how they are scaled: what a later client's rows must be put through as well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.core.errors import DataError
from fedmerge.core.text import brief
from fedmerge.data.transform import Scale

TOKENS = "tokens"
MOST_NUMBERS = 2**28
"""In one input."""


@dataclass(frozen=True, eq=False)
class InputForm:
    """The raw inputs of a federation and the scale that they were given.

    Attributes:
        shape: Of one input, for example (1, 28, 28).
        dtype: ``uint8`` for images, ``tokens`` for texts that a language model's encoder has made into numbers, else
            ``float32``.
        mean: Subtracted first; broadcasts to `shape`.
        std: Divided by.
        columns: Names of the input columns, in order, where a file named them.
    """

    shape: tuple[int, ...]
    dtype: str
    mean: Tensor
    std: Tensor
    columns: tuple[str, ...] | None = None

    def scaled(self, inputs: NDArray[Any]) -> Tensor:
        """Raw inputs [n, ...] as the federation's networks know them."""
        if self.dtype == TOKENS:
            return torch.from_numpy(inputs)
        return (torch.from_numpy(inputs).to(torch.float32) - self.mean) / self.std

    def plain(self) -> dict[str, Any]:
        """As what JSON knows; the inverse of `form_from_plain`."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "columns": None if self.columns is None else list(self.columns),
        }


def token_form(length: int) -> InputForm:
    """The form of texts as `length` tokens."""
    return InputForm((length,), TOKENS, torch.tensor(0.0), torch.tensor(1.0))


def input_form(raw: NDArray[Any], scale: Scale, columns: tuple[str, ...] | None = None) -> InputForm:
    """The form of raw inputs [n, ...] that `scale` is applied to."""
    return InputForm(tuple(raw.shape[1:]), _kind(raw), scale.mean, scale.std, columns)


def _kind(raw: NDArray[Any]) -> str:
    return "uint8" if raw.dtype == np.uint8 else "float32"


def form_from_plain(plain: Mapping[str, Any]) -> InputForm:
    """The form that plain values describe.

    Raises:
        DataError: if they do not describe one.
    """
    shape, dtype, columns = (plain.get(name) for name in ("shape", "dtype", "columns"))
    if not isinstance(shape, list) or not all(type(size) is int and size >= 1 for size in shape):
        raise _damaged(f"got shape {brief(shape)}; expected whole numbers >= 1")
    if not shape or math.prod(shape) > MOST_NUMBERS:
        raise _damaged(f"got shape {brief(shape)}; expected {MOST_NUMBERS:,} numbers at most")
    if dtype not in ("uint8", "float32", TOKENS):
        raise _damaged(f"got dtype {brief(dtype)}; expected uint8, float32 or {TOKENS}")
    if columns is not None and not (isinstance(columns, list) and all(isinstance(name, str) for name in columns)):
        raise _damaged(f"got columns {brief(columns)}; expected texts, or null")
    mean, std = (_scale_from_plain(plain.get(name), name, tuple(shape)) for name in ("mean", "std"))
    if not bool((std != 0).all()):
        raise _damaged("got std with 0 in it; expected numbers to divide by")
    return InputForm(tuple(shape), str(dtype), mean, std, None if columns is None else tuple(columns))


def _scale_from_plain(values: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    """The numbers of `mean` or `std`, which must be one for each input or broadcast to them."""
    try:
        found = torch.tensor(values, dtype=torch.float32)
        fits = np.broadcast_shapes(tuple(found.shape), shape) == shape and bool(found.isfinite().all())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fits = False
    if not fits:
        raise _damaged(f"got {name} {brief(values)}; expected finite numbers for inputs of shape {list(shape)}")
    return found


def _damaged(why: str) -> DataError:
    return DataError(f"the form of the inputs is damaged: {why}")
