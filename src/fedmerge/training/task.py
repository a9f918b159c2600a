"""A network and a loss as functions of a flat vector, in two forms that give the same numbers.

`ModuleTask` reuses one module whose tensors are views of one buffer: the fast form for one client after another.
`FunctionalTask` is pure and goes through ``torch.func.vmap``: the form for many clients at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedmerge.core.protocol import Alter, Batch, Batches, Slope
from fedmerge.core.vector import Layout, twin
from fedmerge.training import dense
from fedmerge.training.folded.fold import DenseFold
from fedmerge.training.objective import CLASSES, Criterion, Objective
from fedmerge.training.sgd import Descending, Descent


def is_batch_coupled(module: nn.Module) -> bool:
    """Whether an example's output depends on its batch (BatchNorm in training): such batches cannot be padded."""
    return any(isinstance(part, nn.modules.batchnorm._NormBase) for part in module.modules())


def has_dropout(module: nn.Module) -> bool:
    """Whether the forward pass draws random numbers in training, as far as torch's own layers tell."""
    return any(_draws(part) for part in module.modules())


def _draws(part: nn.Module) -> bool:
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0
    if isinstance(part, (nn.RNNBase, nn.MultiheadAttention)):
        return part.dropout > 0
    return isinstance(part, nn.RReLU)


def measuring_twin(module: nn.Module) -> nn.Module:
    """A copy whose BatchNorm layers keep the statistics of the last batch instead of a running mean."""
    copied = twin(module)
    for part in copied.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            part.momentum = 1.0
    return copied


def _weighted(criterion: Criterion, outputs: Tensor, batch: Batch) -> Tensor:
    return (criterion(outputs, batch.targets) * batch.weight).sum()


# What both tasks do alike, given their `predict`, `gradient`, `_objective` and `_descent`.


def _mean_loss(self: Any, params: Float[Tensor, " P"], batch: Batch) -> Tensor:
    """Mean loss of a batch in evaluation mode."""
    return _weighted(self._objective.losses, self.predict(params, batch.inputs), batch)


def _loss_of_each(self: Any, outputs: Float[Tensor, "B ..."], targets: Tensor) -> Float[Tensor, " B"]:
    """Loss of each example."""
    losses: Tensor = self._objective.losses(outputs, targets)
    return losses


def _right_of_each(self: Any, outputs: Float[Tensor, "B ..."], targets: Tensor) -> Float[Tensor, " B"]:
    """How right each answer is, 0..1."""
    right: Tensor = self._objective.right(outputs, targets)
    return right


def _trained(
    self: Any, params: Float[Tensor, " P"], batches: Batches, *, pull: float = 0.0, towards: Tensor | None = None
) -> Float[Tensor, " P"]:
    """Local SGD over `batches`."""
    return _descended(self, params, batches, self.gradient, pull=pull, towards=towards)


def _descended(
    self: Any,
    params: Float[Tensor, " P"],
    batches: Batches,
    gradient: Callable[[Tensor, Batch], Slope],
    *,
    pull: float = 0.0,
    towards: Tensor | None = None,
) -> Float[Tensor, " P"]:
    """Local SGD over `batches` on any slope."""
    after: Tensor = self._descent(params, batches, gradient, pull=pull, towards=towards)
    return after


