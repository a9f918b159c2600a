"""The audit measures what it says, catches a broken scheme, and finds the method within its claim."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fedmerge.algorithms.dp_fedmerge import DpFedMerge
from fedmerge.privacy import epsilon
from fedmerge.privacy.audit import epsilon_of_shift, lower_bound

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "faults"))
from dp_world import World, broken_score, broken_shift, largest_shift, score

DELTA = 1e-3
SURE = {"delta": DELTA, "confidence": 0.999}


def gaussian(shift, runs=20_000):
    rng = np.random.default_rng(3)
    return rng.normal(shift, 1, size=runs), rng.normal(0, 1, size=runs)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_attacks_on_one_gaussian_release_bound_its_epsilon_from_below(shift):
    """With 20,000 runs the bound comes within 60 % of the truth, and stays below it."""
    exact = epsilon(1 / shift, 1.0, 1, DELTA)
    assert 0.4 * exact < lower_bound(*gaussian(shift), **SURE) <= exact


def test_scores_that_know_nothing_show_nothing():
    assert lower_bound(*gaussian(0.0), **SURE) < 0.2
    assert lower_bound(np.zeros(1000), np.zeros(1000), **SURE) == 0


def test_scores_that_know_everything_show_as_much_as_their_number_can():
    """500 of 500 hits: at least .0005^(1/500) of all; 0 of 500 misses: at most 1 − .0005^(1/500)."""
    low, high = 0.0005 ** (1 / 500), 1 - 0.0005 ** (1 / 500)
    wanted = np.log((low - DELTA) / high)
    assert lower_bound(np.ones(1000), np.zeros(1000), **SURE) == pytest.approx(wanted)
    assert lower_bound(np.zeros(1000), np.ones(1000), **SURE) == 0


def test_a_client_may_be_told_by_its_absence():
    """Scores of runs without the client are sometimes far below any with it: that shows as well."""
    rng = np.random.default_rng(4)
    inside = rng.random(4000)
    outside = np.where(rng.random(4000) < 0.5, -1.0, inside)
    assert lower_bound(inside, outside, **SURE) > 3  # log(.47/.02): thresholds are a hundredth of the runs apart


def test_a_shift_of_one_clip_is_the_claim():
    assert epsilon_of_shift(1 / 0.8, 0.3, 4, DELTA) == epsilon(0.8, 0.3, 4, DELTA)
    assert epsilon_of_shift(0.8, 0.3, 4, DELTA) == epsilon(1 / 0.8, 0.3, 4, DELTA)
    assert epsilon_of_shift(0.0, 0.3, 4, DELTA) == 0


def worlds():
    def method(d, **options):
        return DpFedMerge(num_models=d, **options)

    return [
        World("clusters", method(3), rows="clusters"),
        World("alone", method(3), rows="alone"),
        World("dominant", method(2), lengths=(1e6, 1.0)),
        World("counts", method(3, count_cap=10), counts=(10**12, 1)),
        World("sampling and momentum", method(2, momentum=0.9, sampling_rate=0.3), rounds=3),
        World("one model", method(1, clip=1e-6)),
    ]


@pytest.mark.parametrize("world", worlds(), ids=lambda world: world.name)
def test_no_client_moves_a_release_by_more_than_the_clip(world):
    assert 0.999 < largest_shift(world) * world.method.noise_multiplier <= 1


def runs_of(world, scorer, count):
    return [np.array([scorer(world, trial, inside=there) for trial in range(count)]) for there in (True, False)]


def test_attacks_stay_within_the_claim():
    world = World("alone", DpFedMerge(num_models=3, sampling_rate=0.5), rows="alone", rounds=1)
    assert lower_bound(*runs_of(world, score, 100), **SURE) <= epsilon(1.0, 0.5, world.rounds, DELTA)


@pytest.mark.parametrize("rows", ["clusters", "alone"])
def test_noise_for_the_normalised_average_is_caught(rows):
    """Its noise is that of one model with 40 clients; a model of fewer clients moves by more than that."""
    world, claim = World("broken", DpFedMerge(num_models=4), rows=rows, clients=40), epsilon(1.0, 1.0, 1, DELTA)
    assert epsilon_of_shift(broken_shift(world), 1.0, 1, DELTA) > 5 * claim
    if rows == "alone":  # an attack with so few runs shows 3.6 at most
        assert lower_bound(*runs_of(world, broken_score, 600), **SURE) > claim
