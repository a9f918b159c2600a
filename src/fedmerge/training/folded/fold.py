"""K copies of a network, trained together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedmerge.core.protocol import Batch, Batches, Slope
from fedmerge.core.vector import Layout, Slot, twin
from fedmerge.training import dense
from fedmerge.training.folded.layers import KNOWN, WIDE, Form
from fedmerge.training.objective import CLASSES, Objective
from fedmerge.training.sgd import Descending, Descent

Finish = Callable[[nn.Module], nn.Module]


def why_not(module: nn.Module, layout: Layout) -> str | None:
    """Why a network cannot be folded; None if every travelling tensor belongs to a layer that can."""
    odd = [slot.name for slot in layout.slots if slot.dtype != layout.dtype and not _is_counter(slot)]
    if odd:
        return f"{odd[0]} is of another type than the vector"
    form, travelling = form_of(module, layout), set(_names(layout))
    for name, part in module.named_modules():
        own = _own_tensors(name, part)
        if own & travelling:
            reason = _fault(part, form) or _half(own - travelling)
            if reason is not None:
                return reason
    frozen = [name for name in layout.frozen if form == "channels"]
    return f"{frozen[0]} is frozen in a network with convolutions" if frozen else None


def _fault(part: nn.Module, form: Form) -> str | None:
    """Why this layer cannot be folded."""
    known = KNOWN.get(type(part))
    if known is None:
        return f"a layer of class {type(part).__name__} has weights"
    _, forms, fault = known
    if form not in forms:
        return f"a {type(part).__name__} stands beside convolutions"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
        return f"a {type(part).__name__} carries hooks"
    return fault(part)


def _half(left: set[str]) -> str | None:
    return f"{min(left)} is frozen and the rest of its layer is not" if left else None


def _own_tensors(name: str, part: nn.Module) -> set[str]:
    """Full names of the tensors that a module holds itself."""
    held = {**part._parameters, **part._buffers}
    return {f"{name}.{tensor}".lstrip(".") for tensor, value in held.items() if value is not None}


def _names(layout: Layout) -> Iterator[str]:
    return chain.from_iterable((slot.name, *slot.aliases) for slot in layout.slots)


def _is_counter(slot: Slot) -> bool:
    return slot.name.rpartition(".")[2] == "num_batches_tracked"


def form_of(module: nn.Module, layout: Layout) -> Form:
    """Rows, unless the network has a layer that can only be folded in channels."""
    travelling = set(_names(layout))
    for name, part in module.named_modules():
        if _own_tensors(name, part) & travelling and type(part) in KNOWN and KNOWN[type(part)][1] == ("channels",):
            return "channels"
    return "rows"


class Fold(ABC):
    """K clients' networks.

    Args:
        layout: Of one of them.
        clients: K.
        objective: What outputs are held against.
    """

    def __init__(self, layout: Layout, clients: int, objective: Objective) -> None:
        self._layout, self.clients, self._objective = layout, clients, objective

    @abstractmethod
    def slopes(self, params: Float[Tensor, "K P"], batch: Batch, offset: Tensor | None = None) -> Slope:
        """Losses [K], gradients [K, T] and new buffers [K, P − T] in training mode; `offset` is [K, B, ...]."""

    @abstractmethod
    def train(
        self,
        params: Float[Tensor, "K P"],
        batches: Batches,
        descent: Descent,
        *,
        pull: float = 0.0,
        towards: Float[Tensor, "K P"] | None = None,
    ) -> Float[Tensor, "K P"]:
        """Local training of every client over `batches`, whose tensors have a leading client axis."""

    @abstractmethod
    def predict(self, params: Float[Tensor, "K P"], inputs: Shaped[Tensor, "K B ..."]) -> Tensor:
        """Outputs in evaluation mode, [K, B, ...]."""

    def _losses(self, outputs: Tensor, batch: Batch) -> Float[Tensor, " K"]:
        losses = self._objective.losses(outputs.flatten(0, 1), batch.targets.flatten(0, 1))
        return (losses.view(batch.weight.shape) * batch.weight).sum(dim=1)


class ModuleFold(Fold):
    """A network whose layers are replaced by their folded forms.

    The storage holds slot after slot of the layout, and in each slot client after client: [K, size of the slot]. So
    every tensor of every layer is a view of it for all clients at once, and a step is one pass over it.

    Args:
        module: Of one client; copied but for frozen parameters.
        layout: Of the module.
        clients: K.
        objective: What outputs are held against.
        device: Where it computes.
        finish: What is made of the folded network before it gets its tensors; names stay.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        clients: int,
        objective: Objective,
        device: torch.device | None,
        *,
        finish: Finish | None = None,
    ) -> None:
        super().__init__(layout, clients, objective)
        self._storage = torch.zeros(clients * layout.num_params, dtype=layout.dtype, device=device)
        self._slopes = torch.zeros_like(self._storage[: clients * layout.num_trainable])
        self._parts = [self._storage[clients * s.start : clients * s.stop].view(clients, -1) for s in layout.slots]
        trainable = [slot for slot in layout.slots if slot.role != "buffer"]
        self._slope_parts = [self._slopes[clients * s.start : clients * s.stop].view(clients, -1) for s in trainable]
        self._form = form_of(module, layout)
        folded, wide = self._folded(twin(module).to(device).requires_grad_(False))
        self._module = folded if finish is None else finish(folded)
        self._attach(wide)

    def _folded(self, module: nn.Module) -> tuple[nn.Module, set[str]]:
        """The module with folded layers; and the names of those that are wide ones."""
        owners = dict.fromkeys(name.rpartition(".")[0] for name in _names(self._layout))
        parts = {owner: module.get_submodule(owner) for owner in owners}
        for owner, part in parts.items():
            folded = KNOWN[type(part)][0](part, self.clients, self._form).train(part.training)
            above, _, last = owner.rpartition(".")
            if owner:
                module.get_submodule(above)._modules[last] = folded
            else:
                module = folded
        return module, {owner for owner, part in parts.items() if isinstance(part, WIDE)}

    def _attach(self, wide: set[str]) -> None:
        """Makes every travelling tensor of the folded layers, by every name that it has, a view of the storage."""
        slopes = iter(self._slope_parts)
        for slot, part in zip(self._layout.slots, self._parts, strict=True):
            flat = slot.layer in wide and not _is_counter(slot)
            own = _of_all(part, slot, flat=flat).data  # with a version of its own: buffers move while weights are held
            parameter = None if slot.role == "buffer" else nn.Parameter(own)
            if parameter is not None:
                parameter.grad = _of_all(next(slopes), slot, flat=flat)
            for name in (slot.name, *slot.aliases):
                owner, _, last = name.rpartition(".")
                holder = self._module.get_submodule(owner)
                if parameter is None:
                    holder._buffers[last] = own
                else:
                    holder._parameters[last] = parameter

    def _mode(self, *, training: bool) -> None:
        if self._module.training != training:
            self._module.train(training)

    def outputs(self, inputs: Shaped[Tensor, "K B ..."]) -> Float[Tensor, "K B ..."]:
        """What the networks give in their present mode, each client's by its own weights."""
        K, B = inputs.shape[:2]
        if self._form == "rows":
            rows: Tensor = self._module(inputs.flatten(0, 1))
            return rows.view(K, -1, *rows.shape[1:])
        side_by_side = inputs.transpose(0, 1).flatten(1, 2)
        if side_by_side.dim() == 4:
            side_by_side = side_by_side.contiguous(memory_format=torch.channels_last)
        outputs: Tensor = self._module(side_by_side)
        return outputs.view(B, K, -1).transpose(0, 1)

    def _backward(self, batch: Batch, offset: Tensor | None = None) -> Tensor:
        """Writes the slopes of all clients; gives their outputs."""
        self._slopes.zero_()
        with torch.enable_grad():
            outputs = self.outputs(batch.inputs)
            outputs = outputs if offset is None else outputs + offset
            self._losses(outputs, batch).sum().backward()  # type: ignore[no-untyped-call]
        return outputs.detach()

    def _load(self, params: Float[Tensor, "K P"], *, training: bool) -> None:
        for slot, part in zip(self._layout.slots, self._parts, strict=True):
            part.copy_(params[:, slot.start : slot.stop])
            if _is_counter(slot):
                part.round_()  # the mean of several counts is a count for a module
        self._mode(training=training)

    def _vectors(self) -> Float[Tensor, "K P"]:
        return torch.cat(self._parts, dim=1)

    def _in_storage_order(self, vectors: Float[Tensor, "K T"]) -> Float[Tensor, " KT"]:
        return torch.cat([vectors[:, s.start : s.stop].flatten() for s in self._layout.slots if s.role != "buffer"])

    def _rates(self, lr: Tensor) -> Tensor:
        """Rates [K] or [K, T] of the clients as one for each trainable entry of the storage."""
        T = self._layout.num_trainable
        return self._in_storage_order(lr.view(self.clients, -1).expand(self.clients, T))

    def slopes(self, params: Float[Tensor, "K P"], batch: Batch, offset: Tensor | None = None) -> Slope:
        """Losses [K], gradients [K, T] and new buffers [K, P − T] in training mode; `offset` is [K, B, ...]."""
        self._load(params, training=True)
        losses = self._losses(self._backward(batch, offset), batch)
        buffers = self._vectors()[:, self._layout.num_trainable :]
        return Slope(losses, torch.cat(self._slope_parts, dim=1), buffers)

    def train(
        self,
        params: Float[Tensor, "K P"],
        batches: Batches,
        descent: Descent,
        *,
        pull: float = 0.0,
        towards: Float[Tensor, "K P"] | None = None,
    ) -> Float[Tensor, "K P"]:
        """Local training of every client over `batches`, whose tensors have a leading client axis."""
        T = self._layout.num_trainable
        self._load(params, training=True)
        centre = None if towards is None else self._in_storage_order(towards[:, :T])
        descending = Descending(descent, self._storage[: self.clients * T], pull=pull, towards=centre)
        alike = self._storage.device.type == "cpu" and _rates_are_alike(batches)  # elsewhere a look is a wait
        for batch in batches:
            self._backward(batch)
            descending.step(self._slopes, batch.lr[0] if alike else self._rates(batch.lr))
        return self._vectors()

    @torch.no_grad()
    def predict(self, params: Float[Tensor, "K P"], inputs: Shaped[Tensor, "K B ..."]) -> Tensor:
        """Outputs in evaluation mode, [K, B, ...]."""
        self._load(params, training=False)
        return self.outputs(inputs)


