"""How small a crowd each client of a run can read: numbers from the records alone, see `fedmerge.core.crowd`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedmerge.core.crowd import SMALL, Crowd, crowd
from fedmerge.core.errors import DataError, UsageError
from fedmerge.experiment.record import RoundRecord, RunRecord
from fedmerge.report.statistics import FloatArray

Kind = Literal["weights", "one model", "nothing shared", "unknown"]
_DECIMALS = 9
_WORK = 500_000_000
"""Pairs of clients over all rounds above which the crowds of single rounds are not computed (some 10 seconds)."""


@dataclass(frozen=True)
class Privacy:
    """What a run's merging weights say of its clients' crowds.

    Attributes:
        run: The run.
        kind: ``weights``: read off the merging weights. ``one model``: everybody gets the same model, which is a crowd
            of all others. ``nothing shared``: no client gets anything of another. ``unknown``: the method moves
            several models and its records do not tell how much each client counts in each.
        round: The last evaluated one, whose weights these are.
        found: Crowd among all clients; None where nothing is shared or known.
        smallest: [N] smallest K_eff among the clients whose replies counted in a round, of all rounds in which a
            client's did, with the weights of the last evaluated round before each; NaN for a client without such a
            round or with nobody to read there. None where `found` is, where no round was trained, or where it would
            take too long.
    """

    run: RunRecord
    kind: Kind
    round: int
    found: Crowd | None
    smallest: FloatArray | None

    @property
    def effective(self) -> FloatArray:
        """[N] K_eff among all clients, to nine decimals so that 5 is not below 5; NaN where there is nobody to read.

        Raises:
            UsageError: where it is not known.
        """
        return np.asarray(known(self).effective.numpy().round(_DECIMALS))

    @property
    def small(self) -> tuple[int, ...]:
        """Clients whose crowd is below `SMALL`, the smallest first."""
        values = self.effective
        return tuple(i for i in self.order if values[i] < SMALL)

    @property
    def order(self) -> tuple[int, ...]:
        """All clients, the smallest crowd first, those that can read nobody last; equal ones as they come."""
        return tuple(int(i) for i in np.argsort(self.effective, kind="stable"))


def privacy(run: RunRecord, *, rounds: bool = True) -> Privacy:
    """The crowds of a run at its last evaluated round.

    Examples count as the records have them; a method that caps or weighs them otherwise, momentum and shrinkage are not
    in these numbers. Merging weights of groups of layers count with their mean.

    Args:
        run: Any run.
        rounds: Whether to look at the cohorts of single rounds, too.

    Raises:
        FedmergeError: if the run was stopped before its first evaluation, or a cohort has clients that are not there.
    """
    record = run.last()
    kind = _kind(record)
    rows = _rows(run, record, kind)
    if rows is None:
        return Privacy(run, kind, record.round, None, None)
    found = crowd(rows, torch.tensor(run.num_train))
    return Privacy(run, kind, record.round, found, _smallest(run, kind) if rounds else None)


def known(given: Privacy) -> Crowd:
    """The crowds.

    Raises:
        UsageError: where there are none, saying why.
    """
    if given.found is None:
        raise UsageError(f"run {given.run.label!r} (seed {given.run.seed}): {why_none(given)}; there is no table of it")
    return given.found


def why_none(given: Privacy) -> str:
    """Why there are no crowds, in words."""
    method = given.run.method
    if given.kind == "nothing shared":
        return f"method {method} shares nothing, so no client learns anything of another's update from its models"
    return (
        f"the records of method {method} do not say how much each client counts in what others receive: how small its "
        "crowds are is not known, and they may be as small as one"
    )


def _kind(record: RoundRecord) -> Kind:
    if record.mixing is not None:
        return "weights"
    kinds: dict[object, Kind] = {0: "nothing shared", 1: "one model"}
    return kinds.get(record.state.get("num_models"), "unknown")


def _rows(run: RunRecord, record: RoundRecord, kind: Kind) -> Tensor | None:
    """[N, d] merging weights that a round was recorded with; one column of ones for one model."""
    if kind == "one model":
        return torch.ones(len(run.client_names), 1, dtype=torch.float64)
    return None if record.mixing is None else torch.tensor(record.mixing, dtype=torch.float64)


def _smallest(run: RunRecord, kind: Kind) -> FloatArray | None:
    """[N] smallest K_eff over the rounds; None without any, or if it would take too long."""
    pairs = _weights_and_cohorts(run, kind)
    if not pairs or sum(len(cohort) ** 2 for _, cohort in pairs) > _WORK:
        return None
    smallest, examples = np.full(len(run.client_names), np.nan), torch.tensor(run.num_train)
    for (_, cohort), record in pairs.items():
        members, rows = _members(run, cohort), _rows(run, record, kind)
        if rows is not None:
            found = crowd(rows[members], examples[members])
            smallest[members] = np.fmin(smallest[members], found.effective.numpy())
    return smallest.round(_DECIMALS)


def _members(run: RunRecord, cohort: tuple[int, ...]) -> list[int]:
    total = len(run.client_names)
    if not all(0 <= client < total for client in cohort):
        raise DataError(
            f"run {run.label!r} (seed {run.seed}): got a cohort with client {max(cohort)}; expected 0..{total - 1}: "
            "its rounds.jsonl is not of this run"
        )
    return list(cohort)


def _replied(record: RoundRecord) -> tuple[int, ...]:
    """The clients of the cohort whose replies moved the models."""
    if record.abandoned:
        return ()
    missing = {*record.dropped, *(told.get("client") for told in record.refused if told.get("reason") != "duplicate")}
    return tuple(client for client in record.cohort if client not in missing)


def _weights_and_cohorts(run: RunRecord, kind: Kind) -> dict[tuple[int, tuple[int, ...]], RoundRecord]:
    """(round of the weights, who replied) of every trained round, once each, with the record that has the weights."""
    pairs: dict[tuple[int, tuple[int, ...]], RoundRecord] = {}
    latest = run.rounds[0] if kind == "one model" else None
    for record in run.rounds:
        replied = _replied(record)
        if latest is not None and replied:
            pairs.setdefault((latest.round, replied), latest)
        if record.mixing is not None:
            latest = record
    return pairs
