"""A pool of labelled items before it is dealt out to clients."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Labelled items from one source.

    Attributes:
        name: Of the source and its options, for messages and records.
        inputs: [n, ...] uint8 images in channel-first order (0..255) or finite float32 of any shape, or [n] texts (a
            numpy array of unicode strings), which a language model's own encoder turns into tokens.
        targets: [n] class indices 0..K-1.
        class_names: [K].
        user: [n] natural user (writer, typeface, site) of each item, or None.
        domain: [n] domain (drawing style, device) of each item, or None.
        item: [n] identity of the underlying thing; items that share one are near-copies and never sit on two sides
            of a split. None means that every row is its own item.
        user_names: Readable users.
        domain_names: Readable domains.
        class_tasks: [K] name of the task that each class belongs to, where the pool has several tasks whose classes
            are told apart within a task only; empty for one task.
        answers: [n] what a text is answered by, where that is more than a class: the completion of a prompt, or one
            tag per word; None else.
    """

    name: str
    inputs: NDArray[Any]
    targets: Ints
    class_names: tuple[str, ...]
    user: Ints | None = None
    domain: Ints | None = None
    item: Ints | None = None
    user_names: Sequence[str] = ()
    domain_names: Sequence[str] = ()
    class_tasks: tuple[str, ...] = ()
    answers: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        n, num_classes = len(self.inputs), len(self.class_names)
        for column in ("targets", "user", "domain", "item"):
            values = getattr(self, column)
            if values is not None and values.shape != (n,):
                raise DataError(f"{self.name}: `{column}` has shape {values.shape}; expected ({n},), one per input")
            if values is not None and values.dtype.kind not in "iu":
                raise DataError(f"{self.name}: `{column}` holds {values.dtype}; expected whole numbers")
        if self.inputs.dtype != np.uint8 and self.inputs.dtype.kind not in "fU":
            raise DataError(f"{self.name}: inputs are {self.inputs.dtype}; expected uint8 images, float32 or texts")
        if n == 0:
            raise DataError(f"{self.name}: no items at all")
        if self.class_tasks and len(self.class_tasks) != num_classes:
            raise DataError(f"{self.name}: {len(self.class_tasks)} tasks for {num_classes} classes; expected one each")
        fits = self.answers is None or (self.is_text and self.answers.shape == (n,) and self.answers.dtype.kind == "U")
        if self.answers is not None and not fits:
            raise DataError(
                f"{self.name}: answers are {self.answers.dtype} {list(self.answers.shape)} for inputs of type "
                f"{self.inputs.dtype}; expected a text for each of {n} texts"
            )
        if self.targets.min() < 0 or self.targets.max() >= num_classes:
            raise DataError(
                f"{self.name}: labels run from {self.targets.min()} to {self.targets.max()}; "
                f"expected 0..{num_classes - 1} for {num_classes} classes"
            )
        if self.inputs.dtype.kind == "f" and not np.isfinite(self.inputs).all():
            bad = int(np.flatnonzero(~np.isfinite(self.inputs.reshape(n, -1)).all(axis=1))[0])
            raise DataError(f"{self.name}: item {bad} has NaN or infinite inputs; clean or drop such items first")

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def is_text(self) -> bool:
        """Whether its inputs are texts."""
        return bool(self.inputs.dtype.kind == "U")

    def sha256(self) -> str:
        """Hash of inputs, labels and answers."""
        digest = hashlib.sha256(str((self.inputs.shape, str(self.inputs.dtype))).encode())
        digest.update(np.ascontiguousarray(self.inputs).tobytes())
        digest.update(np.ascontiguousarray(self.targets).tobytes())
        if self.answers is not None:
            digest.update(np.ascontiguousarray(self.answers).tobytes())
        return digest.hexdigest()