class _Unseeing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether a number leaves a tensor, as in ``if y.sum() > 0``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.looked: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        self.looked |= func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def looks_at_numbers(module: nn.Module, layout: Layout, inputs: Shaped[Tensor, "B ..."]) -> bool:
    """Whether a network's course depends on numbers in its tensors, which folded are those of several clients.

    Args:
        module: A network that can be folded.
        layout: Of the module.
        inputs: A few.
    """
    fold = ModuleFold(module, layout, 2, CLASSES, None)
    fold._load(layout.read(module).repeat(2, 1), training=True)
    with torch.no_grad(), _Unseeing() as watch:
        fold.outputs(inputs.repeat(2, *[1] * inputs.dim()))
    return bool(watch.looked)


def _rates_are_alike(batches: Batches) -> bool:
    """Whether all clients go at the same rate in every step: then it need not be spread over the vector."""
    rates = [batch.lr for batch in batches]
    return all(rate.dim() == 1 for rate in rates) and bool(torch.stack([r.max() == r.min() for r in rates]).all())


def _of_all(part: Float[Tensor, "K n"], slot: Slot, *, flat: bool) -> Tensor:
    """A slot of all clients as the tensor of a folded layer; `flat`: of a wide one, without a client axis."""
    if flat and len(slot.shape) == 4:
        o, i, h, w = slot.shape
        return part.view(len(part) * o, h, w, i).permute(0, 3, 1, 2)
    shape = (len(part), *slot.shape)
    return part.view(shape[0] * shape[1], *shape[2:]) if flat else part.view(shape)


