"""The gate that every client reply passes before any state is touched, whatever brought it: one process or a network.

A server that believes its clients is ruined by one of them: NaN becomes the model, a tensor of another shape
broadcasts, a count of 10^12 replaces everybody. Here a reply is admitted whole or refused whole, with the reason; what
was refused changes nothing and never stops the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_unflatten

from fedmerge.core.text import brief

MOST_EXAMPLES = 10**9
"""Largest number of training examples that a client may claim."""
LARGEST = 1e12
"""Largest absolute value in a reply: sums and squares over any number of clients stay finite in float32."""

Check = Callable[[Mapping[str, Tensor]], "str | None"]
"""What is wrong with tensors of the right form; None if nothing is."""
Reason = Literal[
    "malformed", "run", "round", "client", "duplicate", "late", "count", "names", "shape", "dtype", "values"
]
REASONS: tuple[str, ...] = get_args(Reason)


@dataclass(frozen=True)
class Reply:
    """What arrives from a client. Until the gate has admitted it, its fields may hold anything.

    Attributes:
        run: Identity of the run that it answers, a text.
        round: Number of the round, counted from 1.
        client: The client's index.
        num_examples: Training examples that it says it has.
        tensors: The parts of its update by name, a mapping of texts to tensors.
    """

    run: Any
    round: Any
    client: Any
    num_examples: Any
    tensors: Any


@dataclass(frozen=True)
class Refusal:
    """Why a reply was not believed.

    Attributes:
        client: Who sent it, as far as that could be read; None otherwise.
        reason: One of `REASONS`.
        detail: What was got and what was expected.
    """

    client: int | None
    reason: Reason
    detail: str


class Form(NamedTuple):
    """Shape and type that one tensor must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Template:
    """What an update of a method looks like.

    Attributes:
        forms: Of every tensor, by name.
        spec: How the tensors, in the order of `forms`, make up the update.
    """

    forms: Mapping[str, Form]
    spec: TreeSpec

    @property
    def num_bytes(self) -> int:
        """Of the tensors of one reply."""
        return sum(math.prod(form.shape) * form.dtype.itemsize for form in self.forms.values())

    def update_of(self, tensors: Mapping[str, Tensor]) -> Any:
        """The update that an admitted reply carries."""
        return tree_unflatten([tensors[name] for name in self.forms], self.spec)


@dataclass(frozen=True)
class Expected:
    """What a reply of this round must be.

    Attributes:
        run: Identity of the run.
        round: Number of the round.
        cohort: Clients that were asked.
        template: Of the update.
        late: Clients of the cohort whose time is over.
        most_examples: Largest number of examples that is believed.
        further: What the method itself says of tensors that have the right form, see `check_of`; None for nothing.
    """

    run: str
    round: int
    cohort: Set[int]
    template: Template
    late: frozenset[int] = frozenset()
    most_examples: int = MOST_EXAMPLES
    further: Check | None = None


def check_of(method: Any) -> Check | None:
    """A method's own demands on a reply, its ``check_reply``; None for a method without.

    A method has them if its replies hold more than vectors to average, for example the number of a model.
    """
    found: Check | None = getattr(method, "check_reply", None)
    return found


def named_tensors(update: Any) -> dict[str, Tensor]:
    """The tensors of an update by dotted name.

    >>> from fedmerge.core.protocol import Update
    >>> list(named_tensors(Update(torch.zeros(3))))
    ['delta']
    """
    leaves, _ = tree_flatten_with_path(update)
    return {".".join(_step(key) for key in path) or "update": leaf for path, leaf in leaves}


def _step(key: Any) -> str:
    """One step of a path: a field's name, a key or a place."""
    return str(next(getattr(key, part) for part in ("name", "key", "idx") if hasattr(key, part)))


def template_of(update: Any) -> Template:
    """The form of an update."""
    leaves, spec = tree_flatten_with_path(update)
    forms = {name: Form(tuple(leaf.shape), leaf.dtype) for name, leaf in named_tensors(update).items()}
    if len(forms) != len(leaves):
        raise ValueError(f"two tensors of an update have the same name: {sorted(forms)}")
    return Template(forms, spec)


