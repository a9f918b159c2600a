"""Clients with their own train, validation and test examples."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from fedmerge.core.errors import DataError
from fedmerge.core.text import shortened
from fedmerge.data.encoding import NO_TARGET, Kind
from fedmerge.data.form import TOKENS, InputForm
from fedmerge.data.partition import Partition

log = logging.getLogger(__name__)


class Examples(NamedTuple):
    """Inputs and labels, side by side.

    Attributes:
        inputs: [n, ...]; images are channel first, [n, c, h, w]; texts are whole numbers [n, L], see
            `fedmerge.data.encoding.Encoded`.
        targets: [n] class indices, or [n, L] what each token should give, −100 where it does not count.
    """

    inputs: Shaped[Tensor, "n ..."]
    targets: Int[Tensor, "n ..."]


@dataclass(frozen=True)
class ClientData:
    """One client's own examples; no item is in two of its splits."""

    name: str
    train: Examples
    validation: Examples
    test: Examples

    @property
    def num_train(self) -> int:
        """n_i, the client's weight in every average."""
        return len(self.train.targets)


@dataclass(frozen=True)
class FederatedData:
    """What a federation trains on.

    Attributes:
        clients: In client-id order; a client's index is its id everywhere.
        class_names: [K].
        groups: [N] the true group of each client where it is known (oracle, cluster recovery), else None.
        partition: How the items were dealt out; None for a user's own clients.
        source: One line that names the data and the partition.
        form: What the raw inputs looked like and how they were scaled; None where that is not known.
        kind: What is learned: one class per example, one tag per token, or the completion of a text.
        class_tasks: [K] the task that each class belongs to, where clients have different tasks: a class is told apart
            from the others of its task only. Empty where all classes are one task.
        tasks: [N] name of each client's task or domain, for tables; None where there is nothing to tell apart.
        counts: [N][K] train examples of each class, where the targets do not tell.
    """

    clients: tuple[ClientData, ...]
    class_names: tuple[str, ...]
    groups: tuple[int, ...] | None = None
    partition: Partition | None = None
    source: str = "your data"
    form: InputForm | None = None
    kind: Kind = "classes"
    class_tasks: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None
    counts: tuple[tuple[int, ...], ...] | None = None

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, for example (1, 28, 28)."""
        return tuple(self.clients[0].train.inputs.shape[1:])

    def class_counts(self) -> tuple[tuple[int, ...], ...]:
        """[N][K] train examples (of kind ``tags``: tokens) of each class."""
        if self.counts is not None:
            return self.counts
        if self.kind == "completions":  # targets are tokens of what clients write, no classes
            return tuple((client.num_train,) for client in self.clients)
        targets = (client.train.targets for client in self.clients)
        return tuple(tuple(t[t >= 0].bincount(minlength=self.num_classes).tolist()) for t in targets)

    def sha256(self) -> str:
        """Hash of every client's examples and splits: runs may be compared when it is equal."""
        digest = hashlib.sha256()
        for client in self.clients:
            digest.update(client.name.encode())
            for split in (client.train, client.validation, client.test):
                for tensor in split:
                    digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
                    digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Examples one after another."""
    return Examples(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))


def check_federation(data: FederatedData) -> None:
    """Refuses clients that cannot be trained on; a client with one class is only logged.

    Raises:
        DataError: naming the client without train examples, with a label out of range, an input that is not finite,
            or inputs of another shape or type than the first client's.
    """
    if not data.clients:
        raise DataError("no clients at all; expected at least one")
    first = data.clients[0].train.inputs
    for client in data.clients:
        if not client.num_train:
            raise DataError(f"client {client.name!r} has no train examples; give it some or leave it out")
        for split, examples in (("train", client.train), ("validation", client.validation), ("test", client.test)):
            _check_examples(examples, data, first, f"client {client.name!r}, {split}")
        if data.kind == "classes" and client.train.targets.min() == client.train.targets.max():
            only = data.class_names[int(client.train.targets[0])]
            log.warning("client %r trains on one class only, %s", client.name, shortened(only))


def _check_examples(examples: Examples, data: FederatedData, like: Tensor, where: str) -> None:
    inputs, targets = examples
    num_classes = data.num_classes
    if len(inputs) != len(targets):
        raise DataError(f"{where}: {len(inputs)} inputs and {len(targets)} labels; expected one label per input")
    if (inputs.dtype, inputs.shape[1:]) != (like.dtype, like.shape[1:]):
        raise DataError(
            f"{where}: inputs are {inputs.dtype} {list(inputs.shape[1:])}; "
            f"expected {like.dtype} {list(like.shape[1:])} as at the first client"
        )
    if data.kind != "classes":
        _check_sequences(inputs, targets, num_classes if data.kind == "tags" else None, where)
    elif len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise DataError(
            f"{where}: labels run from {int(targets.min())} to {int(targets.max())}; "
            f"expected 0..{num_classes - 1} for {num_classes} classes"
        )
    if not inputs.is_floating_point():
        return
    wrong = ~inputs.flatten(1).isfinite().all(dim=1)
    if wrong.any():
        bad = int(wrong.nonzero()[0])
        raise DataError(f"{where}: example {bad} has NaN or infinite inputs; clean or drop it first")


def _check_sequences(inputs: Tensor, targets: Tensor, num_classes: int | None, where: str) -> None:
    """Refuses targets of tokens that are out of range, and examples in which nothing counts."""
    if targets.shape != inputs.shape:
        raise DataError(f"{where}: targets are {list(targets.shape)}; expected {list(inputs.shape)}, one per token")
    real = targets[targets != NO_TARGET]
    if len(real) and (int(real.min()) < 0 or (num_classes is not None and int(real.max()) >= num_classes)):
        limit = " or more" if num_classes is None else f"..{num_classes - 1}"
        raise DataError(
            f"{where}: targets run from {int(real.min())} to {int(real.max())}; expected 0{limit}, or {NO_TARGET} for "
            "tokens that do not count"
        )
    nothing = (targets == NO_TARGET).all(dim=1)
    if nothing.any():
        raise DataError(f"{where}: example {int(nothing.nonzero()[0])} has no token that counts; drop it")


def without_examples(
    names: Sequence[str], class_names: tuple[str, ...], form: InputForm | None, kind: Kind = "classes"
) -> FederatedData:
    """Clients whose examples are elsewhere: what can be known of a federation without them.

    Args:
        names: [N] of the clients.
        class_names: [K].
        form: Of the inputs; None where it is not known.
        kind: What is learned.
    """
    shape = (1,) if form is None else form.shape
    dtype = torch.int64 if form is not None and form.dtype == TOKENS else torch.float32
    targets = torch.empty((0,) if kind == "classes" else (0, *shape), dtype=torch.int64)
    nothing = Examples(torch.empty((0, *shape), dtype=dtype), targets)
    clients = tuple(ClientData(name, nothing, nothing, nothing) for name in names)
    return FederatedData(clients, class_names, form=form, kind=kind)
