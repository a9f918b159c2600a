"""What a method around a method hands through, given its `algorithm`; its state keeps the inner one's as ``method``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.core.ensemble import Personal
from fedmerge.core.protocol import Batches, Task
from fedmerge.core.replies import Check, check_of


def _trains_several(self: Any) -> bool:
    """As of the method."""
    return bool(getattr(self.algorithm, "trains_several", False))


def _check_reply(self: Any) -> Check | None:
    """As of the method."""
    return check_of(self.algorithm)


def _silence(self: Any) -> Callable[[Any], Any] | None:
    """As of the method."""
    inner = getattr(self.algorithm, "silence", None)
    return None if inner is None else lambda state: replace(state, method=inner(state.method))


trains_several = property(_trains_several)
check_reply = property(_check_reply)
silence = property(_silence)


def send(self: Any, state: Any, clients: Int[Tensor, " C"]) -> Any:
    """The method's."""
    return self.algorithm.send(state.method, clients)


def mixing(self: Any, state: Any) -> Float[Tensor, "N d"] | None:
    """The method's."""
    weights: Tensor | None = self.algorithm.mixing(state.method)
    return weights


def start(self: Any, params: Float[Tensor, " P"]) -> Any:
    """The method's."""
    return self.algorithm.start(params)


def train(self: Any, down: Any, local: Any, batches: Batches, task: Task) -> tuple[Any, Any]:
    """The method's."""
    reply: tuple[Any, Any] = self.algorithm.train(down, local, batches, task)
    return reply


def personal(self: Any, down: Any, local: Any, batches: Batches, task: Task) -> Personal:
    """The method's."""
    model: Personal = self.algorithm.personal(down, local, batches, task)
    return model