def fault_of(reply: Reply, expected: Expected, admitted: Set[int] = frozenset()) -> Refusal | None:
    """Why a reply must be refused; None if it may be admitted. Nothing of a reply is taken for granted.

    Args:
        reply: As it came; its fields may be of any type.
        expected: What this round asks for.
        admitted: Clients whose reply of this round was admitted already.
    """
    client = reply.client if _is_whole(reply.client) else None
    found = _fault_of_sender(reply, expected, admitted) or _fault_of_count(reply, expected)
    found = found or _fault_of_tensors(reply.tensors, expected.template)
    if found is None and expected.further is not None:
        said = expected.further(reply.tensors)
        found = None if said is None else ("values", said)
    return None if found is None else Refusal(client, *found)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


Fault = tuple[Reason, str]


def _fault_of_sender(reply: Reply, expected: Expected, admitted: Set[int]) -> Fault | None:
    if not isinstance(reply.run, str) or reply.run != expected.run:
        return "run", f"got run {_brief(reply.run)}; expected {expected.run!r}"
    if not _is_whole(reply.round) or reply.round != expected.round:
        return "round", f"got round {_brief(reply.round)}; expected {expected.round}"
    if not _is_whole(reply.client) or reply.client not in expected.cohort:
        return (
            "client",
            f"got client {_brief(reply.client)}; expected one of the {len(expected.cohort)} that were asked",
        )
    if reply.client in admitted:
        return "duplicate", "this client's reply of this round is there already"
    if reply.client in expected.late:
        return "late", "the reply came after the deadline of the round"
    return None


def _fault_of_count(reply: Reply, expected: Expected) -> Fault | None:
    count = reply.num_examples
    if _is_whole(count) and 1 <= count <= expected.most_examples:
        return None
    return "count", f"got {_brief(count)} examples; expected a whole number, 1..{expected.most_examples}"


def _fault_of_tensors(tensors: object, template: Template) -> Fault | None:
    if not isinstance(tensors, Mapping):
        return "malformed", f"got {_brief(tensors)} for the update; expected tensors by name"
    if tensors.keys() != template.forms.keys():
        wanted = ", ".join(template.forms)
        return "names", f"got tensors {_brief(sorted(map(str, tensors)))}; expected {wanted}"
    faults = (_fault_of_tensor(name, tensors[name], form) for name, form in template.forms.items())
    return next((fault for fault in faults if fault is not None), None)


def _fault_of_tensor(name: str, tensor: object, form: Form) -> Fault | None:
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type == "meta":
        return "malformed", f"{name}: got {_brief(type(tensor).__name__)}; expected a dense tensor"
    if tensor.dtype != form.dtype:
        return "dtype", f"{name}: got {tensor.dtype}; expected {form.dtype}"
    if tuple(tensor.shape) != form.shape:
        return "shape", f"{name}: got shape {_brief(list(tensor.shape))}; expected {list(form.shape)}"
    if not _is_sane(tensor):
        return "values", f"{name}: got NaN, infinite values or values beyond ±{LARGEST:g}"
    return None


def _is_sane(tensor: Tensor) -> bool:
    """Whether every value is finite and of a size that sums can bear; written so that NaN fails."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    lowest, highest = torch.aminmax(tensor.detach())
    return bool(lowest >= -LARGEST) and bool(highest <= LARGEST)


def _brief(value: object) -> str:
    return brief(value, _MOST_LETTERS)


_MOST_LETTERS = 80


class Admission(NamedTuple):
    """What became of the replies of a round.

    Attributes:
        admitted: In client order, whoever answered first.
        refusals: In the order of arrival.
    """

    admitted: tuple[Reply, ...]
    refusals: tuple[Refusal, ...]


def admit(replies: Iterable[Reply], expected: Expected) -> Admission:
    """Lets every reply through the gate, one after another."""
    admitted: dict[int, Reply] = {}
    refusals: list[Refusal] = []
    for reply in replies:
        refusal = fault_of(reply, expected, admitted.keys())
        if refusal is None:
            admitted[reply.client] = reply
        else:
            refusals.append(refusal)
    return Admission(tuple(admitted[client] for client in sorted(admitted)), tuple(refusals))


def stacked_updates(replies: Sequence[Reply], template: Template) -> Any:
    """The updates of admitted replies as one tree with a leading client axis [C].

    Args:
        replies: At least one.
        template: Of the update.
    """
    return template.update_of(
        {name: torch.stack([reply.tensors[name] for reply in replies]) for name in template.forms}
    )


def reasons_text(refusals: Iterable[Refusal]) -> str:
    """How many replies were refused for what, most frequent first.

    >>> reasons_text([Refusal(3, "values", ""), Refusal(4, "late", ""), Refusal(5, "values", "")])
    '2 values, 1 late'
    """
    counts = Counter(refusal.reason for refusal in refusals)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
