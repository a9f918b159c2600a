"""Epsilon against closed forms, and its directions."""

import importlib
import math
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedmerge.core.errors import UsageError
from fedmerge.privacy import accounting
from fedmerge.privacy.accounting import epsilon, noise_for


def delta_of_gaussian(mu, eps):
    """Balle and Wang, arXiv:1805.06530, theorem 8, of one Gaussian release whose shift is mu standard deviations."""
    return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)


def epsilon_of_gaussian(mu, delta):
    return brentq(lambda eps: delta_of_gaussian(mu, eps) - delta, 0, 500)


def delta_of_sampled(z, q, eps):
    """Of one Poisson-sampled Gaussian release when the client leaves: ∫ max(0, (1−q)φ(x) + qφ(x−1/z) − e^ε φ(x)) dx.

    The integrand is positive where x > z·log((e^ε − 1 + q)/q) + 1/(2z).
    """
    edge = z * math.log((math.exp(eps) - 1 + q) / q) + 1 / (2 * z)
    return (1 - q) * norm.sf(edge) + q * norm.sf(edge - 1 / z) - math.exp(eps) * norm.sf(edge)


@pytest.mark.parametrize("z", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("rounds", [1, 16])
def test_without_sampling_it_is_the_closed_form(z, rounds):
    exact = epsilon_of_gaussian(math.sqrt(rounds) / z, 1e-5)
    assert exact - 1e-9 <= epsilon(z, 1.0, rounds, 1e-5) <= exact * 1.001


@pytest.mark.parametrize(("z", "q"), [(0.6, 0.1), (1.0, 0.02), (2.0, 0.5)])
def test_one_sampled_round_is_the_closed_form(z, q):
    found = epsilon(z, q, 1, 1e-5)
    exact = brentq(lambda eps: delta_of_sampled(z, q, eps) - 1e-5, 1e-9, 50)
    assert exact - 1e-9 <= found <= exact * (1 + 1e-7)


@settings(deadline=None, max_examples=3)
@given(z=st.floats(0.7, 4), q=st.floats(0.01, 0.9), rounds=st.integers(1, 5), delta=st.floats(1e-8, 1e-2))
def test_more_noise_tells_less_and_more_rounds_or_clients_tell_more(z, q, rounds, delta):
    here = epsilon(z, q, rounds, delta)
    assert epsilon(1.5 * z, q, rounds, delta) <= here + 1e-9
    assert epsilon(z, q, 2 * rounds, delta) >= here - 1e-9
    assert epsilon(z, min(1.0, 1.5 * q), rounds, delta) >= here - 1e-3
    assert epsilon(z, q, rounds, delta / 2) >= here - 1e-9


def test_no_rounds_tell_nothing_and_no_noise_tells_everything():
    assert epsilon(0.0, 0.5, 0, 1e-5) == 0
    assert epsilon(0.0, 0.5, 1, 1e-5) == math.inf


@pytest.mark.parametrize(("target", "q", "rounds"), [(1.0, 0.1, 50), (8.0, 1.0, 10), (0.2, 0.01, 100)])
def test_the_noise_found_stays_within_epsilon_and_a_little_less_does_not(target, q, rounds):
    z = noise_for(target, q, rounds, 1e-6)
    assert epsilon(z, q, rounds, 1e-6) <= target
    assert epsilon(z * (1 - 2e-3), q, rounds, 1e-6) > target


def test_the_noise_needed_without_sampling_is_the_closed_form():
    z = noise_for(2.0, 1.0, 1, 1e-5)
    exact = 1 / brentq(lambda mu: delta_of_gaussian(mu, 2.0) - 1e-5, 1e-3, 5)
    assert exact * (1 - 1e-6) <= z <= exact * 1.003


def test_so_much_room_needs_the_least_noise_there_is():
    assert noise_for(1e6, 1.0, 1, 1e-5) == 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 0.5, 1, 1e-5), "noise_multiplier: got -1.0; expected a number >= 0"),
        ((math.nan, 0.5, 1, 1e-5), "noise_multiplier: got nan; expected a number >= 0"),
        ((math.inf, 0.5, 1, 1e-5), "noise_multiplier: got inf; expected a number >= 0"),
        ((1.0, 0.0, 1, 1e-5), "sampling_rate: got 0.0; expected a number > 0 and <= 1"),
        ((1.0, 1.5, 1, 1e-5), "sampling_rate: got 1.5; expected a number > 0 and <= 1"),
        ((1.0, math.nan, 1, 1e-5), "sampling_rate: got nan; expected a number > 0 and <= 1"),
        ((1.0, 0.5, -1, 1e-5), "rounds: got -1; expected a whole number >= 0"),
        ((1.0, 0.5, 1.5, 1e-5), "rounds: got 1.5; expected a whole number >= 0"),
        ((1.0, 0.5, math.nan, 1e-5), "rounds: got nan; expected a whole number >= 0"),
        ((1.0, 0.5, 1, 0.0), "delta: got 0.0; expected a number > 0 and < 1"),
        ((1.0, 0.5, 1, 1.0), "delta: got 1.0; expected a number > 0 and < 1"),
        (
            (1.0, 2.0, 1, math.nan),
            "sampling_rate: got 2.0; expected a number > 0 and <= 1\ndelta: got nan; expected a number > 0 and < 1",
        ),
    ],
)
def test_numbers_out_of_range_are_refused_word_by_word(arguments, message):
    with pytest.raises(UsageError) as refused:
        epsilon(*arguments)
    assert str(refused.value) == message


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_out_of_range_is_refused(target):
    with pytest.raises(UsageError) as refused:
        noise_for(target, 0.5, 1, 1e-5)
    assert str(refused.value) == f"epsilon: got {target!r}; expected a number > 0"


