"""Draws depend on their counters and on nothing else."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.core.randomness import fresh_module_randomness, generator

COUNTERS = st.tuples(
    st.integers(0, 2**31),
    st.sampled_from(["batches", "cohort", "initial weights"]),
    st.integers(0, 999),
    st.integers(0, 999),
)


def numbers(seed, purpose, *counters):
    return generator(seed, purpose, *counters).integers(2**63, size=4).tolist()


@given(COUNTERS)
@settings(max_examples=50)
def test_the_same_counters_give_the_same_numbers(counters):
    assert numbers(*counters) == numbers(*counters)


@given(COUNTERS, COUNTERS)
@settings(max_examples=100)
def test_other_counters_give_other_numbers(one, other):
    assert (numbers(*one) == numbers(*other)) == (one == other)


def test_neighbouring_counters_are_not_correlated():
    """Means of 1000 uniform draws from neighbours: standard error 0.029 of the correlation, five of them allowed."""
    first = torch.tensor([generator(0, "batches", 1, c).random() for c in range(1000)])
    second = torch.tensor([generator(0, "batches", 2, c).random() for c in range(1000)])
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / 1000**0.5


def test_the_order_of_counters_matters():
    assert numbers(0, "batches", 1, 2) != numbers(0, "batches", 2, 1)


def test_torchs_generator_is_seeded_inside_and_given_back_as_it_was():
    before = torch.get_rng_state()
    with fresh_module_randomness(0, "initial weights", 1):
        one = torch.nn.Linear(3, 3).weight
    torch.rand(5)
    with fresh_module_randomness(0, "initial weights", 1):
        again = torch.nn.Linear(3, 3).weight
    with fresh_module_randomness(0, "initial weights", 2):
        other = torch.nn.Linear(3, 3).weight
    torch.set_rng_state(before)
    with fresh_module_randomness(0, "initial weights", 1):
        torch.rand(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
