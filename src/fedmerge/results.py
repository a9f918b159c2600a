"""What the public functions give back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from fedmerge.core.ensemble import EnsembleModule, members
from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.vector import twin
from fedmerge.experiment.execute import Outcome
from fedmerge.experiment.record import RunRecord
from fedmerge.experiment.simulation import models_now, one_thread
from fedmerge.report import Table, clients_frame, comparison_table, runs_frame, write_report


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run.

    Attributes:
        outcome: Record, final state and what it ran on.
    """

    outcome: Outcome

    def __repr__(self) -> str:
        record = self.record
        return f"<Run {record.label!r}, seed {record.seed}: {record.status}, test accuracy {self.accuracy:.1%}>"

    @property
    def record(self) -> RunRecord:
        """Everything measured."""
        return self.outcome.record

    @property
    def accuracy(self) -> float:
        """Mean test accuracy over clients at the round that validation selects, 0..1."""
        scores = self.record.selected().test
        return math.nan if scores is None else scores.mean_accuracy()

    def mixing(self) -> Tensor | None:
        """[N, d] merging weights of every client at the selected round; None for methods without them."""
        return self.outcome.setup.played.mixing(self.outcome.selected.state)

    def client_model(self, client: str | int) -> nn.Module:
        """The network that one client would deploy, ready to use, in evaluation mode.

        It is that of the round which validation selects: the one whose scores are reported.

        Args:
            client: Its name or index.
        """
        setup, names = self.outcome.setup, self.record.client_names
        index = _index_of(client, names)
        with one_thread():
            model = models_now(setup, self.outcome.selected)[index]
        networks = []
        for vector in members(model):
            networks.append(twin(setup.module))
            setup.layout.write(vector, networks[-1])
        return (networks[0] if isinstance(model, Tensor) else EnsembleModule(networks, model)).eval()

    def frame(self) -> pd.DataFrame:
        """One row per client: its scores at the selected and at the last round."""
        return clients_frame([self.record])

    def table(self) -> Table:
        """The run's summary; prints as Markdown."""
        return comparison_table([self.record])

    def report(self, target: Path | str, *, public: bool = False) -> Path:
        """Writes one self-contained HTML page; a public one without what tells of single clients."""
        return write_report([self.record], Path(target), public=public)


def _index_of(client: Any, names: Sequence[str]) -> int:
    if isinstance(client, str) and client in names:
        return names.index(client)
    if isinstance(client, (int, np.integer)) and not isinstance(client, bool) and 0 <= client < len(names):
        return int(client)
    raise UsageError(f"{unknown_name('client', client, names)}, or 0..{len(names) - 1}")


@dataclass(frozen=True, repr=False)
class Comparison:
    """Several methods on the same data, seeds, cohorts and local budget.

    Attributes:
        records: One per method and seed.
    """

    records: tuple[RunRecord, ...]

    def __repr__(self) -> str:
        labels = dict.fromkeys(record.label for record in self.records)
        return f"<Comparison of {', '.join(labels)}: {len(self.records)} runs>"

    def frame(self) -> pd.DataFrame:
        """One row per run."""
        return runs_frame(self.records)

    def clients_frame(self) -> pd.DataFrame:
        """One row per run and client."""
        return clients_frame(self.records)

    def table(self, reference: str | None = None) -> Table:
        """Methods with intervals and paired differences to `reference`; prints as Markdown."""
        return comparison_table(self.records, reference=reference)

    def report(self, target: Path | str, reference: str | None = None, *, public: bool = False) -> Path:
        """Writes one self-contained HTML page; a public one without what tells of single clients."""
        return write_report(self.records, Path(target), reference=reference, public=public)
