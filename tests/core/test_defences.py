"""What is cut of a reply, what passes bit for bit, and who decides."""

import math

import pytest
import torch
from safetensors.torch import load, save

from fedmerge.algorithms import ALGORITHMS
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.core.defences import Defences, Guarded, guarded, upper_median
from fedmerge.core.errors import UsageError
from fedmerge.core.options import option_fields
from fedmerge.core.protocol import (
    Federation,
    Update,
    deliver,
    innermost,
    server_models,
    state_tensors,
    with_server_models,
    with_tensors,
)
from small_federation import small

N, T, P = 9, 4, 6


def facts(num_clients=N):
    return Federation(num_clients, T, (2, 4), ((0, 2), (2, 4)))


def draw(j):
    return torch.linspace(-1, 1, P, dtype=torch.float64) + j


def begin(defences, method=None, num_clients=N):
    algorithm = Guarded(method or FedAvg(), defences)
    return algorithm, algorithm.init(draw, facts(num_clients), 0)


def updates(lengths, buffers=0.5):
    """Trainable parts of these lengths, each along its own axis or the last, and buffers of one length."""
    delta = torch.zeros(len(lengths), P, dtype=torch.float64)
    for i, length in enumerate(lengths):
        delta[i, min(i, T - 1)] = length
    delta[:, T] = buffers
    return Update(delta)


def counts(*numbers):
    return torch.tensor(numbers)