def test_a_target_out_of_reach_is_refused(monkeypatch):
    monkeypatch.setattr(accounting, "_NOISE", (0.01, 0.1))
    with pytest.raises(UsageError) as refused:
        noise_for(0.1, 1.0, 1, 1e-5)
    assert str(refused.value) == "epsilon: got 0.1, which no noise multiplier up to 0.1 reaches"


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError) as refused:
        epsilon(1.0, 0.5, 1, 1e-5)
    assert str(refused.value) == (
        "epsilon cannot be computed: the package dp-accounting is missing; install it with "
        "pip install 'fedmerge[privacy]'"
    )


@pytest.mark.parametrize(("z", "least"), [(0.2, 1.0), (0.05, 1.0)])
def test_little_noise_is_counted_on_a_wider_grid_and_still_from_above(z, least):
    exact = brentq(lambda eps: delta_of_sampled(z, 0.3, eps) - 1e-5, 1e-9, 600)
    assert exact * least <= epsilon(z, 0.3, 1, 1e-5) <= exact * 1.01


def test_ten_thousand_releases_without_sampling_are_one_with_less_noise():
    """To eight digits: a grid that is added up so often shows in the fifth."""
    exact = epsilon_of_gaussian(1.0, 1e-5)
    assert exact * (1 - 1e-9) <= epsilon(100.0, 1.0, 10_000, 1e-5) <= exact * (1 + 1e-8)


def test_a_second_sampled_round_tells_more_and_less_than_the_first_again():
    """Below twice as much at half the delta each: the theorem of basic composition."""
    one, two = (epsilon(1.0, 0.5, rounds, 1e-5) for rounds in (1, 2))
    assert 1.05 * one < two < 2 * epsilon(1.0, 0.5, 1, 5e-6)


def test_hardly_any_noise_needs_no_more_memory_than_much():
    """Losses grow as 1/z²: on a grid as fine as for z = 1 there would be 10⁸ of them."""
    tracemalloc.start()
    try:
        epsilon(0.01, 0.3, 1, 1e-5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6


def test_the_least_noise_is_enough_for_exactly_what_it_gives():
    assert noise_for(epsilon(0.01, 1.0, 1, 1e-5), 1.0, 1, 1e-5) == 0.01


def test_the_noise_is_found_at_the_very_end_of_the_range(monkeypatch):
    target = epsilon(0.0399, 1.0, 1, 1e-5)
    monkeypatch.setattr(accounting, "_NOISE", (0.01, 0.04))
    assert 0.0399 <= noise_for(target, 1.0, 1, 1e-5) <= 0.0399 * 1.001


def test_an_epsilon_that_a_run_does_not_reach_with_a_million_is_refused():
    with pytest.raises(UsageError) as refused:
        noise_for(1e-9, 1.0, 1, 1e-12)
    assert str(refused.value) == "epsilon: got 1e-09, which no noise multiplier up to 1e+06 reaches"


def test_every_argument_of_the_noise_is_checked():
    with pytest.raises(UsageError) as refused:
        noise_for(1.0, 0.0, -1, 1.0)
    assert str(refused.value).splitlines() == [
        "sampling_rate: got 0.0; expected a number > 0 and <= 1",
        "rounds: got -1; expected a whole number >= 0",
        "delta: got 1.0; expected a number > 0 and < 1",
    ]
