"""Is there structure, how many groups, who belongs together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import silhouette_score

from fedmerge.algorithms.fedmerge import ADAPTER_LEAN, FedMerge
from fedmerge.core.protocol import Federation, Update, deliver
from fedmerge.core.randomness import generator
from fedmerge.core.structure import (
    NOISE,
    SILHOUETTE,
    centred_cosines,
    cosines,
    directions,
    disagreement,
    evidence,
    groups_of,
    groups_of_adapters,
    kmeans,
    number_of_groups,
    renumbered,
    silhouettes,
    skewness,
    ward_tree,
)

DEFAULTS = {"most": 15, "elbow": 2.5, "floor": 3.0}


def planted(sizes, *, seed=0, P=60, noise=0.35):
    """Updates with a common part, a part of their group, and their own."""
    rng = np.random.default_rng([seed, len(sizes)])
    labels = np.repeat(np.arange(len(sizes)), sizes)
    common, centres = 0.8 * rng.normal(size=P), rng.normal(size=(len(sizes), P))
    own = rng.normal(size=(len(labels), P))
    return torch.from_numpy(common + centres[labels] + noise * own), labels


def costs_of(progress):
    return ward_tree(cosines(progress))[:, 2] ** 2 / 2


def proof(progress):
    return evidence(cosines(progress), costs_of(progress), most=15, elbow=2.5)


def low_rank_noise(seed, *, n=50, P=200, decay=1.0):
    """Clients with one common direction whose differences are chance, but fill few dimensions, as gradients do."""
    rng = np.random.default_rng(seed)
    lengths = np.arange(1, P + 1) ** -decay
    return torch.from_numpy(lengths.max() * rng.normal(size=P) + rng.normal(size=(n, P)) * lengths)


EQUAL = [[8] * k for k in range(2, 9)]
UNEQUAL = [[20, 5], [15, 8, 4], [12, 9, 6, 4], [10, 8, 6, 4, 3], [9, 8, 7, 6, 5, 4], [8] * 3 + [5] * 4, [9, 4] * 4]


@pytest.mark.parametrize("sizes", EQUAL + UNEQUAL, ids=str)
def test_planted_groups_are_found_with_their_number(sizes):
    progress, labels = planted(sizes)
    tree = ward_tree(cosines(progress))
    count = number_of_groups(tree[:, 2] ** 2 / 2, **DEFAULTS)
    assert count == len(sizes)
    assert groups_of(tree, count).tolist() == labels.tolist()
    assert proof(progress) > 1


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_differences_by_chance_are_no_evidence_whatever_their_spectrum(seed, decay):
    assert proof(low_rank_noise(seed, decay=decay)) < 1


def test_an_angle_for_every_client_is_evidence_without_clean_groups():
    """Clients on a curve, each with a direction of its own: no drop is sharp, but they disagree and are skewed."""
    rng = np.random.default_rng(0)
    angles, axes = np.linspace(0, np.pi, 60), np.arange(12) / 12 * np.pi
    bumps = np.exp(4 * np.cos(2 * (angles[:, None] - axes)))
    progress = torch.from_numpy(np.hstack([bumps, 0.1 * bumps.std() * rng.normal(size=(60, 80))]))
    assert skewness(cosines(progress)) > 3
    assert disagreement(cosines(progress)) > 0.5
    assert proof(progress) > 1


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_evidence_has_no_scale(factor):
    progress, _ = planted([6, 5, 4])
    assert proof(factor * progress) == pytest.approx(proof(progress), rel=1e-9)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_order_of_clients_only_renumbers_groups(seed):
    progress, _ = planted([6, 5, 4])
    order = np.random.default_rng(seed).permutation(15)
    straight, mixed = groups_of(ward_tree(cosines(progress)), 3), groups_of(ward_tree(cosines(progress[order])), 3)
    assert renumbered(straight[order]).tolist() == mixed.tolist()
    assert proof(progress) == pytest.approx(proof(progress[order]), rel=1e-9)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_how_far_a_client_moved_does_not_matter(factor):
    progress, labels = planted([6, 5, 4])
    progress[3] *= factor
    assert groups_of(ward_tree(cosines(progress)), 3).tolist() == labels.tolist()


def test_disagreement_by_hand():
    """(1, 0), (1, 0), (0, 1): mean (2/3, 1/3), centred squared lengths 2/9, 2/9, 8/9, all along (1, −1).

    λ = 12/9 and 0, so λ_1 − λ̄ = 2/3; n ρ = 3 · 1/3.
    """
    found = disagreement(cosines(torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])))
    assert found == pytest.approx((2 / 3) ** 0.5)


def test_clients_that_share_nothing_disagree_as_much_as_can_be():
    progress = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.1], [-2.0, -0.1]])
    assert disagreement(cosines(progress)) == pytest.approx(1000)


def test_skewness_by_hand():
    """Three groups of two at 120°: per client one cosine 1 and four −1/2: Σ c³ = 6 (1 − 4/8),
    and Σ c⁶ = 6 (1 + 4/64).
    """
    turn = torch.arange(3).repeat_interleave(2).double() * 2 * np.pi / 3
    progress = torch.stack([turn.cos(), turn.sin()], dim=1)
    assert skewness(cosines(progress)) == pytest.approx(3 / (2 * 6 * (1 + 4 / 64)) ** 0.5)


def test_its_standard_error_is_that_of_flipped_signs():
    """Over random flips of whole clients Σ s_i s_j c_ij³ has mean 0 and the variance by which skewness divides."""
    cubes = centred_cosines(cosines(low_rank_noise(0, n=20))).fill_diagonal_(0) ** 3
    signs = torch.from_numpy(np.random.default_rng(1).choice([-1.0, 1.0], size=(20_000, 20)))
    sums = torch.einsum("ti,ij,tj->t", signs, cubes, signs)
    assert float(sums.std()) == pytest.approx(float((2 * cubes.square().sum()).sqrt()), rel=0.05)
    assert abs(float(sums.mean())) < 0.05 * float(sums.std())


def test_size_alone_is_evidence_where_so_few_examples_do_not_explain_it():
    products = cosines(low_rank_noise(0, n=8))
    costs = np.ones(7)
    shape = evidence(products, costs, most=15, elbow=2.5)
    size = disagreement(products)
    assert evidence(products, costs, most=15, elbow=2.5, examples=1e6) == pytest.approx(1e3 * size / NOISE)
    assert evidence(products, costs, most=15, elbow=2.5, examples=1e-6) == shape


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_clients_are_no_evidence(n):
    progress = torch.eye(n, 3)
    assert evidence(cosines(progress), np.ones(n - 1), most=15, elbow=2.5) == 0.0


def test_evidence_has_a_ceiling():
    """Identical clients that share nothing: drop and disagreement have no bound, but a record must stay finite."""
    progress = torch.tensor([[1.0, 0.0]] * 3 + [[-1.0, 0.0]] * 3)
    assert proof(progress) == 1000.0


def test_a_client_that_did_not_move_has_no_direction():
    """(3, 4) and (5, 0): 15 / 25."""
    assert directions(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0.0, 0.0], [0.6, 0.8]]
    found = cosines(torch.tensor([[0.0, 0.0], [3.0, 4.0], [5.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0, 0, 0], [0, 1, 0.6], [0, 0.6, 1]], dtype=torch.float64))


def test_centred_cosines_by_hand():
    """(1, 0), (1, 0), (0, 1) less (2/3, 1/3) lie on one line, the last one opposite the others."""
    found = centred_cosines(cosines(torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64))


def test_clients_that_do_not_differ_stay_at_the_centre():
    assert not centred_cosines(cosines(torch.tensor([[1.0, 1.0], [3.0, 3.0], [0.1, 0.1]]))).any()


def test_ward_heights_are_the_growth_of_the_sum_of_squares():
    """Two opposite pairs of two: merging the pairs costs the distance of means² · (2 · 2) / (2 + 2) = 2² · 1 = 4."""
    progress = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    assert costs_of(progress) == pytest.approx([0.0, 0.0, 4.0])


def test_number_of_groups_by_hand_with_a_sharp_elbow():
    """n = 7, costs 1 1 1 1 12 14: F(2) = 14 / (16/5) = 4.4, F(3) = 12 / 1 = 12, F(4) = 1 / 1; F(3)/F(4) = 12."""
    assert number_of_groups(np.array([1.0, 1, 1, 1, 12, 14]), **DEFAULTS) == 3


def test_number_of_groups_by_hand_without_an_elbow():
    """n = 12, costs 1 (six times) 2 3 5 8 14.

    F(2) = 14/(24/10) = 5.8, F(3) = 8/(16/9) = 4.5, F(4) = 5/(11/8) = 3.6, F(5) = 3/(8/7) = 2.6, F(6) = 2/1, F(7) = 1:
    drops up to 2; F(2), F(3) and F(4) are above 3, and at a floor of 2 so is F(5).
    """
    costs = np.array([1.0, 1, 1, 1, 1, 1, 2, 3, 5, 8, 14])
    assert number_of_groups(costs, **DEFAULTS) == 4
    assert number_of_groups(costs, **{**DEFAULTS, "floor": 2.0}) == 5


@pytest.mark.parametrize(("n", "least"), [(4, 2), (5, 2), (6, 3), (8, 4), (9, 4), (50, 4)])
def test_without_clean_groups_there_are_four_models_or_half_the_clients(n, least):
    """All merges cost the same, 1 or nothing: no elbow, nothing above the floor."""
    assert number_of_groups(np.ones(n - 1), **DEFAULTS) == least
    assert number_of_groups(np.zeros(n - 1), **DEFAULTS) == least
    assert number_of_groups(np.ones(n - 1), **{**DEFAULTS, "most": 2}) == 2


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


# --- adapters ---


def spread(progress):
    """Distances of the tree: between the centred directions at length 1."""
    wide = centred_cosines(cosines(progress))
    return (2 - 2 * wide).clamp_min(0).sqrt().fill_diagonal_(0).numpy()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 25), P=st.integers(3, 40), most=st.integers(2, 9))
def test_silhouettes_are_scikit_learns(seed, n, P, most):
    progress = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, P)))
    tree = ward_tree(cosines(progress))
    found, distance = silhouettes(cosines(progress), tree, most), spread(progress)
    distance = (distance + distance.T) / 2
    assert list(found) == list(range(2, min(most, n - 2) + 1))
    for count, value in found.items():
        wanted = silhouette_score(distance, groups_of(tree, count), metric="precomputed")
        assert value == pytest.approx(wanted, rel=0, abs=1e-12)


def test_a_silhouette_by_hand():
    """Directions ±x, twice each: centred they are themselves. Within 0, to the other group 2: (2 − 0) / 2 for all."""
    progress = torch.tensor([[1.0, 0], [1.0, 0], [-1.0, 0], [-1.0, 0]], dtype=torch.float64)
    tree = ward_tree(cosines(progress))
    assert silhouettes(cosines(progress), tree, most=5) == {2: pytest.approx(1.0)}
    assert groups_of_adapters(cosines(progress), tree, most=5) == (pytest.approx(1 / SILHOUETTE), 2)


@pytest.mark.parametrize("sizes", [[6, 6], [4, 4, 4], [4] * 5, [8, 5, 3]], ids=str)
def test_groups_of_adapters_are_found_with_their_number(sizes):
    progress, labels = planted(sizes)
    tree = ward_tree(cosines(progress))
    gate, count = groups_of_adapters(cosines(progress), tree, 15)
    assert count == len(sizes)
    assert gate > 1
    assert len(set(zip(groups_of(tree, count).tolist(), labels.tolist(), strict=True))) == len(sizes)


def test_groups_of_adapters_are_found_under_noise_that_hides_a_sharp_drop():
    """Own parts five times as long as what a group shares, in many dimensions: as after a few rounds of AdamW."""
    progress, labels = planted([4] * 5, P=2000, noise=2.0)
    tree = ward_tree(cosines(progress))
    assert number_of_groups(tree[:, 2] ** 2 / 2, **DEFAULTS) != 5
    gate, count = groups_of_adapters(cosines(progress), tree, 15)
    assert (count, gate > 1) == (5, True)
    assert len(set(zip(groups_of(tree, count).tolist(), labels.tolist(), strict=True))) == 5


@pytest.mark.parametrize("n", [6, 12, 20])
@pytest.mark.parametrize("seed", range(5))
def test_noise_in_many_dimensions_is_no_group_of_adapters(n, seed):
    rng = np.random.default_rng([5, n, seed])
    progress = torch.from_numpy(2 * rng.normal(size=5000) + rng.normal(size=(n, 5000)))
    gate, _ = groups_of_adapters(cosines(progress), ward_tree(cosines(progress)), 15)
    assert gate < 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_so_few_clients_are_no_groups_of_adapters(n):
    progress, _ = planted([n])
    assert groups_of_adapters(cosines(progress), ward_tree(cosines(progress)), 15) == (0.0, 1)


def test_clients_of_a_group_that_are_all_the_same_are_not_parted():
    centres = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 10)))
    progress = centres.repeat_interleave(4, dim=0)
    assert groups_of_adapters(cosines(progress), ward_tree(cosines(progress)), 15)[1] == 3


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_clients_that_do_not_differ_are_no_groups_of_adapters(value):
    progress = torch.full((6, 10), value, dtype=torch.float64)
    tree = ward_tree(cosines(progress))
    assert groups_of_adapters(cosines(progress), tree, 15)[0] == 0.0


def searched(progress, *, adapters):
    """FedMerge after a search of one round in which the clients sent this."""
    n, P = progress.shape
    facts = Federation(n, P, (P - 1, P), ((0, P),), adapters=adapters)
    method = FedMerge(search_rounds=1)
    state = method.init(lambda j: torch.zeros(P, dtype=torch.float64), facts, 0)
    return deliver(method, state, torch.arange(n), Update(progress), torch.full((n,), 10))


def test_fedmerge_looks_for_groups_of_adapters_where_the_models_are_adapters():
    progress, labels = planted([4] * 5, P=2000, noise=2.0)
    found = searched(progress, adapters=True)
    gate, count = groups_of_adapters(cosines(progress), ward_tree(cosines(progress)), FedMerge().max_models)
    assert float(found.gate) == gate
    assert len(found.soup.models) == count == 5
    favourites = found.soup.logits[0].argmax(dim=1).tolist()
    assert len(set(zip(favourites, labels.tolist(), strict=True))) == 5
    plain = searched(progress, adapters=False)
    assert float(plain.gate) != gate
    assert len(plain.soup.models) != 5


@pytest.mark.parametrize(("adapters", "lean"), [(False, 1.0), (True, ADAPTER_LEAN)])
def test_adapters_begin_nearer_to_the_model_of_their_group(adapters, lean):
    """The first logit is `lean` for the own group and 0 for the others."""
    progress, _ = planted([8, 8, 8])
    found = searched(progress, adapters=adapters).soup.logits[0]
    assert found.unique().tolist() == [0.0, lean]
    assert (found > 0).sum(dim=1).tolist() == [1] * 24


def test_fedmerge_stays_one_adapter_where_there_are_no_groups():
    rng = np.random.default_rng(0)
    progress = torch.from_numpy(2 * rng.normal(size=5000) + rng.normal(size=(12, 5000)))
    found = searched(progress, adapters=True)
    assert 0 <= float(found.gate) < 1
    assert len(found.soup.models) == 1
    assert not bool(found.searching)