def same(left, right):
    a, b = state_tensors(innermost(left)), state_tensors(innermost(right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- cutting


def test_an_update_is_cut_to_the_limit_and_the_others_stay():
    algorithm, state = begin(Defences(clip=3.0, max_count=0))
    after = deliver(algorithm, state, torch.arange(5), updates([1.0, 1.0, 1.0, 1.0, 100.0]), torch.full((5,), 7))
    believed = updates([1.0, 1.0, 1.0, 1.0, 3.0])  # median length 1, times clip 3
    expected = deliver(FedAvg(), state.method, torch.arange(5), believed, torch.full((5,), 7))
    torch.testing.assert_close(after.method.models, expected.models, rtol=0, atol=1e-15)
    assert after.clipped.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_cutting_in_place_gives_the_same_bits_and_only_then_changes_what_was_sent():
    sizes, sent, lent = torch.full((5,), 7), updates([1.0] * 4 + [100.0]), updates([1.0] * 4 + [100.0])
    algorithm, state = begin(Defences(clip=3.0, max_count=0))
    frugal = Guarded(FedAvg(), algorithm.defences, in_place=True)
    copied = deliver(algorithm, state, torch.arange(5), sent, sizes)
    assert same(copied, deliver(frugal, state, torch.arange(5), lent, sizes))
    assert torch.equal(sent.delta, updates([1.0] * 4 + [100.0]).delta)
    assert torch.equal(lent.delta, updates([1.0] * 4 + [3.0]).delta)


def test_buffers_are_cut_by_their_own_length():
    algorithm, state = begin(Defences(clip=3.0, max_count=0))
    sent = updates([1.0] * 5)
    sent.delta[4, T] = 50.0  # the others' buffers have length 0.5
    after = deliver(algorithm, state, torch.arange(5), sent, torch.full((5,), 7))
    believed = updates([1.0] * 5)
    believed.delta[4, T] = 1.5
    expected = deliver(FedAvg(), state.method, torch.arange(5), believed, torch.full((5,), 7))
    torch.testing.assert_close(after.method.models, expected.models, rtol=0, atol=1e-15)


def test_numbers_of_examples_are_cut_to_the_limit():
    algorithm, state = begin(Defences(clip=0, max_count=2.0))
    sent = updates([1.0, 1.0, 1.0, 1.0, 1.0])
    after = deliver(algorithm, state, torch.arange(5), sent, counts(10, 12, 14, 28, 10**9))
    expected = deliver(FedAvg(), state.method, torch.arange(5), sent, counts(10, 12, 14, 28, 28))  # 2 x median 14
    assert torch.equal(after.method.models, expected.models)
    assert after.capped.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_who_counts_twice_may_send_half_as_much():
    algorithm, state = begin(Defences(clip=3.0, max_count=2.0))
    sizes = counts(10, 10, 10, 10, 20)
    after = deliver(algorithm, state, torch.arange(5), updates([1.0, 1.0, 1.0, 1.0, 2.9]), sizes)
    expected = deliver(FedAvg(), state.method, torch.arange(5), updates([1.0, 1.0, 1.0, 1.0, 1.5]), sizes)
    torch.testing.assert_close(after.method.models, expected.models, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_in_which_nothing_is_cut_is_the_undefended_one_bit_for_bit(dtype):
    federation = small(dtype)
    defences = Defences(clip=1e6, max_count=1e6)
    for method in (FedAvg(server_momentum=0.5), FedMerge(num_models=2)):
        bare, _ = federation.play(method, 6)
        watched, _ = federation.play(Guarded(method, defences), 6)
        assert int(watched.clipped.sum() + watched.capped.sum()) == 0
        assert same(bare, watched)


def test_a_run_would_notice_that_something_is_cut():
    federation = small()
    bare, _ = federation.play(FedAvg(), 2)
    watched, _ = federation.play(Guarded(FedAvg(), Defences(clip=1.0, max_count=0)), 2)
    assert int(watched.clipped.sum()) > 0
    assert not same(bare, watched)


# ---------------------------------------------------------------- the median


@pytest.mark.parametrize("honest", [2, 3, 5, 8])
def test_fewer_than_half_cannot_move_the_median_beyond_what_honest_clients_send(honest):
    rng = torch.Generator().manual_seed(honest)
    values = torch.rand(honest, generator=rng)
    for liars in range(honest):
        for lie in (0.0, 1e12):
            median = upper_median(torch.cat([values, torch.full((liars,), lie)]))
            assert values.min() <= median <= values.max()


def test_one_vote_each_small_cohorts_look_back():
    """Cohorts of one: an attacker that is asked in every other round still has one vote of many."""
    algorithm, state = begin(Defences(clip=3.0, max_count=0))
    for client in (0, 1, 2, 3):
        state = deliver(algorithm, state, torch.tensor([client]), updates([1.0]), counts(5))
    before = state.method.models
    for _ in range(5):
        state = deliver(algorithm, state, torch.tensor([8]), updates([1000.0]), counts(5))
    moved = float((state.method.models - before)[:, :T].norm())
    assert moved == pytest.approx(5 * 3.0)  # five rounds of the longest update that is believed
    assert state.clipped.tolist() == [0] * 8 + [5]


def test_the_first_two_clients_of_a_run_are_believed():
    """One or two have no majority; the larger of two values is the median."""
    algorithm, state = begin(Defences(clip=1.0, max_count=1.0))
    for client, length in ((0, 1.0), (1, 50.0)):
        state = deliver(algorithm, state, torch.tensor([client]), updates([length]), counts(5))
    assert int(state.clipped.sum()) == 0


def test_the_limit_follows_updates_that_become_shorter():
    algorithm, state = begin(Defences(clip=3.0, max_count=0))
    for length in (100.0, 10.0, 1.0):
        state = deliver(algorithm, state, torch.arange(5), updates([length] * 5), torch.full((5,), 7))
    after = deliver(algorithm, state, torch.arange(5), updates([1.0] * 4 + [10.0]), torch.full((5,), 7))
    assert after.clipped[4] == 1


def test_only_the_latest_replies_vote_where_there_are_many():
    algorithm, state = begin(Defences(), num_clients=60)
    for first in (0, 20, 40):
        clients = torch.arange(first, first + 20)
        state = deliver(algorithm, state, clients, updates([1.0] * 20), torch.full((20,), 7))
    assert state.voters().nonzero()[:, 0].tolist() == list(range(20, 60))  # 25 at least: this cohort and the last


def test_nothing_is_cut_where_most_clients_send_nothing():
    algorithm, state = begin(Defences(clip=3.0, max_count=0))
    after = deliver(
        algorithm, state, torch.arange(5), updates([0.0, 0.0, 0.0, 0.0, 1.0], buffers=0.0), counts(*[7] * 5)
    )
    assert int(after.clipped.sum()) == 0


# ---------------------------------------------------------------- around a method


def test_the_state_can_be_saved_and_the_models_are_found_in_it():
    state, _ = small().play(Guarded(FedMerge(num_models=2), Defences()), 6)
    saved = load(save({name: tensor.contiguous() for name, tensor in state_tensors(state).items()}))
    again = with_tensors(state, saved)
    assert same(again, state)
    assert torch.equal(again.norms, state.norms)
    assert torch.equal(server_models(state), state.method.soup.models)
    assert torch.equal(
        with_server_models(state, state.method.soup.models + 1).method.soup.models, 1 + again.method.soup.models
    )


UNGUARDED = {"ifca", "fedem", "fedsoft", "feddbe", "scaffold"}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_methods_whose_clients_send_an_update_are_guarded_and_no_others(name):
    options = {"num_models": 2} if "num_models" in option_fields(ALGORITHMS[name].cls) else {}
    method = ALGORITHMS[name].cls(**options)
    federation = small()
    seen = []

    class Listening:
        """Notes what clients send."""

        def __getattr__(self, attribute):
            return getattr(method, attribute)

        def receive(self, state, clients, update, num_examples):
            seen.append(update)
            return method.receive(state, clients, update, num_examples)

    federation.play(Listening(), 1)
    assert isinstance(guarded(method, Defences()), Guarded) == isinstance(seen[0], Update) == (name not in UNGUARDED)


def test_defences_that_are_off_leave_the_method_alone():
    method = FedAvg()
    assert guarded(method, Defences(clip=0, max_count=0)) is method


@pytest.mark.parametrize(("options", "name"), [({"clip": 0.5}, "clip"), ({"max_count": 0.9}, "max_count")])
def test_limits_below_the_median_are_refused(options, name):
    with pytest.raises(UsageError, match=rf"Defences.{name}: got 0.\d, which would cut the median itself; expected 0"):
        Defences(**options)


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_limits_that_are_no_numbers_are_refused(value):
    with pytest.raises(UsageError, match=r"Defences\.clip: got (nan|inf|-1.0); expected a number >= 0"):
        Defences(clip=value)


def test_facts_say_how_often_something_was_cut():
    algorithm, state = begin(Defences())
    after = deliver(algorithm, state, torch.arange(5), updates([1.0] * 4 + [9.0]), counts(7, 7, 7, 7, 700))
    facts_of = algorithm.describe(after)
    assert (facts_of["clipped"], facts_of["capped"], facts_of["num_models"]) == (1, 1, 1)
