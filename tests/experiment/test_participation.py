"""Who is asked, who answers, who is late: draws that depend on seed and round alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import DataError, UsageError
from fedmerge.core.protocol import Update, deliver, server_models
from fedmerge.experiment.config import build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.participation import SPEED, Participation, Presence, Turnout, presence_of, turnout
from small import small
from small_federation import small as small_federation

N = 20
COUNTS = [10] * N
NAMES = [f"c{i}" for i in range(N)]


def asked(
    round_number: int = 1, fraction: float = 0.5, presence: Presence | None = None, counts: Any = None, **options: Any
) -> Turnout:
    counts = COUNTS if counts is None else counts
    return turnout(
        Participation(**options),
        fraction=fraction,
        seed=3,
        round_number=round_number,
        num_examples=counts,
        passes=counts,
        presence=presence,
    )


@pytest.mark.parametrize("sampling", ["uniform", "poisson", "weighted", "round-robin"])
def test_a_cohort_is_ascending_without_repeats_and_repeatable(sampling: Any) -> None:
    for number in range(1, 30):
        cohort = asked(number, sampling=sampling).cohort
        assert list(cohort) == sorted(set(cohort))
        assert cohort == asked(number, sampling=sampling).cohort


def test_poisson_cohorts_vary_in_size_around_the_share() -> None:
    sizes = [len(asked(number, sampling="poisson").cohort) for number in range(1, 401)]
    assert len(set(sizes)) > 5
    assert abs(sum(sizes) / len(sizes) - 10) < 0.5  # standard error √(20·¼)/20 = 0.11


def test_round_robin_asks_everybody_equally_often() -> None:
    times = [i for number in range(1, 5) for i in asked(number, sampling="round-robin").cohort]
    assert [times.count(i) for i in range(N)] == [2] * N


def test_weighted_sampling_prefers_large_clients() -> None:
    counts = [100] * 2 + [1] * 18
    times = [i for n in range(1, 101) for i in asked(n, 0.1, sampling="weighted", counts=counts).cohort]
    assert times.count(0) + times.count(1) > 150  # of 200 places; uniform sampling would give them 20


def test_drop_outs_are_a_share_of_the_cohort() -> None:
    rounds = [asked(number, 1.0, dropout=0.25) for number in range(1, 201)]
    dropped = sum(len(one.dropped) for one in rounds)
    assert abs(dropped / (200 * N) - 0.25) < 0.03  # four standard errors
    assert all(one.dropped <= set(one.cohort) for one in rounds)
    assert all(set(one.training) == set(one.cohort) - one.dropped for one in rounds)


def test_the_quorum_is_a_share_of_those_asked_rounded_up_and_one_at_least() -> None:
    assert asked(quorum=0.25).quorum == 3  # of 10
    assert asked(quorum=0.0).quorum == 1


def test_who_is_slow_is_late_in_every_round() -> None:
    late = [asked(number, 1.0, deadline=10 / SPEED, spread=1.0).late for number in range(1, 6)]
    assert len(set(late)) == 1
    assert 0 < len(late[0]) < N
    assert asked(1, 1.0, deadline=10 / SPEED).late == frozenset()  # everybody needs exactly the deadline


def test_a_round_takes_as_long_as_its_slowest_client_or_the_deadline() -> None:
    assert asked(1, 1.0, deadline=60.0).seconds == 10 / SPEED
    assert asked(1, 1.0, deadline=60.0, dropout=0.5).seconds == 60.0
    assert asked(1, 1.0).seconds is None


def test_clients_of_a_day_sleep_for_their_share_of_it() -> None:
    there = [asked(n, 1.0, availability="diurnal", awake=0.25, day=8).cohort for n in range(1, 9)]
    times = [i for cohort in there for i in cohort]
    assert [times.count(i) for i in range(N)] == [2] * N
    assert len(set(there)) > 1


# ------------------------------------------------------------------------------------------------ traces


def trace(tmp_path: Path, text: str) -> Presence:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    found = presence_of(Participation(availability=str(path)), NAMES)
    assert found is not None
    return found


def test_a_trace_says_who_joins_leaves_and_comes_back(tmp_path: Path) -> None:
    found = trace(tmp_path, "client,from,to\nc0,1,\nc1,3,4\nc1,7,7\n")
    there = {number: asked(number, 1.0, found).cohort for number in range(1, 9)}
    assert there == {1: (0,), 2: (0,), 3: (0, 1), 4: (0, 1), 5: (0,), 6: (0,), 7: (0, 1), 8: (0,)}


def test_a_round_without_anybody_has_an_empty_cohort(tmp_path: Path) -> None:
    assert asked(5, 0.5, trace(tmp_path, "client,from,to\nc0,1,4\n")).cohort == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", None),
        ("client;from;to\n", "line 1: got"),
        ("client,from,to\nnobody,1,2\n", "line 2: unknown client 'nobody'"),
        ("client,from,to\nc0,0,2\n", "line 2: got '0' for a round; expected a whole number, 1 or more"),
        ("client,from,to\nc0,one,2\n", "line 2: got 'one' for a round"),
        ("client,from,to\nc0,3,2\n", "line 2: got from 3 to 2; expected the first round before the last"),
        ("client,from,to\nc0,1\n", "line 2: got 2 values; expected client, from, to"),
        ('client,from,to\n"c0,1\n', "is not a CSV file"),
    ],
)
def test_a_damaged_trace_is_named_with_its_line(tmp_path: Path, text: str, told: str | None) -> None:
    if told is None:
        assert not any(trace(tmp_path, text).there(1))
        return
    with pytest.raises(DataError, match=r"trace\.csv") as error:
        trace(tmp_path, text)
    assert told in str(error.value)


def test_a_trace_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"participation\.availability: got 'diurnall'; expected 'always', 'diurnal' or"
    ):
        presence_of(Participation(availability="diurnall"), NAMES)


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(UsageError) as error:
        Participation(spread=1.0, day=7)
    assert str(error.value).splitlines() == [
        "Participation.day: got 7, which has no effect without availability='diurnal'; leave it out",
        "Participation.spread: got 1.0, which has no effect without a deadline; leave it out",
    ]


# ------------------------------------------------------------------------------------------------ in a run


def test_late_replies_are_refused_and_recorded() -> None:
    record = execute_config(
        build_config(small(rounds=2, participation={"deadline": 0.02, "spread": 2.0, "quorum": 0.0}))
    ).record
    first = record.rounds[1]
    assert {refusal["reason"] for refusal in first.refused} == {"late"}
    assert first.virtual_seconds == 0.02


def test_a_client_that_joins_after_the_split_gets_a_row_from_those_it_resembles() -> None:
    federation = small_federation()
    method: Any = ALGORITHMS["fedmerge"].cls(num_models=2, search_rounds=2)
    state, _ = federation.begin(method)
    P = state.soup.models.shape[1]
    ways = torch.zeros(2, P, dtype=torch.float64)
    ways[0, 0], ways[1, 1] = 1.0, 1.0
    five = torch.tensor([0, 1, 2, 3, 4])
    for _ in range(3):
        state = deliver(method, state, five, Update(ways[torch.tensor([0, 0, 0, 1, 1])]), torch.full((5,), 10))
    assert int(state.seen[5]) == -1
    state = deliver(method, state, torch.tensor([5]), Update(ways[1:]), torch.tensor([10]))
    weights = method.mixing(state)
    assert int(weights[5].argmax()) == int(weights[3].argmax()) != int(weights[0].argmax())
    gone = deliver(method, state, five[:3], Update(ways[[0, 0, 0]]), torch.full((3,), 10))
    assert torch.equal(method.mixing(gone)[5], weights[5])  # away for a round, it keeps its row


def test_a_model_whose_clients_are_all_away_stays_where_it_is() -> None:
    federation = small_federation()
    method: Any = ALGORITHMS["oracle"].cls()
    state, _ = federation.begin(method)
    models = server_models(state)
    assert models is not None
    update = Update(torch.ones(2, models.shape[1], dtype=torch.float64))
    after = server_models(deliver(method, state, torch.tensor([0, 1]), update, torch.tensor([5, 5])))  # both of group 0
    assert after is not None
    assert [bool(torch.equal(after[j], models[j])) for j in (0, 1)] == [False, True]
