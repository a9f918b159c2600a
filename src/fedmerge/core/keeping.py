"""Parts of the network that never leave their client, whatever the method: it sees the rest as if that were all.

A client's own part is trained together with what it received and put in its place wherever its model is used. FedAvg
whose clients keep the head is FedPer; any other method gets a personal part in the same way, if its clients train one
network in a round. Buffers follow the run's policy for buffers wherever they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.core import completing
from fedmerge.core.ensemble import Personal, members, with_members
from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Algorithm, Batch, Batches, Cost, Draw, Federation, Slope, Task
from fedmerge.core.ranges import Ranges, gathered, rest, woven
from fedmerge.core.replies import Check, check_of
from fedmerge.core.vector import Layout


class Kept(NamedTuple):
    """What never leaves a client.

    Attributes:
        method: What the method itself keeps there.
        own: [K] the client's own part of the network.
    """

    method: Any
    own: Tensor


@dataclass(frozen=True)
class Keeping:
    """A method whose clients keep a part of the network.

    Attributes:
        method: Any.
        whole: Layout of the network.
        kept: Ranges of the vector that stay with the clients.
    """

    method: Algorithm[Any]
    whole: Layout
    kept: Ranges

    @cached_property
    def travelling(self) -> Layout:
        """Layout of what the method sees."""
        return self.whole.without(self.kept)

    @property
    def check_reply(self) -> Check | None:
        """As of the method."""
        return check_of(self.method)

    @property
    def silence(self) -> Callable[[Any], Any] | None:
        """As of the method."""
        found: Callable[[Any], Any] | None = getattr(self.method, "silence", None)
        return found

    def shared(self, params: Float[Tensor, " P"]) -> Float[Tensor, " S"]:
        """What of a whole vector the method sees."""
        return gathered(params, rest(self.kept, len(params)))

    # ---------------------------------------------------------------- server

    def init(self, draw: Draw, federation: Federation, seed: int) -> Any:
        """The method's, on the travelling part."""
        parts = self.travelling
        facts = replace(
            federation,
            num_trainable=parts.num_trainable,
            head=parts.head,
            layers=parts.layers,
            norms=parts.norms,
            head_bias=parts.head_bias,
        )
        return self.method.init(lambda j: self.shared(draw(j)), facts, seed)

    def send(self, state: Any, clients: Int[Tensor, " C"]) -> Any:
        """The method's."""
        return self.method.send(state, clients)

    def receive(self, state: Any, clients: Int[Tensor, " C"], update: Any, num_examples: Int[Tensor, " C"]) -> Any:
        """The method's."""
        return self.method.receive(state, clients, update, num_examples)

    def cost(self, state: Any) -> Cost:
        """The method's."""
        return self.method.cost(state)

    def describe(self, state: Any) -> Mapping[str, Any]:
        """The method's."""
        return self.method.describe(state)

    def mixing(self, state: Any) -> Float[Tensor, "N d"] | None:
        """The method's."""
        return self.method.mixing(state)

    # ---------------------------------------------------------------- client

    def start(self, params: Float[Tensor, " P"]) -> Kept:
        """The client's own part begins as everybody's first draw."""
        return Kept(self.method.start(self.shared(params)), gathered(params, self.kept))

    def train(self, down: Any, local: Kept, batches: Batches, task: Task) -> tuple[Any, Kept]:
        """The method's round; the client's own part is trained along and stays."""
        own = _WithOwnPart(self, task, local.own)
        reply, method = self.method.train(down, local.method, batches, own)
        return reply, Kept(method, own.values)

    def personal(self, down: Any, local: Kept, batches: Batches, task: Task) -> Personal:
        """The method's model with the client's own part in its place."""
        own = _WithOwnPart(self, task, local.own)
        model = self.method.personal(down, local.method, batches, own)
        return with_members(model, [own._completed(vector) for vector in members(model)])


class _WithOwnPart:
    """A task on the travelling part: completed for every pass, and trained along in every descent.

    A pull towards the received model holds the own part where that descent began.
    """

    def __init__(self, keeping: Keeping, task: Task, values: Float[Tensor, " K"]) -> None:
        self._task, self._kept = task, keeping.kept
        self.layout, self.losses, self.right = keeping.travelling, task.losses, task.right
        self.values = values
        self._slope = torch.zeros_like(values)

    def _completed(self, params: Float[Tensor, " S"]) -> Float[Tensor, " P"]:
        """The whole vector."""
        return woven(self.values, params, self._kept)

    def _noted(self, slope: Slope, params: Tensor) -> Slope:  # noqa: ARG002
        """The slope on the travelling part; that on the client's own part is noted."""
        self._slope = gathered(slope.gradient, self._kept)
        return slope._replace(gradient=gathered(slope.gradient, rest(self._kept, len(slope.gradient))))

    def descend(
        self,
        params: Tensor,
        batches: Batches,
        gradient: Callable[[Tensor, Batch], Slope],
        *,
        pull: float = 0.0,
        towards: Tensor | None = None,
    ) -> Tensor:
        """As of the task, on [own part, params] with the slope of both."""
        size, centre = len(self.values), params if towards is None else towards

        def of_both(both: Tensor, batch: Batch) -> Slope:
            self.values = both[:size]
            slope = gradient(both[size:], batch)
            return slope._replace(gradient=torch.cat([self._slope, slope.gradient]))

        both, middle = torch.cat([self.values, params]), torch.cat([self.values, centre])
        steps = tuple(_with_rate_of_own(batch, size) for batch in batches)
        after = self._task.descend(both, steps, of_both, pull=pull, towards=middle)
        self.values = after[:size]
        return after[size:]

    train = completing.train
    gradient = completing.gradient
    slope_through = completing.slope_through
    features = completing.features
    predict = completing.predict
    loss = completing.loss


def _with_rate_of_own(batch: Batch, size: int) -> Batch:
    """Where every entry has a rate, those of the own part get the largest."""
    if batch.lr.ndim == 0:
        return batch
    return batch._replace(lr=torch.cat([batch.lr.amax().expand(size), batch.lr]))


def travelling(layout: Layout, modules: tuple[str, ...]) -> Layout:
    """Layout of what is left to send if the clients keep these sub-modules."""
    return layout.without(layout.below(modules)) if modules else layout


def keeping(method: Algorithm[Any], layout: Layout, modules: tuple[str, ...]) -> Algorithm[Any]:
    """The method with these sub-modules kept by the clients; the method itself for none.

    Args:
        method: Any.
        layout: Of the network.
        modules: Names of sub-modules, or ``head`` for the output layer.

    Raises:
        UsageError: for a module that is not there or has nothing to train, if nothing would be left to send, and for
            a method that says ``trains_several``.
    """
    if not modules:
        return method
    if "head" in modules and any(mark in layout.head_module for mark in (".lora_", ".ia3_")):
        raise UsageError(
            "keep: got 'head', but this network has no output layer that is trained (a model that completes texts "
            "has a frozen one); leave it out, or name the sub-modules that clients keep"
        )
    if getattr(method, "trains_several", False):
        while hasattr(method, "algorithm"):  # a method may be wrapped in a merging space or in defences
            method = method.algorithm
        name = type(method).__name__
        raise UsageError(
            f"keep: clients of {name} train several networks in a round, and which of them would have "
            "the kept part is not defined; leave `keep` out, or use a method whose clients train one"
        )
    kept = layout.below(modules)
    if sum(stop - start for start, stop in kept) == layout.num_trainable:
        raise UsageError(f"keep: {', '.join(modules)} are the whole network: nothing would be sent; use method local")
    return Keeping(method, layout, kept)
