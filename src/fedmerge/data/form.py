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
from fedmerge.data.transform import Scale

TOKENS = "tokens"


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
    try:
        mean, std = (torch.tensor(plain[name], dtype=torch.float32) for name in ("mean", "std"))
        shape, columns = tuple(int(size) for size in plain["shape"]), plain["columns"]
        form = InputForm(shape, str(plain["dtype"]), mean, std, None if columns is None else tuple(map(str, columns)))
        fits = form.scaled(np.zeros((1, *shape), dtype=np.float32)).isfinite().all()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the form of the inputs is damaged: {type(error).__name__}: {error}") from error
    if form.dtype not in ("uint8", "float32", TOKENS) or not bool(fits) or math.prod(shape) < 1:
        raise DataError(f"the form of the inputs is damaged: got dtype {form.dtype!r} and shape {list(shape)}")
    return form