@contextmanager
def _before_head(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block the output layer `name` of `module` gets ``change(features)``."""
    head = module.get_submodule(name)
    handle = head.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def _altering(alter: Alter, extra: Tensor, added: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Changes the features by `alter` and notes what that adds to the loss."""

    def change(features: Tensor) -> Tensor:
        changed, penalty = alter(features, extra)
        added.append(penalty)
        return changed

    return change


def _remember(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Changes nothing and notes what it was given."""

    def change(features: Tensor) -> Tensor:
        seen.append(features)
        return features

    return change


def _device(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next(module.parameters()).device


def _of_one(batches: Batches) -> Batches:
    """The batches of one client with a client axis."""
    return tuple(Batch(*(tensor[None] for tensor in batch)) for batch in batches)


class ModuleTask:
    """One reused module on flat buffers: no tensor is copied beyond the vector itself.

    Args:
        module: Copied but for frozen parameters, which are shared; the caller's stays as it is.
        layout: Of the module. Trainable tensors of another dtype than the vector's are cast at every step, buffers of
            another (counters) once in a training.
        descent: The local optimiser.
        objective: What outputs are held against.
    """

    def __init__(self, module: nn.Module, layout: Layout, descent: Descent, *, objective: Objective = CLASSES) -> None:
        self.layout, self._descent, self._objective = layout, descent, objective
        self._module = twin(module)
        self._flat = layout.read(self._module)
        self._slope = torch.zeros_like(self._flat[: layout.num_trainable])
        self._slopes = layout.views(self._slope)
        wanted = {slot.name for slot in layout.slots}
        tensors = [*self._module.named_parameters(), *self._module.named_buffers()]
        self._own = {name: tensor for name, tensor in tensors if name in wanted}
        links = dense.chain_of(module, layout) if objective is CLASSES else None
        self._dense = None if links is None else DenseFold(layout, 1, links, device=_device(module))
        odd = [slot for slot in layout.slots if slot.dtype != layout.dtype]
        self._is_cast = any(slot.role != "buffer" for slot in odd)
        self._odd = [slot for slot in odd if slot.role == "buffer"]
        if not self._is_cast:
            views = layout.views(self._flat)
            for name in views.keys() - {slot.name for slot in odd}:
                self._own[name].data = views[name]
            for name, slope in self._slopes.items():
                self._own[name].grad = slope

    def _load(self, params: Tensor, *, training: bool) -> None:
        if self._is_cast:
            self.layout.write(params, self._module)
        else:
            self._flat.copy_(params)
            if self._odd:
                views = self.layout.views(self._flat)
                for slot in self._odd:
                    self._own[slot.name].copy_(views[slot.name])
        if self._module.training != training:
            self._module.train(training)

    def _zero_slope(self) -> None:
        self._slope.zero_()
        if self._is_cast:
            for name in self._slopes:
                self._own[name].grad = None

    def _read_slope(self) -> Tensor:
        if not self._is_cast:
            return self._slope.clone()
        slopes = {name: self._own[name].grad for name in self._slopes}
        return self.layout.flatten(
            {name: torch.zeros_like(self._own[name]) if slope is None else slope for name, slope in slopes.items()}
        )

    def _read_buffers(self) -> Tensor:
        if not self._is_cast:
            self._note_odd()
            return self._flat[self.layout.num_trainable :].clone()
        return self.layout.flatten(
            {slot.name: self._own[slot.name] for slot in self.layout.slots if slot.role == "buffer"}
        )

    def _note_odd(self) -> None:
        """Writes the buffers that are no views of the vector back to it."""
        for slot in self._odd:
            self._flat[slot.start : slot.stop] = self.layout.flatten({slot.name: self._own[slot.name]})

    def train(
        self, params: Float[Tensor, " P"], batches: Batches, *, pull: float = 0.0, towards: Tensor | None = None
    ) -> Float[Tensor, " P"]:
        """Local SGD over `batches`, in place on the module's own vector."""
        if not batches:
            return params.clone()
        if self._is_cast:
            return _descended(self, params, batches, self.gradient, pull=pull, towards=towards)
        if self._dense is not None:
            one = None if towards is None else towards[None]
            return self._dense.train(params[None], _of_one(batches), self._descent, pull=pull, towards=one)[0]
        T = self.layout.num_trainable
        self._load(params, training=True)
        centre = None if towards is None else towards[:T]
        descending = Descending(self._descent, self._flat[:T], pull=pull, towards=centre)
        for batch in batches:
            self._slope.zero_()
            _weighted(self._objective.losses, self._module(batch.inputs), batch).backward()  # type: ignore[no-untyped-call]
            descending.step(self._slope, batch.lr)
        self._note_odd()
        return self._flat.clone()

    def gradient(self, params: Float[Tensor, " P"], batch: Batch, offset: Tensor | None = None) -> Slope:
        """Loss, gradient [T] and new buffers [P − T] in training mode; `offset` [B, K] is added to the outputs."""
        self._load(params, training=True)
        self._zero_slope()
        outputs = self._module(batch.inputs)
        loss = _weighted(self._objective.losses, outputs if offset is None else outputs + offset, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return Slope(loss.detach(), self._read_slope(), self._read_buffers())

    def slope_through(
        self, params: Float[Tensor, " P"], extra: Tensor, batch: Batch, alter: Alter
    ) -> tuple[Slope, Tensor]:
        """`gradient` with the output layer's input changed by `alter`; also the gradient on `extra`."""
        self._load(params, training=True)
        self._zero_slope()
        extra = extra.clone().requires_grad_()
        added: list[Tensor] = []
        with _before_head(self._module, self.layout.head_module, _altering(alter, extra, added)):
            outputs = self._module(batch.inputs)
        loss = _weighted(self._objective.losses, outputs, batch) + torch.stack(added).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        slope = torch.zeros_like(extra) if extra.grad is None else extra.grad
        return Slope(loss.detach(), self._read_slope(), self._read_buffers()), slope

    @torch.no_grad()
    def features(self, params: Float[Tensor, " P"], inputs: Tensor) -> Tensor:
        """Input of the output layer in evaluation mode, [B, F]."""
        seen: list[Tensor] = []
        self._load(params, training=False)
        with _before_head(self._module, self.layout.head_module, _remember(seen)):
            self._module(inputs)
        return seen[-1]

    @torch.no_grad()
    def predict(self, params: Float[Tensor, " P"], inputs: Tensor) -> Tensor:
        """Outputs in evaluation mode, [B, K]."""
        self._load(params, training=False)
        outputs: Tensor = self._module(inputs)
        return outputs

    loss = _mean_loss
    losses = _loss_of_each
    right = _right_of_each
    descend = _descended


class FunctionalTask:
    """The same numbers as `ModuleTask` without any state, for ``torch.func.vmap``.

    Args:
        module: Copied but for frozen parameters; supplies them and the forward pass.
        layout: Of the module.
        descent: The local optimiser.
        objective: What outputs are held against.
    """

    def __init__(self, module: nn.Module, layout: Layout, descent: Descent, *, objective: Objective = CLASSES) -> None:
        self.layout, self._descent, self._objective = layout, descent, objective
        self._training = twin(module).train()
        self._evaluating = twin(module).eval()
        self._chain = dense.chain_of(module, layout) if objective is CLASSES else None

    def gradient(self, params: Float[Tensor, " P"], batch: Batch, offset: Tensor | None = None) -> Slope:
        """Loss, gradient [T] and new buffers [P − T] in training mode; `offset` [B, K] is added to the outputs."""
        if self._chain is not None and self._chain.takes(batch.inputs):
            return dense.gradient(self._chain, self.layout, params, batch, offset)

        def outputs_of(tensors: dict[str, Tensor], _: Tensor) -> tuple[Tensor, Tensor]:
            outputs = functional_call(self._training, tensors, (batch.inputs,))
            return outputs if offset is None else outputs + offset, outputs.new_zeros(())

        return self._slopes(params, params[:0], batch, outputs_of)[0]

    def slope_through(
        self, params: Float[Tensor, " P"], extra: Tensor, batch: Batch, alter: Alter
    ) -> tuple[Slope, Tensor]:
        """`gradient` with the output layer's input changed by `alter`; also the gradient on `extra`."""

        def outputs_of(tensors: dict[str, Tensor], extra: Tensor) -> tuple[Tensor, Tensor]:
            added: list[Tensor] = []
            with _before_head(self._training, self.layout.head_module, _altering(alter, extra, added)):
                outputs = functional_call(self._training, tensors, (batch.inputs,))
            return outputs, torch.stack(added).sum()

        return self._slopes(params, extra, batch, outputs_of)

    def _slopes(
        self,
        params: Tensor,
        extra: Tensor,
        batch: Batch,
        outputs_of: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Slope, Tensor]:
        """Slopes on the trainable part and on `extra`; `outputs_of` gives outputs and what to add to the loss."""
        trainable = self.layout.views(params[: self.layout.num_trainable])
        held = {name: tensor for name, tensor in self.layout.views(params).items() if name not in trainable}

        def loss_of(tensors: dict[str, Tensor], extra: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            buffers = {name: tensor.clone() for name, tensor in held.items()}  # the forward pass writes into them
            outputs, added = outputs_of({**tensors, **buffers}, extra)
            loss = _weighted(self._objective.losses, outputs, batch) + added
            return loss, (loss.detach(), {name: tensor.detach() for name, tensor in buffers.items()})

        (slopes, slope), (loss, buffers) = grad(loss_of, argnums=(0, 1), has_aux=True)(trainable, extra)
        flat = self.layout.flatten(buffers) if buffers else params[:0]
        return Slope(loss, self.layout.flatten(slopes), flat), slope

    def features(self, params: Float[Tensor, " P"], inputs: Tensor) -> Tensor:
        """Input of the output layer in evaluation mode, [B, F]."""
        seen: list[Tensor] = []
        with _before_head(self._evaluating, self.layout.head_module, _remember(seen)):
            functional_call(self._evaluating, self.layout.views(params), (inputs,))
        return seen[-1].detach()

    def predict(self, params: Float[Tensor, " P"], inputs: Tensor) -> Tensor:
        """Outputs in evaluation mode, [B, K]."""
        outputs: Tensor = functional_call(self._evaluating, self.layout.views(params), (inputs,))
        return outputs.detach()

    loss = _mean_loss
    losses = _loss_of_each
    right = _right_of_each
    train = _trained
    descend = _descended


def measured_buffers(
    gradient: Callable[[Tensor, Batch], Slope], params: Float[Tensor, " P"], batches: Batches
) -> Float[Tensor, " B"]:
    """Mean of the batches' own statistics under `params`; `gradient` is that of a task on a `measuring_twin`."""
    counts = torch.stack([(batch.weight > 0).sum() for batch in batches]).to(params.dtype)
    measured = torch.stack([gradient(params, batch).buffers for batch in batches])
    return (counts / counts.sum()) @ measured
