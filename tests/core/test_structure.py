"""Is there structure, how many groups, who belongs together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.core.randomness import generator
from fedmerge.core.structure import (
    directions,
    groups_of,
    kmeans,
    number_of_groups,
    renumbered,
    spread_of_cosines,
    ward_tree,
)

DEFAULTS = {"most": 15, "elbow": 2.5, "floor": 3.0}


def planted(sizes, *, seed=0, P=60, noise=0.35):
    """Updates with a common part, a part of their group, and their own."""
    rng = np.random.default_rng([seed, len(sizes)])
    labels = np.repeat(np.arange(len(sizes)), sizes)
    common, centres = rng.normal(size=P), rng.normal(size=(len(sizes), P))
    own = rng.normal(size=(len(labels), P))
    return torch.from_numpy(common + centres[labels] + noise * own), labels


def costs_of(progress):
    return ward_tree(progress)[:, 2] ** 2 / 2


EQUAL = [[8] * k for k in range(2, 9)]
UNEQUAL = [[20, 5], [15, 8, 4], [12, 9, 6, 4], [10, 8, 6, 4, 3], [9, 8, 7, 6, 5, 4], [8] * 3 + [5] * 4, [9, 4] * 4]


@pytest.mark.parametrize("sizes", EQUAL + UNEQUAL, ids=str)
def test_planted_groups_are_found_with_their_number(sizes):
    progress, labels = planted(sizes)
    tree = ward_tree(progress)
    count = number_of_groups(tree[:, 2] ** 2 / 2, **DEFAULTS)
    assert count == len(sizes)
    assert groups_of(tree, count).tolist() == labels.tolist()
    assert spread_of_cosines(progress) > 0.12


@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_clients_that_pull_alike_are_below_the_gate(seed):
    rng = np.random.default_rng(seed)
    progress = torch.from_numpy(rng.normal(size=200) + rng.normal(size=(20, 200)))
    assert spread_of_cosines(progress) < 0.12


@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_order_of_clients_only_renumbers_groups(seed):
    progress, _ = planted([6, 5, 4])
    order = np.random.default_rng(seed).permutation(15)
    straight, mixed = groups_of(ward_tree(progress), 3), groups_of(ward_tree(progress[order]), 3)
    assert renumbered(straight[order]).tolist() == mixed.tolist()
    assert spread_of_cosines(progress) == pytest.approx(spread_of_cosines(progress[order]), rel=1e-12)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_how_far_a_client_moved_does_not_matter(factor):
    progress, labels = planted([6, 5, 4])
    progress[3] *= factor
    assert groups_of(ward_tree(progress), 3).tolist() == labels.tolist()


def test_spread_of_cosines_by_hand():
    """(1, 0), (1, 0), (0, 1): cosines 1, 0, 0 with mean 1/3 and variance (4/9 + 1/9 + 1/9) / 3 = 2/9."""
    progress = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    assert spread_of_cosines(progress) == pytest.approx((2 / 9) ** 0.5)


def test_a_single_client_has_no_spread():
    assert spread_of_cosines(torch.ones(1, 3)) == 0.0


def test_a_client_that_did_not_move_has_no_direction():
    assert directions(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0.0, 0.0], [0.6, 0.8]]


def test_ward_heights_are_the_growth_of_the_sum_of_squares():
    """Two opposite pairs of two: merging the pairs costs the distance of means² · (2 · 2) / (2 + 2) = 2² · 1 = 4."""
    progress = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    assert costs_of(progress) == pytest.approx([0.0, 0.0, 4.0])


def test_number_of_groups_by_hand_with_a_sharp_elbow():
    """n = 7, costs 1 1 1 1 12 14: F(2) = 14 / (16/5) = 4.4, F(3) = 12 / 1 = 12, F(4) = 1 / 1; F(3)/F(4) = 12."""
    assert number_of_groups(np.array([1.0, 1, 1, 1, 12, 14]), **DEFAULTS) == 3


def test_number_of_groups_by_hand_without_an_elbow():
    """n = 8, costs 1 1 1 1 2 4 9.

    F(2) = 9/(10/6) = 5.4, F(3) = 4/(6/5) = 3.33, F(4) = 2/1 = 2, F(5) = 1: drops 1.6, 1.7, 2, all below 2.5;
    F(2) and F(3) are above 3, F(4) is not: three groups.
    """
    assert number_of_groups(np.array([1.0, 1, 1, 1, 2, 4, 9]), **DEFAULTS) == 3


def test_two_groups_are_the_least_once_the_gate_is_open():
    """All merges cost the same: F = 1 everywhere, no elbow, nothing above the floor."""
    assert number_of_groups(np.ones(9), **DEFAULTS) == 2


def test_the_number_of_groups_is_capped():
    progress, _ = planted([8] * 6)
    assert number_of_groups(costs_of(progress), most=4, elbow=2.5, floor=3.0) <= 4


@pytest.mark.parametrize("n", [1, 2, 3])
def test_too_few_clients_are_one_group(n):
    assert number_of_groups(np.ones(n - 1), **DEFAULTS) == 1


@pytest.mark.parametrize("sizes", [[3, 3], [4, 4, 4], [2, 3, 4, 5]])
def test_groups_of_identical_clients_are_counted_right(sizes):
    """Merges inside a group cost exactly 0, and a ratio to 0 must not hide the elbow."""
    k = len(sizes)
    costs = np.array([0.0] * (sum(sizes) - k) + [5.0 + i for i in range(k - 1)])
    assert number_of_groups(costs, **DEFAULTS) == k


def test_clients_that_are_all_the_same_are_two_groups_at_most():
    assert number_of_groups(np.zeros(9), **DEFAULTS) == 2


def test_renumbering_by_hand():
    assert renumbered(np.array([4, 4, 9, 1, 9])).tolist() == [0, 0, 1, 2, 1]


@pytest.mark.parametrize("sizes", [[6, 6], [5, 9, 3], [7] * 5], ids=str)
def test_kmeans_finds_planted_groups(sizes):
    progress, labels = planted(sizes, noise=0.2)
    found = kmeans(progress, len(sizes), generator(0, "k-means test"))
    assert renumbered(found).tolist() == labels.tolist()


def test_kmeans_is_a_function_of_its_generator():
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 4)))
    first, again = (kmeans(points, 4, generator(5, "k-means test")) for _ in range(2))
    assert first.tolist() == again.tolist()


def test_kmeans_of_identical_points_puts_them_together():
    """All centres coincide; the first one takes every point and the others stay empty."""
    assert kmeans(torch.ones(5, 2), 3, generator(0, "k-means test")).tolist() == [0] * 5


def test_kmeans_gives_every_point_its_own_group_if_asked():
    points = torch.tensor([[0.0], [1.0], [5.0]])
    assert sorted(kmeans(points, 3, generator(0, "k-means test")).tolist()) == [0, 1, 2]


def test_kmeans_refuses_more_groups_than_points():
    with pytest.raises(ValueError, match="cannot make 3 groups of 2 points"):
        kmeans(torch.zeros(2, 1), 3, generator(0, "k-means test"))
