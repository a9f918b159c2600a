"""A task whose passes run for all clients of a chunk in one fold.

A client function is written for one client and mapped over the chunk by ``torch.func.vmap``. Where it asks the task
for a pass, the mapping stops: the vectors and batches of all clients are handed to the fold as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedmerge.core.protocol import Batch, Batches, Slope
from fedmerge.core.vector import Layout
from fedmerge.training.folded.fold import Finish, Fold, fold_of
from fedmerge.training.objective import CLASSES, Objective
from fedmerge.training.sgd import Descent
from fedmerge.training.task import FunctionalTask

_Pass = Callable[..., tuple[Tensor, ...]]


class _Stacked(torch.autograd.Function):
    """Calls ``function(tensors with a client axis)``; under vmap for all clients at once, else for one."""

    @staticmethod
    def forward(function: _Pass, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(found[0] for found in function(*(tensor[None] for tensor in tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: the passes give gradients themselves."""

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], function: _Pass, *tensors: Tensor) -> tuple[Any, Any]:
        found = function(
            *(
                tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
                for tensor, dim in zip(tensors, in_dims[1:], strict=True)
            )
        )
        return found, (0,) * len(found)


def _stacked(function: _Pass, *tensors: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _Stacked.apply(  # type: ignore[no-untyped-call]
        function, *(tensor.detach() for tensor in tensors)
    )
    return found


class FoldedTask(FunctionalTask):
    """The numbers of `ModuleTask`; `slope_through` alone, which few methods ask for, is mapped as `FunctionalTask`.

    Args:
        module: A network that can be folded (see `why_not`); copied but for frozen parameters.
        layout: Of the module.
        descent: The local optimiser.
        objective: What outputs are held against.
        finish: What is made of each folded network, for example one with compiled kernels.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        descent: Descent,
        *,
        objective: Objective = CLASSES,
        finish: Finish | None = None,
    ) -> None:
        super().__init__(module, layout, descent, objective=objective)
        self._module, self._finish = module, finish
        self._folds: dict[int, Fold] = {}

    def _fold(self, params: Float[Tensor, "K P"]) -> Fold:
        """The fold for as many clients; the last two sizes are kept, since the last chunk is often smaller."""
        clients = len(params)
        if clients not in self._folds:
            while len(self._folds) > 1:
                self._folds.pop(next(iter(self._folds)))
            self._folds[clients] = fold_of(
                self._module,
                self.layout,
                clients,
                objective=self._objective,
                device=_elsewhere(params),
                finish=self._finish,
            )
        return self._folds[clients]

    def gradient(self, params: Float[Tensor, " P"], batch: Batch, offset: Tensor | None = None) -> Slope:
        """Loss, gradient [T] and new buffers [P − T] in training mode; `offset` [B, K] is added to the outputs."""

        def of_all(params: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return tuple(self._fold(params).slopes(params, Batch(*rest[:4]), *rest[4:]))

        return Slope(*_stacked(of_all, params, *batch, *(() if offset is None else (offset,))))

    def train(
        self, params: Float[Tensor, " P"], batches: Batches, *, pull: float = 0.0, towards: Tensor | None = None
    ) -> Float[Tensor, " P"]:
        """Local SGD over `batches`."""
        if not batches:
            return params
        leaves = [tensor for batch in batches for tensor in batch]
        centre = () if towards is None else (towards,)

        def of_all(params: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            steps = tuple(Batch(*rest[start : start + 4]) for start in range(0, len(leaves), 4))
            towards = rest[-1] if centre else None
            return (self._fold(params).train(params, steps, self._descent, pull=pull, towards=towards),)

        return _stacked(of_all, params, *leaves, *centre)[0]

    def predict(self, params: Float[Tensor, " P"], inputs: Tensor) -> Tensor:
        """Outputs in evaluation mode, [B, K]."""
        return _stacked(lambda params, inputs: (self._fold(params).predict(params, inputs),), params, inputs)[0]


def _elsewhere(params: Tensor) -> torch.device | None:
    """The device of a vector that is not on the CPU."""
    return None if params.device.type == "cpu" else params.device
