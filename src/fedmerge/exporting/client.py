"""One client of a run: its model, its classes, its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from fedmerge.core.ensemble import EnsembleModule, Personal, members
from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.vector import twin
from fedmerge.exporting.trained import Trained


@dataclass(frozen=True)
class Client:
    """A client and the model that it would use.

    Attributes:
        trained: The run.
        index: Of the client.
        personal: Its model, as one vector or several.
        why_round: Why the model is of its round, where that is not the run's own choice by what its record holds.
        facts: Further rows of the table on its card.
    """

    trained: Trained
    index: int
    personal: Personal
    why_round: str = ""
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The client's."""
        return self.trained.record.client_names[self.index]

    @property
    def own_classes(self) -> tuple[int, ...]:
        """Numbers of the classes that it has training examples of; all where the record does not say."""
        record = self.trained.record
        if record.class_counts is None:
            return tuple(range(len(record.class_names)))
        counts = record.class_counts[self.index][: len(record.class_names)]
        return tuple(k for k, count in enumerate(counts) if count > 0)

    @property
    def own_class_names(self) -> tuple[str, ...]:
        """Of its own classes, in the order of the run's."""
        return tuple(self.trained.record.class_names[k] for k in self.own_classes)

    def module_of(self, vector: Tensor) -> nn.Module:
        """A network of the run with these parameters, in evaluation mode."""
        module = twin(self.trained.module)
        self.trained.setup.layout.write(vector, module)
        return module.eval()

    def module(self) -> nn.Module:
        """The client's network, in evaluation mode."""
        networks = [self.module_of(vector) for vector in members(self.personal)]
        return networks[0] if isinstance(self.personal, Tensor) else EnsembleModule(networks, self.personal).eval()

    def row(self) -> list[float] | None:
        """[d] its merging weights; None for methods without them, and where the server's state is elsewhere."""
        state = self.trained.progress.state
        weights = None if state is None else self.trained.setup.played.mixing(state)
        return None if weights is None else [float(weight) for weight in weights[self.index]]

    def score(self, split: str) -> tuple[float, int] | None:
        """Accuracy 0..1 on ``validation`` or ``test`` and the number of examples; None for a client without any."""
        record = self.trained.record
        scores, count = getattr(record.selected(), split), getattr(record, f"num_{split}")[self.index]
        accuracy = None if scores is None else scores.accuracy[self.index]
        return None if accuracy is None or math.isnan(accuracy) else (accuracy, count)


def client_of(trained: Trained, client: Any) -> Client:
    """A client by its name, or by its index as a number or text.

    Raises:
        UsageError: if there is none; names the nearest.
    """
    names = trained.record.client_names
    index = _index_of(client, names)
    if index is None:
        raise UsageError(f"{unknown_name('client', client, names)}, or 0..{len(names) - 1}")
    return Client(trained, index, trained.personal(index))


def _index_of(client: Any, names: Sequence[str]) -> int | None:
    if isinstance(client, str) and client in names:
        return names.index(client)
    number = int(client) if isinstance(client, str) and client.isdecimal() else client
    is_index = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    return int(number) if is_index and 0 <= number < len(names) else None
