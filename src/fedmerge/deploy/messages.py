"""What server and sites say to each other, typed: a text (JSON) and tensors. Whatever arrives is checked on arrival."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from fedmerge.core.errors import FedmergeError, together
from fedmerge.core.options import build_options
from fedmerge.core.strict_json import parse_json_table
from fedmerge.core.text import brief, printable, shortened
from fedmerge.experiment.record import to_plain

T = TypeVar("T")
Kind = Literal["hello", "round", "final"]
MOST_TEXT = 1 << 24
"""Bytes of a message's text."""
MOST_NUMBER = 1 << 40
"""Of what a site counts: sums over any number of sites fit into 64 bits."""
MOST_NAME, MOST_NOTE = 200, 500
"""Letters."""


class Letter(NamedTuple):
    """One message, either way.

    Attributes:
        text: JSON.
        tensors: By name.
    """

    text: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Order:
    """What the server asks of a site.

    Attributes:
        kind: ``hello`` asks who is there, ``round`` is the one message of a round, ``final`` brings the site's model.
        run: Identity of the run.
        round: Number of the round, counted from 1; the received model is that of the round before. Of a final order the
            round that the model is of.
        client: The site's index.
        site: Its name.
        terms: What was agreed on, from `Terms.plain`.
        train: Whether to train and reply with an update.
        evaluate: Whether to score the received model on the site's own validation and test examples.
        rate: Learning rate of the round.
        base: Round after which the site kept the private state that it goes on from; 0 for none yet.
        keep: Rounds whose private state the server may still ask for; others can go.
        form: Of the received tree, see `trees.form_of`.
        seconds: After which the site's program is taken to hang; 0 for no limit.
    """

    kind: Kind
    run: str
    round: int
    client: int
    site: str
    terms: Mapping[str, Any]
    train: bool = False
    evaluate: bool = False
    rate: float = 0.0
    base: int = 0
    keep: tuple[int, ...] = ()
    form: tuple[Any, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Score:
    """How a site's model does on one split of its examples.

    Attributes:
        accuracy: Share of right answers, 0..1; None without examples.
        loss: Mean loss in nats; None without examples.
    """

    accuracy: float | None = None
    loss: float | None = None

    def fault(self) -> str | None:
        """Why it cannot be one; None if it can."""
        if self.accuracy is not None and not 0 <= self.accuracy <= 1:
            return f"got an accuracy of {self.accuracy}; expected a share, 0..1"
        return None


@dataclass(frozen=True)
class Answer:
    """What a site says beside the tensors of its update.

    Attributes:
        run: Of the order.
        round: Of the order.
        client: Of the order.
        site: The site's own name, as its ``site.toml`` says.
        num_train: Its examples; `num_validation` and `num_test` alike.
        passed: Training examples passed in this round.
        seconds: Wall time of the work without the start of the process.
        validation: Score of the received model, if that was asked for.
        test: The same on the test examples.
        moments: Sums over the site's train rows, where the scale is found from those of all sites.
        versions: Of the site's fedmerge, python and torch.
        note: Something that the server's log should say; empty for nothing.
    """

    run: str
    round: int
    client: int
    site: str
    num_train: int
    num_validation: int
    num_test: int
    passed: int = 0
    seconds: float = 0.0
    validation: Score = Score()
    test: Score = Score()
    moments: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def text_of(message: Order | Answer) -> str:
    """A message as JSON."""
    return json.dumps(to_plain(message))


def order_from(text: str) -> Order:
    """The order that a text holds.

    Raises:
        FedmergeError: naming every value that does not fit.
    """
    order = _message_from(Order, text, "order")
    if not 0 <= order.seconds <= MOST_NUMBER:
        raise FedmergeError(f"order: seconds: got {order.seconds}; expected a number, 0..{MOST_NUMBER:,}")
    return order


def answer_from(text: str) -> Answer:
    """The answer that a text holds.

    Raises:
        FedmergeError: naming every value that does not fit.
    """
    answer = _message_from(Answer, text, "answer")
    faults = [fault for fault in (answer.validation.fault(), answer.test.fault()) if fault]
    faults += [
        f"{name}: got {getattr(answer, name)}; expected a number, 0..{MOST_NUMBER:,}"
        for name in ("num_train", "num_validation", "num_test", "passed", "seconds")
        if not 0 <= getattr(answer, name) <= MOST_NUMBER
    ]
    faults += [
        f"{name}: got {brief(getattr(answer, name))}; expected {MOST_NAME} letters at most"
        for name in ("run", "site")
        if len(getattr(answer, name)) > MOST_NAME
    ]
    if faults:
        raise FedmergeError(f"answer: {together(faults)}")
    return replace(answer, note=printable(shortened(answer.note, MOST_NOTE)))


def _message_from(cls: type[T], text: str, what: str) -> T:
    if not isinstance(text, str) or len(text) > MOST_TEXT:
        raise FedmergeError(f"{what}: expected a text of at most {MOST_TEXT:,} letters")
    faults: list[str] = []
    try:
        found = build_options(cls, parse_json_table(text), what, faults)
    except ValueError as error:
        raise FedmergeError(f"{what}: not JSON: {shortened(str(error))}") from error
    if found is None:
        raise FedmergeError(together(faults))
    return found
