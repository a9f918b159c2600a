"""A network's tensors as one flat vector [P], and back, without copying.

Order of the vector: trainable body, trainable head, buffers. Frozen parameters are not in it: they stay with the
module. Four-dimensional weights lie in memory as convolutions like them (channels last), so that a view is ready to
use. Tensors that a module holds under several names (tied weights) are there once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby, pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.ranges import Ranges, joined

Role = Literal["trainable", "head", "buffer", "frozen"]
_NORMALISING = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_ORDER: dict[Role, int] = {"trainable": 0, "head": 1, "buffer": 2}


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in the vector.

    Attributes:
        name: Its (first) name in the module.
        aliases: Its other names, for tied weights.
        shape: Its shape in the module.
        dtype: Its dtype in the module.
        role: What it is.
        start: First entry.
        stop: One past the last entry.
        normalises: Whether a normalisation layer owns it.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role
    start: int
    stop: int
    normalises: bool = False

    @property
    def layer(self) -> str:
        """Name of the module that owns it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Layout:
    """The map between a module's tensors and a flat vector.

    Attributes:
        slots: In vector order.
        dtype: Of the vector, the widest of the floating-point tensors in it.
        frozen: Names of the parameters that stay with the module.
        head_module: Name of the sub-module that is the output layer; empty where the module itself is.
    """

    slots: tuple[Slot, ...]
    dtype: torch.dtype
    frozen: tuple[str, ...]
    head_module: str = ""

    @property
    def num_params(self) -> int:
        """P."""
        return self.slots[-1].stop

    @property
    def num_trainable(self) -> int:
        """T: entries 0..T are trainable, T..P are buffers."""
        return max(slot.stop for slot in self.slots if slot.role != "buffer")

    @property
    def head(self) -> tuple[int, int]:
        """Range of the output layer; empty, at T, in a layout without it."""
        slots = [slot for slot in self.slots if slot.role == "head"]
        return (slots[0].start, slots[-1].stop) if slots else (self.num_trainable, self.num_trainable)

    @property
    def head_bias(self) -> tuple[int, int] | None:
        """Range of the biases of a linear output layer, one for each class; None for any other head."""
        slots = [slot for slot in self.slots if slot.role == "head"]
        if [len(slot.shape) for slot in slots] != [2, 1] or slots[0].shape[0] != slots[1].shape[0]:
            return None
        return slots[1].start, slots[1].stop

    @property
    def norms(self) -> tuple[tuple[int, int], ...]:
        """Ranges of the trainable tensors of normalisation layers."""
        return tuple((slot.start, slot.stop) for slot in self.slots if slot.normalises and slot.role != "buffer")

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """Ranges of the trainable tensors, grouped by the module that owns them."""
        trainable = [slot for slot in self.slots if slot.role != "buffer"]
        spans = (list(members) for _, members in groupby(trainable, key=lambda slot: slot.layer))
        return tuple((members[0].start, members[-1].stop) for members in spans)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters (LoRA, DoRA, IA3, by PEFT's names) are what is trained, beside an output layer."""
        return any(f".{kind}_" in slot.name for slot in self.slots for kind in ("lora", "ia3"))

    @property
    def has_uniform_dtype(self) -> bool:
        """Whether every tensor can be a view of the vector."""
        return all(slot.dtype == self.dtype for slot in self.slots)

    def below(self, modules: Iterable[str]) -> Ranges:
        """Ranges of the trainable tensors of these sub-modules, neighbours joined; "head" is the output layer.

        Raises:
            UsageError: for a module that is not there or has nothing trainable.
        """
        found: list[tuple[int, int]] = []
        for module in modules:
            spans = [(slot.start, slot.stop) for slot in self.slots if self._is_below(slot, module)]
            if not spans:
                known = {part for slot in self.slots if slot.role != "buffer" for part in _modules_of(slot)}
                raise UsageError(unknown_name("module with trainable parameters", module, {"head", *known}))
            found += spans
        return joined(sorted(set(found)))

    def _is_below(self, slot: Slot, module: str) -> bool:
        if slot.role == "buffer":
            return False
        return (module == "head" and slot.role == "head") or module in _modules_of(slot)

    def without(self, ranges: Ranges) -> Layout:
        """The layout of what is left of a vector without these ranges of whole tensors; half a head is no head."""
        left = [
            slot for slot in self.slots if not any(first <= slot.start and slot.stop <= last for first, last in ranges)
        ]
        whole = sum(slot.role == "head" for slot in left) == sum(slot.role == "head" for slot in self.slots)
        slots, start = [], 0
        for slot in left:
            role: Role = slot.role if whole or slot.role != "head" else "trainable"
            slots.append(replace(slot, role=role, start=start, stop=start + slot.stop - slot.start))
            start = slots[-1].stop
        return replace(self, slots=tuple(slots))

    def views(self, vector: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """The tensors by first name: views of the vector, or casts where a tensor has another dtype.

        A vector of the first T entries gives the trainable tensors alone.
        """
        slots = [slot for slot in self.slots if slot.stop <= len(vector)]
        return {slot.name: _shaped(vector[slot.start : slot.stop], slot) for slot in slots}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        """The inverse of `views`, for all slots that `tensors` names, in vector order."""
        parts = [_flat(tensors[slot.name], slot).to(self.dtype) for slot in self.slots if slot.name in tensors]
        return torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype)

    def read(self, module: nn.Module) -> Float[Tensor, " P"]:
        """A module's tensors as one vector."""
        return self.flatten({name: tensor.detach() for name, tensor in _tensors(module)}).clone()

    def write(self, vector: Float[Tensor, " P"], module: nn.Module) -> None:
        """Copies a vector into a module's tensors, in place."""
        own = dict(_tensors(module))
        with torch.no_grad():
            for name, value in self.views(vector).items():
                own[name].copy_(value)


def twin(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its frozen parameters, which nobody changes: a large base is there only once."""
    frozen = {id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad}
    return copy.deepcopy(module, frozen)


def _modules_of(slot: Slot) -> set[str]:
    """Every module that a tensor is below, by all its names."""
    owners = [name.split(".")[:-1] for name in (slot.name, *slot.aliases)]
    return {".".join(parts[: n + 1]) for parts in owners for n in range(len(parts))}


def _channels_last(slot: Slot) -> bool:
    return len(slot.shape) == 4


def _shaped(flat: Tensor, slot: Slot) -> Tensor:
    if _channels_last(slot):
        o, i, h, w = slot.shape
        shaped = flat.reshape(o, h, w, i).permute(0, 3, 1, 2)
    else:
        shaped = flat.reshape(slot.shape)
    if shaped.dtype == slot.dtype:
        return shaped
    return (shaped if slot.dtype.is_floating_point else shaped.round()).to(slot.dtype)


def _flat(tensor: Tensor, slot: Slot) -> Tensor:
    return (tensor.permute(0, 2, 3, 1) if _channels_last(slot) else tensor).reshape(-1)


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    }


def find_head(module: nn.Module, head: str | None = None) -> str:
    """Name of the module that is the output layer: the one asked for, or the last registered one with parameters.

    Raises:
        UsageError: if there is no such module, or it has no trainable parameters.
    """
    owners = {name for name, part in module.named_modules() if any(p.requires_grad for p in part.parameters())}
    if head is None:
        last = [name for name, p in module.named_parameters() if p.requires_grad]
        return last[-1].rpartition(".")[0] if last else ""
    if head not in owners:
        raise UsageError(unknown_name("head module", head, {name for name in owners if name}))
    return head


def layout_of(module: nn.Module, *, head: str | None = None, frozen: Iterable[str] = ()) -> Layout:
    """Reads the layout of a module.

    Args:
        module: Any module whose parameters are materialised.
        head: Name of the sub-module that is the output layer; the last registered one with parameters by default.
        frozen: Names of sub-modules whose parameters stay with the module, beside those with requires_grad=False.

    Raises:
        UsageError: if parameters are lazy, share memory without being the same tensor, are complex, or if there is
            nothing to train; names the tensors.
    """
    _refuse_unusable(module)
    head = find_head(module, head)
    named = _named(module, head, _frozen_names(module, tuple(frozen)))
    travelling = [entry for entry in named if entry[2] != "frozen"]
    if not any(role in ("trainable", "head") for _, _, role in travelling):
        raise UsageError(f"{type(module).__name__} has no trainable parameters: nothing could be learned")
    if not any(role == "head" for _, _, role in travelling):
        raise UsageError(f"the head module {head!r} has only frozen parameters; name another one as head")
    dtype = reduce(torch.promote_types, (t.dtype for _, t, _ in travelling if t.dtype.is_floating_point))
    slots, start = [], 0
    norms = {name for name, part in module.named_modules() if isinstance(part, _NORMALISING)}
    for names, tensor, role in sorted(travelling, key=lambda entry: _ORDER[entry[2]]):
        stop = start + tensor.numel()
        normalises = names[0].rpartition(".")[0] in norms
        slots.append(Slot(names[0], tuple(names[1:]), tuple(tensor.shape), tensor.dtype, role, start, stop, normalises))
        start = stop
    return Layout(tuple(slots), dtype, tuple(names[0] for names, _, role in named if role == "frozen"), head)


def _named(module: nn.Module, head: str, held_back: set[str]) -> list[tuple[list[str], Tensor, Role]]:
    """Every tensor that is saved, with all its names; one name inside the head or a frozen module decides its role."""
    parameters: dict[int, tuple[list[str], Tensor]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), ([], parameter))[0].append(name)
    buffers: dict[int, tuple[list[str], Tensor]] = {}
    for name, buffer in _persistent_buffers(module).items():
        buffers.setdefault(id(buffer), ([], buffer))[0].append(name)

    def role(names: list[str]) -> Role:
        if held_back.intersection(names):
            return "frozen"
        return "head" if head == "" or any(name.startswith(head + ".") for name in names) else "trainable"

    found: list[tuple[list[str], Tensor, Role]] = [(names, p, role(names)) for names, p in parameters.values()]
    return found + [(names, buffer, "buffer") for names, buffer in buffers.values()]


def _frozen_names(module: nn.Module, frozen: tuple[str, ...]) -> set[str]:
    parts = {name for name, _ in module.named_modules() if name}
    for name in frozen:
        if name not in parts:
            raise UsageError(unknown_name("frozen module", name, parts))
    return {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad or any(name.startswith(part + ".") for part in frozen)
    }


def _refuse_unusable(module: nn.Module) -> None:
    kind = type(module).__name__
    tensors = list(_tensors(module))
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise UsageError(
            f"{kind} has lazy parameters without a shape yet: {', '.join(lazy)}; "
            "run one batch through the module before giving it to fedmerge"
        )
    odd = [name for name, tensor in tensors if tensor.dtype.is_complex]
    if odd:
        raise UsageError(f"{kind} has complex tensors, which cannot be merged here: {', '.join(odd)}")
    _refuse_overlaps(kind, tensors)


def _refuse_overlaps(kind: str, tensors: list[tuple[str, Tensor]]) -> None:
    """Tensors that share memory without being one tensor (a view of another, `.data` assigned twice)."""
    distinct = {id(tensor): (name, tensor) for name, tensor in reversed(tensors) if tensor.numel()}
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * tensor.numel(), name)
        for name, tensor in distinct.values()
    )
    for (_, stop, first), (start, _, second) in pairwise(spans):
        if start < stop:
            raise UsageError(
                f"{kind}: {first!r} and {second!r} share memory without being the same parameter; "
                "make them one parameter (tied weights are supported) or give each its own memory"
            )
