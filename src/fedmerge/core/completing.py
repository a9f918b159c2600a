"""Tasks around a task. Some put something into the vector before every pass: a client's own buffers, or its own part.

What such tasks do alike, given their `_task`, ``_completed(params)``, the vector that the task within is asked about,
and ``_noted(slope, params)``, what the method gets to see of that task's slope. `train` and `descend` need `_task` and
`gradient` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fedmerge.core.protocol import Alter, Batch, Batches, Slope


def gradient(self: Any, params: Tensor, batch: Batch, offset: Tensor | None = None) -> Slope:
    """As of the task, on the completed vector."""
    slope: Slope = self._noted(self._task.gradient(self._completed(params), batch, offset), params)
    return slope


def slope_through(self: Any, params: Tensor, extra: Tensor, batch: Batch, alter: Alter) -> tuple[Slope, Tensor]:
    """As of the task, on the completed vector."""
    slope, slope_of_extra = self._task.slope_through(self._completed(params), extra, batch, alter)
    return self._noted(slope, params), slope_of_extra


def features(self: Any, params: Tensor, inputs: Tensor) -> Tensor:
    """As of the task, on the completed vector."""
    found: Tensor = self._task.features(self._completed(params), inputs)
    return found


def predict(self: Any, params: Tensor, inputs: Tensor) -> Tensor:
    """As of the task, on the completed vector."""
    outputs: Tensor = self._task.predict(self._completed(params), inputs)
    return outputs


def loss(self: Any, params: Tensor, batch: Batch) -> Tensor:
    """As of the task, on the completed vector."""
    found: Tensor = self._task.loss(self._completed(params), batch)
    return found


def train(self: Any, params: Tensor, batches: Batches, *, pull: float = 0.0, towards: Tensor | None = None) -> Tensor:
    """Local training by this task's own gradient."""
    after: Tensor = self.descend(params, batches, self.gradient, pull=pull, towards=towards)
    return after


def descend(
    self: Any,
    params: Tensor,
    batches: Batches,
    gradient: Callable[[Tensor, Batch], Slope],
    *,
    pull: float = 0.0,
    towards: Tensor | None = None,
) -> Tensor:
    """As of the task."""
    after: Tensor = self._task.descend(params, batches, gradient, pull=pull, towards=towards)
    return after
