"""The result of one run as one line of text: everything the page is made from, and no model."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedmerge.core.errors import DivergedError, FedmergeError, together
from fedmerge.core.options import build_options
from fedmerge.experiment.config import Config, method_options
from fedmerge.experiment.record import RunRecord, Scores, to_plain
from fedmerge.experiment.store import versions
from fedmerge.report.costs import costs
from fedmerge.report.statistics import FloatArray, recovery

DIGITS = 5
Values = tuple[float | None, ...]


@dataclass(frozen=True)
class Result:
    """One finished or diverged run.

    Attributes:
        key: Hash of the resolved configuration.
        request: Hash of the configuration as asked for.
        setting: Key.
        label: Of the method.
        seed: Of the run.
        stage: ``tuning`` or ``report``; a tuning run keeps its validation accuracy only.
        method: Registered name.
        options: The method's own, resolved, with a ``training`` table.
        status: A diverged run has no scores.
        message: Why it diverged.
        versions: Of fedmerge, python, torch, numpy and the machine.
        selected_round: The evaluated round with the best validation accuracy.
        last_round: The last evaluated round.
        validation: [N] accuracy at the selected round; None for a client without items.
        validation_loss: [N] in nats.
        test: [N] accuracy at the selected round.
        test_loss: [N] in nats.
        last_test: [N] accuracy at the last round.
        num_test: [N] test items.
        bytes_down: Per client and round, mean over rounds.
        bytes_up: Per client and round.
        forward: Examples passed forward per round, all clients together.
        backward: Examples passed backward per round.
        server_floats: Numbers that the server keeps, at most.
        num_params: P.
        seconds: Wall time of the run.
        state: What the method says of its state at the end.
        recovery: Adjusted Rand index of the heaviest models against the true groups, where both exist.
        data_sha256: Of the items and their split.
    """

    key: str
    request: str
    setting: str
    label: str
    seed: int
    stage: Literal["tuning", "report"]
    method: str
    options: dict[str, Any]
    status: Literal["finished", "diverged"]
    message: str
    versions: dict[str, Any]
    selected_round: int | None = None
    last_round: int | None = None
    validation: Values = ()
    validation_loss: Values = ()
    test: Values = ()
    test_loss: Values = ()
    last_test: Values = ()
    num_test: tuple[int, ...] = ()
    bytes_down: float | None = None
    bytes_up: float | None = None
    forward: float | None = None
    backward: float | None = None
    server_floats: float | None = None
    num_params: int | None = None
    seconds: float | None = None
    state: dict[str, Any] | None = None
    recovery: float | None = None
    data_sha256: str = ""

    def tuning_score(self) -> float:
        """Mean validation accuracy over clients, as tuning counts it: 0 for a diverged run."""
        return 0.0 if self.status == "diverged" else mean_of(self.validation)

    def accuracies(self) -> FloatArray:
        """[N] test accuracy at the selected round, NaN for clients without test items."""
        return as_array(self.test)

    def bytes_per_round(self) -> float:
        """Down and up, per client and round; NaN if nothing is known."""
        return as_number(self.bytes_down) + as_number(self.bytes_up)


def as_number(value: float | None) -> float:
    """NaN for None."""
    return math.nan if value is None else value


def as_array(values: Sequence[float | None]) -> FloatArray:
    """NaN for None."""
    return np.array([as_number(value) for value in values], dtype=np.float64)


def mean_of(values: Sequence[float | None]) -> float:
    """Mean of those that are known; NaN without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class Ticket:
    """Whose result it is."""

    key: str
    request: str
    setting: str
    label: str
    seed: int
    stage: Literal["tuning", "report"]


def finished(ticket: Ticket, record: RunRecord) -> Result:
    """The result of a run that came to its end."""
    selected, last, cost = record.selected(), record.last(), costs(record)
    found = None
    if record.groups is not None and selected.mixing is not None:
        found = recovery(np.array(selected.mixing), record.groups)
    result = Result(
        **dataclasses.asdict(ticket),
        method=record.method,
        options=dict(record.options),
        status="finished",
        message="",
        versions=dict(record.versions),
        selected_round=selected.round,
        last_round=last.round,
        validation=_accuracy(selected.validation),
        validation_loss=_loss(selected.validation),
        test=_accuracy(selected.test),
        test_loss=_loss(selected.test),
        last_test=_accuracy(last.test),
        num_test=record.num_test,
        bytes_down=cost.bytes_down,
        bytes_up=cost.bytes_up,
        forward=cost.forward,
        backward=cost.backward,
        server_floats=cost.server_floats,
        num_params=record.num_params,
        seconds=round(cost.seconds, 2),
        state=to_plain(last.state),
        recovery=found,
        data_sha256=record.data_sha256,
    )
    return result if ticket.stage == "report" else without_test(result)


def without_test(result: Result) -> Result:
    """What a tuning run is kept for: its validation accuracy. Nothing that is not there can take part in a choice."""
    return dataclasses.replace(result, validation_loss=(), test=(), test_loss=(), last_test=(), num_test=())


def diverged(ticket: Ticket, config: Config, error: FedmergeError, method: str, seconds: float) -> Result:
    """The result of a run whose numbers left the finite."""
    return Result(
        **dataclasses.asdict(ticket),
        method=method,
        options=method_options(config.method, config.training),
        status="diverged",
        message=str(error),
        versions=versions(),
        seconds=round(seconds, 2),
    )


def is_divergence(error: Exception) -> bool:
    """Whether an error says that training diverged, and not that the request or the data is at fault."""
    return isinstance(error, DivergedError)


def _rounded(values: Values) -> Values:
    return tuple(None if value is None else round(value, DIGITS) for value in values)


def _accuracy(scores: Scores | None) -> Values:
    return () if scores is None else _rounded(scores.accuracy)


def _loss(scores: Scores | None) -> Values:
    return () if scores is None else _rounded(scores.loss)


def to_line(result: Result) -> str:
    """One line of JSON without its line break; non-finite numbers become null."""
    return json.dumps(to_plain(result), separators=(",", ":"))


def from_plain(plain: Mapping[str, Any], where: str) -> Result:
    """A result from what a line holds.

    Raises:
        FedmergeError: naming `where` and every value that does not fit.
    """
    faults: list[str] = []
    result = build_options(Result, plain, where, faults)
    if result is None:
        raise FedmergeError(together(faults))
    return result
