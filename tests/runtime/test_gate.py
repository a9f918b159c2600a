"""The gate for replies: a bad one is refused whole, by name, and changes nothing."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import FedmergeError
from fedmerge.core.protocol import Update
from fedmerge.core.replies import (
    LARGEST,
    MOST_EXAMPLES,
    REASONS,
    Expected,
    Refusal,
    Reply,
    admit,
    fault_of,
    named_tensors,
    reasons_text,
    stacked_updates,
    template_of,
)
from fedmerge.experiment.config import build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.runtime import Meeting, run_round
from fedmerge.runtime.rounds import refuse_divergence

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "faults"))

from replies import KINDS, SPOILERS, bits, check, outcome, permutations, world

from small import small
from small_federation import small as small_federation

DELTA = torch.arange(4.0)
EXPECTED = Expected("r", 2, frozenset({0, 1, 2}), template_of(Update(DELTA)), late=frozenset({2}))
GOOD = Reply("r", 2, 1, 5, {"delta": DELTA})


def refused(**changes: Any) -> Refusal:
    found = fault_of(replace(GOOD, **changes), EXPECTED)
    assert found is not None
    return found


def test_a_good_reply_is_admitted() -> None:
    assert fault_of(GOOD, EXPECTED) is None
    assert admit([GOOD], EXPECTED) == ((GOOD,), ())


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"run": "other"}, "run", "got run 'other'; expected 'r'"),
        ({"run": None}, "run", "got run None; expected 'r'"),
        ({"round": 1}, "round", "got round 1; expected 2"),
        ({"round": 2.0}, "round", "got round 2.0; expected 2"),
        ({"client": 3}, "client", "got client 3; expected one of the 3 that were asked"),
        ({"client": True}, "client", "got client True; expected one of the 3 that were asked"),
        ({"client": 2}, "late", "the reply came after the deadline of the round"),
        ({"num_examples": 0}, "count", f"got 0 examples; expected a whole number, 1..{MOST_EXAMPLES}"),
        ({"num_examples": True}, "count", f"got True examples; expected a whole number, 1..{MOST_EXAMPLES}"),
        ({"num_examples": 10**9 + 1}, "count", "got 1000000001 examples; expected a whole number, 1..1000000000"),
        ({"tensors": None}, "malformed", "got None for the update; expected tensors by name"),
        ({"tensors": {}}, "names", "got tensors []; expected delta"),
        ({"tensors": {"delta": DELTA, "x": DELTA}}, "names", "got tensors ['delta', 'x']; expected delta"),
        ({"tensors": {"delta": [0.0] * 4}}, "malformed", "delta: got 'list'; expected a dense tensor"),
        ({"tensors": {"delta": DELTA.to_sparse()}}, "malformed", "delta: got 'Tensor'; expected a dense tensor"),
        ({"tensors": {"delta": DELTA.to("meta")}}, "malformed", "delta: got 'Tensor'; expected a dense tensor"),
        ({"tensors": {"delta": DELTA.double()}}, "dtype", "delta: got torch.float64; expected torch.float32"),
        ({"tensors": {"delta": DELTA[:1]}}, "shape", "delta: got shape [1]; expected [4]"),
        ({"tensors": {"delta": DELTA / 0}}, "values", "delta: got NaN, infinite values or values beyond ±1e+12"),
        ({"tensors": {"delta": DELTA * LARGEST}}, "values", "delta: got NaN, infinite values or values beyond ±1e+12"),
    ],
)  # fmt: skip
def test_a_bad_reply_is_refused_with_the_reason(changes: dict[str, Any], reason: str, detail: str) -> None:
    found = refused(**changes)
    assert (found.reason, found.detail) == (reason, detail)
    assert reason in REASONS


def test_limits_themselves_are_admitted() -> None:
    edge = torch.tensor([LARGEST, -LARGEST, 0.0, 1.0])
    assert fault_of(replace(GOOD, num_examples=MOST_EXAMPLES, tensors={"delta": edge}), EXPECTED) is None
    assert fault_of(replace(GOOD, num_examples=1), EXPECTED) is None


def test_a_refusal_names_its_sender_where_one_can_be_read() -> None:
    assert refused(round=7).client == 1
    assert refused(client="1").client is None


def test_a_foreign_value_is_short_and_printable_in_the_refusal() -> None:
    found = refused(run="\x1b[2J" + "x" * 500)
    assert found.detail.isprintable()
    assert len(found.detail) < 120


def test_a_number_too_long_to_write_down_is_refused_and_not_an_error() -> None:
    assert refused(num_examples=10**5000).detail.startswith("got a int too large to show examples; expected")


def test_the_second_reply_of_a_client_is_a_duplicate_and_the_first_stays() -> None:
    other = replace(GOOD, tensors={"delta": 2 * DELTA})
    found = admit([GOOD, other], EXPECTED)
    assert found.admitted == (GOOD,)
    assert [refusal.reason for refusal in found.refusals] == ["duplicate"]


def test_a_refused_reply_leaves_its_client_another_try() -> None:
    found = admit([replace(GOOD, num_examples=-1), GOOD], EXPECTED)
    assert found.admitted == (GOOD,)


def test_admitted_replies_are_in_client_order() -> None:
    found = admit([GOOD, replace(GOOD, client=0)], EXPECTED)
    assert [reply.client for reply in found.admitted] == [0, 1]
    assert stacked_updates(found.admitted, EXPECTED.template).delta.shape == (2, 4)


def test_reasons_are_counted() -> None:
    some = [Refusal(1, "late", ""), Refusal(2, "values", ""), Refusal(3, "values", "")]
    assert reasons_text(some) == "2 values, 1 late"


# ------------------------------------------------------------------------------------------------ what methods demand


def test_a_model_that_does_not_exist_is_refused() -> None:
    method: Any = ALGORITHMS["ifca"].cls(num_models=3)
    expected = replace(EXPECTED, template=template_of((DELTA, torch.tensor(0))), further=method.check_reply)
    assert expected.further is not None
    assert expected.further({"model": torch.tensor(2)}) is None
    assert expected.further({"model": torch.tensor(3)}) == "model: got 3; expected 0..2"
    assert expected.further({"model": torch.tensor(-1)}) == "model: got -1; expected 0..2"


@pytest.mark.parametrize("weights", [[1.5, -0.5], [1.0, 1.0], [0.0, 0.0]])
def test_importance_that_is_no_share_is_refused(weights: list[float]) -> None:
    method: Any = ALGORITHMS["fedsoft"].cls(num_models=2)
    told = method.check_reply({"importance": torch.tensor(weights)})
    assert told == "importance: got weights that are negative or do not sum to 1"
    assert method.check_reply({"importance": torch.tensor([0.25, 0.75])}) is None
    assert method.check_reply({"importance": torch.tensor([])}) is None


# ------------------------------------------------------------------------------------------------ in a round


def played(method: str, transit: Any = None, **meeting: Any) -> Any:
    federation = small_federation()
    algorithm = ALGORITHMS[method].cls()
    state, fleet = federation.begin(algorithm)
    everyone = torch.arange(6)
    asked = Meeting(everyone, meeting.pop("trained", everyone), transit=transit, **meeting)
    steps = federation.batches(asked.trained.tolist(), 1)
    return state, fleet, run_round(
        algorithm, state, fleet, asked, steps, federation.counts[asked.trained], federation.engine()
    )  # fmt: skip


def poisoned(replies: Any) -> Any:
    bad = replace(replies[1], tensors={name: t * float("nan") for name, t in replies[1].tensors.items()})
    return [bad, *replies[:1], *replies[2:]]


@pytest.mark.parametrize("method", sorted(ALGORITHMS))
def test_a_poisoned_reply_is_as_if_its_client_had_not_answered(method: str) -> None:
    _, _, with_bad = played(method, poisoned)
    _, _, without = played(method, trained=torch.tensor([0, 2, 3, 4, 5]))
    if not with_bad.refusals:  # nothing that could be NaN travels
        assert method == "local"
        return
    assert bits(with_bad.state) == bits(without.state)
    assert with_bad.admitted == without.admitted == (0, 2, 3, 4, 5)
    assert [(refusal.client, refusal.reason) for refusal in with_bad.refusals] == [(1, "values")]
    for ours, theirs in zip(with_bad.fleet.private, without.fleet.private, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(leaves(ours), leaves(theirs), strict=True))


def leaves(tree: Any) -> list[Tensor]:
    return list(named_tensors(tree).values())


@pytest.mark.parametrize("method", sorted(ALGORITHMS))
def test_who_answers_first_is_irrelevant(method: str) -> None:
    _, _, straight = played(method)
    _, _, mixed = played(method, lambda replies: [replies[k] for k in (3, 0, 5, 1, 4, 2)])
    assert bits(straight.state) == bits(mixed.state)


def test_below_the_quorum_a_round_is_abandoned_and_nothing_changes() -> None:
    state, fleet, result = played("fedmerge", trained=torch.tensor([0, 3]), quorum=3)
    assert result.abandoned
    assert result.state is state
    assert result.fleet is fleet
    _, _, enough = played("fedmerge", trained=torch.tensor([0, 3, 4]), quorum=3)
    assert not enough.abandoned


def test_a_round_that_nobody_answers_is_abandoned() -> None:
    state, _, result = played("fedavg", trained=torch.tensor([], dtype=torch.int64))
    assert result.abandoned
    assert result.state is state


def test_one_client_that_diverges_is_left_out_and_most_are_an_error() -> None:
    refusals = [Refusal(i, "values", "") for i in (4, 1, 3)]
    refuse_divergence(refusals, 6)
    with pytest.raises(FedmergeError, match=r"clients \[1, 3, 4\] sent NaN or infinite values"):
        refuse_divergence(refusals, 5)
    refuse_divergence([Refusal(i, "count", "") for i in range(5)], 5)


# ------------------------------------------------------------------------------------------------ many


@pytest.mark.parametrize("kind", KINDS)
def test_generated_bad_replies_change_nothing(kind: str) -> None:
    case = world(0)
    assert [check(case, kind, np.random.default_rng([n, 7])) for n in range(20)] == [None] * 20


def test_no_order_of_arrival_changes_a_bit() -> None:
    assert permutations(50) == 1


class Rounds(RuleBasedStateMachine):
    """A server that hears honest clients and others; it must be where the honest ones alone would have brought it."""

    def __init__(self) -> None:
        super().__init__()
        self.case = world(2)
        self.sent: list[Reply] = []
        self.honest: dict[int, Reply] = {}
        self.expected: list[str] = []

    @rule(client=st.integers(0, 3))
    def an_honest_reply(self, client: int) -> None:
        self.sent.append(self.case.replies[client])
        if client in self.honest:
            self.expected.append("duplicate")
        self.honest.setdefault(client, self.case.replies[client])

    @rule(client=st.integers(0, 3), kind=st.sampled_from(sorted(SPOILERS)), seed=st.integers(0, 1000))
    def a_bad_one(self, client: int, kind: str, seed: int) -> None:
        bad, reason = SPOILERS[kind](self.case.replies[client], np.random.default_rng(seed))
        self.sent.append(bad)
        known = client in self.honest and reason not in ("run", "round", "client", "late")
        self.expected.append("duplicate" if known else reason)

    @invariant()
    def only_the_honest_count(self) -> None:
        state, reasons = outcome(self.case, self.sent)
        wanted, _ = outcome(self.case, list(self.honest.values()))
        assert bits(state) == bits(wanted)
        assert list(reasons) == self.expected


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=30, stateful_step_count=15, deadline=None, derandomize=True)


# ------------------------------------------------------------------------------------------------ in a run


def test_refusals_and_drop_outs_are_in_the_record(caplog: pytest.LogCaptureFixture) -> None:
    table = small(rounds=3, participation={"dropout": 0.4}, attack={"kind": "nan", "share": 0.4})
    with caplog.at_level(logging.WARNING):
        record = execute_config(build_config(table)).record
    rounds = record.rounds[1:]
    assert any(line.dropped for line in rounds)
    assert {refusal["reason"] for line in rounds for refusal in line.refused} == {"values"}
    assert "replies refused" in caplog.text
    for line in rounds:
        assert not {refusal["client"] for refusal in line.refused} & set(line.dropped)


def test_abandoned_rounds_are_told_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    table = small(rounds=2, participation={"dropout": 0.5, "quorum": 1.0})
    with caplog.at_level(logging.WARNING):
        record = execute_config(build_config(table)).record
    assert [line.abandoned for line in record.rounds] == [False, True, True]
    assert "abandoned" in caplog.text
    assert record.rounds[0].test == record.rounds[2].test