class DenseFold(Fold):
    """A fold of perceptrons, whose gradient has a closed form (see `training.dense`): no autograd, one copy of vectors.

    Args:
        layout: Of one of them.
        clients: K.
        links: Its layers.
        device: Where it computes.
    """

    def __init__(self, layout: Layout, clients: int, links: dense.Chain, *, device: torch.device | None = None) -> None:
        super().__init__(layout, clients, CLASSES)
        self._chain = links
        empty = partial(torch.zeros, dtype=layout.dtype, device=device)
        self._into = {slot.name: empty(clients, *slot.shape) for slot in layout.slots}

    def _weights(self, params: Float[Tensor, "K P"]) -> dict[str, Tensor]:
        """Views of the vectors as the layers' tensors."""
        return {s.name: params[:, s.start : s.stop].view(len(params), *s.shape) for s in self._layout.slots}

    def _write(self, weights: dict[str, Tensor], batch: Batch, offset: Tensor | None = None) -> Tensor:
        """Writes the slopes; gives the outputs."""
        with _in_full(batch.inputs):
            return dense.write_slopes(self._chain, weights, self._into, batch, offset)

    def slopes(self, params: Float[Tensor, "K P"], batch: Batch, offset: Tensor | None = None) -> Slope:
        """Losses [K], gradients [K, T] and no buffers; `offset` is [K, B, C]."""
        losses = self._losses(self._write(self._weights(params), batch, offset), batch)
        return Slope(losses, torch.cat([slope.flatten(1) for slope in self._into.values()], dim=1), params[:, :0])

    def train(
        self,
        params: Float[Tensor, "K P"],
        batches: Batches,
        descent: Descent,
        *,
        pull: float = 0.0,
        towards: Float[Tensor, "K P"] | None = None,
    ) -> Float[Tensor, "K P"]:
        """Local training of every client, each slot moved in place where it stands in the vectors."""
        moved = params.clone(memory_format=torch.contiguous_format)
        weights, slots = self._weights(moved), self._layout.slots
        parts = [(slice(s.start, s.stop), self._into[s.name].flatten(1)) for s in slots]
        every = [
            Descending(descent, moved[:, own], pull=pull, towards=None if towards is None else towards[:, own])
            for own, _ in parts
        ]
        for batch in batches:
            self._write(weights, batch)
            rate = batch.lr[:, None] if batch.lr.dim() == 1 else batch.lr
            for descending, (own, slope) in zip(every, parts, strict=True):
                descending.step(slope, rate if rate.shape[1] == 1 else rate[:, own])
        return moved

    def predict(self, params: Float[Tensor, "K P"], inputs: Shaped[Tensor, "K B ..."]) -> Float[Tensor, "K B C"]:
        """Outputs; never in fewer bits than the vectors have."""
        with _in_full(inputs):
            return dense.outputs(self._chain, self._weights(params), inputs.flatten(2))[1]


def _in_full(inputs: Tensor) -> AbstractContextManager[Any]:
    """Within the block nothing is computed in fewer bits."""
    kind = inputs.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else nullcontext()


def fold_of(
    module: nn.Module,
    layout: Layout,
    clients: int,
    *,
    objective: Objective = CLASSES,
    device: torch.device | None = None,
    finish: Finish | None = None,
) -> Fold:
    """The fastest fold of `clients` networks like `module`."""
    links = dense.chain_of(module, layout) if objective is CLASSES else None
    if links is not None:
        return DenseFold(layout, clients, links, device=device)
    return ModuleFold(module, layout, clients, objective, device, finish=finish)
