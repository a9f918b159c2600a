"""Which examples, in which order, how fast."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.core.errors import UsageError
from fedmerge.data.federated import Examples
from fedmerge.training import LocalTraining, draw_batches, one_pass, rate_of_round


def examples(n):
    """Example k has input k and label k mod 3."""
    return Examples(torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n) % 3)


def drawn(n, training, *, seed=0, round_number=1, client=0):
    return draw_batches(examples(n), training, lr=0.1, seed=seed, round_number=round_number, client=client)


def order(batches):
    return [int(x) for batch in batches for x in batch.inputs[:, 0]]


@given(n=st.integers(1, 40), size=st.integers(1, 50), epochs=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_epoch_sees_every_example_once(n, size, epochs):
    batches = drawn(n, LocalTraining(batch_size=size, epochs=epochs))
    per_epoch = math.ceil(n / size)
    assert len(batches) == epochs * per_epoch
    for e in range(epochs):
        epoch = batches[e * per_epoch : (e + 1) * per_epoch]
        assert sorted(order(epoch)) == list(range(n))
        assert [len(batch.targets) for batch in epoch[:-1]] == [size] * (per_epoch - 1)
    assert LocalTraining(batch_size=size, epochs=epochs).passes(n) == epochs * n


@given(n=st.integers(1, 40), size=st.integers(1, 50), steps=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_number_of_steps_is_kept_whatever_the_number_of_examples(n, size, steps):
    training = LocalTraining(batch_size=size, steps=steps)
    batches = drawn(n, training)
    assert len(batches) == steps
    seen = Counter(order(batches))
    assert max(seen.values()) - min(seen.get(k, 0) for k in range(n)) <= 1
    assert sum(seen.values()) == training.passes(n)


def test_examples_keep_their_labels_and_weights_sum_to_one():
    for batch in drawn(10, LocalTraining(batch_size=4, epochs=1)):
        assert torch.equal(batch.targets, batch.inputs[:, 0].long() % 3)
        assert float(batch.weight.sum()) == pytest.approx(1.0)
        assert float(batch.lr) == 0.1
        assert batch.weight.dtype == batch.lr.dtype == torch.float64


def test_the_draw_depends_on_seed_round_and_client_alone():
    training = LocalTraining(batch_size=8, epochs=1)
    first = order(drawn(30, training, seed=1, round_number=2, client=3))
    drawn(30, training, seed=9, round_number=9, client=9)
    assert order(drawn(30, training, seed=1, round_number=2, client=3)) == first
    for other in ({"seed": 2}, {"round_number": 3}, {"client": 4}):
        counters = {"seed": 1, "round_number": 2, "client": 3} | other
        assert order(drawn(30, training, **counters)) != first


def test_epochs_are_shuffled_anew():
    batches = drawn(30, LocalTraining(batch_size=30, epochs=2))
    assert order(batches[:1]) != order(batches[1:])


def test_one_pass_keeps_the_order_and_copies_nothing():
    data = examples(10)
    batches = one_pass(data, batch_size=4)
    assert order(batches) == list(range(10))
    assert [len(batch.targets) for batch in batches] == [4, 4, 2]
    assert batches[1].inputs.data_ptr() == data.inputs[4:].data_ptr()
    assert all(float(batch.lr) == 0 for batch in batches)


def test_one_pass_over_nothing_is_nothing():
    assert one_pass(examples(0)) == ()


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4]),
        ("step", [0.4, 0.4, 0.1, 0.1]),
        ("cosine", [0.4, 0.2 * (1 + math.cos(math.pi / 4)), 0.2, 0.2 * (1 - math.cos(math.pi / 4))]),
    ],
)
def test_schedules_by_hand(schedule, rates):
    training = LocalTraining(lr=0.4, schedule=schedule, decay_every=2, decay_factor=0.25)
    assert [rate_of_round(training, r, 4) for r in (1, 2, 3, 4)] == pytest.approx(rates)


def test_steps_and_epochs_together_are_refused():
    with pytest.raises(UsageError, match="got both steps and epochs; give one of them"):
        LocalTraining(steps=5, epochs=3)


@pytest.mark.parametrize(
    "options", [{"lr": 0}, {"batch_size": 0}, {"momentum": 1.0}, {"decay_factor": 1.5}, {"steps": 0}]
)
def test_impossible_training_is_refused(options):
    with pytest.raises(UsageError, match=f"LocalTraining.{next(iter(options))}: got"):
        LocalTraining(**options)
