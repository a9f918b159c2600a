"""Columns of a table (images, numbers, names) as the arrays of a pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError
from fedmerge.data.pool import Ints


def image_array(images: Iterable[Any], size: int | None, where: str) -> NDArray[np.uint8]:
    """Pillow images as one array [n, c, h, w]: grey if all are, else colour; transparency is dropped.

    Args:
        images: The images.
        size: If given, every image is scaled to this many pixels per side; its shape is not kept.
        where: The column's name in messages.

    Raises:
        DataError: if an image is missing, has more than 8 bits per channel, or is of another shape than the first.
    """
    arrays = [_pixels(image, size, f"{where}, item {number}") for number, image in enumerate(images)]
    shapes = sorted({array.shape[:2] for array in arrays})
    if len(shapes) > 1:
        raise DataError(
            f"{where}: images of {len(shapes)} shapes, from {shapes[0]} to {shapes[-1]} (height, width); "
            "set `size` to scale all of them to one"
        )
    if all(array.ndim == 2 for array in arrays):
        return np.stack(arrays)[:, None]
    colour = [array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2) for array in arrays]
    return np.ascontiguousarray(np.stack(colour).transpose(0, 3, 1, 2))


def _pixels(image: Any, size: int | None, where: str) -> NDArray[np.uint8]:
    """[h, w] if the image is grey, [h, w, 3] if it is not."""
    if image is None:
        raise DataError(f"{where}: no image; drop such items first")
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{where}: an image of mode {image.mode!r}; convert to 8 bits per channel first")
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), resample=2)  # bilinear, over all covered pixels when it shrinks
    return np.asarray(image, dtype=np.uint8)


def number_array(values: Any, where: str) -> NDArray[Any]:
    """Numbers, one array of one shape per item, as float32 [n, ...]; uint8 images [n, c, h, w] stay as they are.

    Raises:
        DataError: if they are no numbers or items differ in shape (the table then holds objects).
    """
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"{where}: items are not numbers of one shape; expected images, numbers, or lists of numbers of one "
            "length, or texts"
        )
    if array.dtype == np.uint8 and array.ndim == 4:
        return array
    return (array[:, None] if array.ndim == 1 else array).astype(np.float32)


def text_array(values: Sequence[Any], where: str) -> NDArray[np.str_]:
    """Texts, or lists of words with a space between them, as one array [n].

    Raises:
        DataError: naming the first item that is neither, or empty.
    """
    texts = [" ".join(map(str, value)) if isinstance(value, (list, tuple)) else value for value in values]
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{where}, item {number}: {text!r}; expected a text or a list of words; drop such items first"
            )
    return np.array(texts, dtype=np.str_)


def numbered(values: Sequence[Any], where: str) -> tuple[Ints, tuple[str, ...]]:
    """Each value's place among the distinct ones in ascending order, and their names.

    Raises:
        DataError: if a value is missing or is not a text, a whole number or a truth value.
    """
    for number, value in enumerate(values):
        if not isinstance(value, (str, int, bool)):
            raise DataError(f"{where}, item {number}: {value!r}; expected a text or a whole number")
    distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    index = {value: number for number, value in enumerate(distinct)}
    return np.array([index[value] for value in values], dtype=np.int64), tuple(map(str, distinct))
