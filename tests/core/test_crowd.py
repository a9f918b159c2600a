"""How small a crowd personalization leaves, and that what the numbers warn of really can be done."""

import jaxtyping
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedmerge.core import crowd as crowds
from fedmerge.core.crowd import crowd
from fedmerge.core.soup import merge, shares
from fedmerge.core.sums import weighted_sum

QUICK = settings(max_examples=60, deadline=None)
SHAPES = {"N": st.integers(2, 9), "d": st.integers(1, 5), "seed": st.integers(0, 2**31)}


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def federation(N, d, seed):
    """Rows from even to nearly one-hot, examples from 1 to 1000."""
    sharpness = torch.rand(N, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 2)) * 8
    weights = torch.softmax(normal(seed, N, d) * sharpness, dim=1)
    return weights, torch.randint(1, 1001, (N,), generator=torch.Generator().manual_seed(seed + 1))


def clusters(*sizes):
    """One-hot rows [N, number of clusters]."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.nn.functional.one_hot(owner, len(sizes)).double()


def by_definition(weights, examples, i):
    """[N] p_ik with loops over the formula of the docstring."""
    N, d = weights.shape
    used = [sum(float(examples[k] * weights[k, j]) for k in range(N)) for j in range(d)]
    q = [sum(float(weights[i, j] * examples[k] * weights[k, j]) / used[j] for j in range(d)) for k in range(N)]
    q[i] = 0.0
    return torch.tensor(q, dtype=torch.float64) / sum(q)


@QUICK
@given(**SHAPES)
def test_a_crowd_is_one_over_the_sum_of_squared_shares(N, d, seed):
    weights, examples = federation(N, d, seed)
    found = crowd(weights, examples)
    for i in range(N):
        p = by_definition(weights, examples, i)
        assert found.effective[i] == pytest.approx(1 / float(p.square().sum()), rel=1e-9)
        assert found.nearest_share[i] == pytest.approx(float(p.max()), rel=1e-9)
        assert p[found.nearest[i]] == pytest.approx(float(p.max()), rel=1e-9)


@QUICK
@given(**SHAPES)
def test_a_crowd_is_between_one_and_all_others(N, d, seed):
    found = crowd(*federation(N, d, seed))
    assert (found.effective >= 1 - 1e-9).all()
    assert (found.effective <= (N - 1) * (1 + 1e-9)).all()
    for share in (found.nearest_share, found.largest, found.leverage):
        assert ((share > 0) & (share <= 1 + 1e-9)).all()
    assert (found.nearest_share * found.effective >= 1 - 1e-9).all()  # the largest share is at least the even one


@QUICK
@given(N=st.integers(2, 50), count=st.integers(1, 10**6))
def test_with_one_model_and_equal_examples_the_crowd_is_everybody_else(N, count):
    found = crowd(torch.ones(N, 1), torch.full((N,), count))
    assert found.effective.tolist() == pytest.approx([N - 1] * N)
    assert found.leverage.tolist() == found.largest.tolist() == pytest.approx([1 / N] * N)


@QUICK
@given(sizes=st.lists(st.integers(2, 6), min_size=1, max_size=5))
def test_in_a_cluster_of_equals_the_crowd_is_the_rest_of_the_cluster(sizes):
    weights = clusters(*sizes)
    found = crowd(weights, torch.full((len(weights),), 7))
    size = [count for count in sizes for _ in range(count)]
    assert found.effective.tolist() == pytest.approx([count - 1 for count in size])
    assert found.leverage.tolist() == found.largest.tolist() == pytest.approx([1 / count for count in size])
    assert (weights.argmax(dim=1)[found.nearest] == weights.argmax(dim=1)).all()


@QUICK
@given(**SHAPES)
def test_the_order_of_clients_does_not_matter(N, d, seed):
    weights, examples = federation(N, d, seed)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    plain, moved = crowd(weights, examples), crowd(weights[order], examples[order])
    for name in ("effective", "nearest_share", "largest", "leverage"):
        assert getattr(moved, name).tolist() == pytest.approx(getattr(plain, name)[order].tolist(), rel=1e-9)
    read = torch.stack([by_definition(weights, examples, i) for i in range(N)])[order]
    assert read[torch.arange(N), order[moved.nearest]].tolist() == pytest.approx(read.amax(dim=1).tolist(), rel=1e-9)


@QUICK
@given(**SHAPES)
def test_the_order_of_models_and_the_unit_of_examples_do_not_matter(N, d, seed):
    weights, examples = federation(N, d, seed)
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    plain, moved = crowd(weights, examples), crowd(weights[:, order], examples * 1000)
    for name in ("effective", "nearest_share", "largest", "leverage"):
        assert getattr(moved, name).tolist() == pytest.approx(getattr(plain, name).tolist(), rel=1e-9)


def test_the_number_of_clients_held_at_a_time_does_not_matter(monkeypatch):
    weights, examples = federation(9, 3, 0)
    whole = crowd(weights, examples)
    monkeypatch.setattr(crowds, "_BLOCK", 20)  # two clients of nine at a time
    for name in ("effective", "nearest", "nearest_share", "largest", "leverage"):
        assert torch.equal(getattr(crowd(weights, examples), name), getattr(whole, name))


def test_a_crowd_by_hand():
    """Two models, n = (1, 1, 2), A = ((1, 0), (½, ½), (0, 1)).

    Column sums of n A: model 0 has 1 + ½ = 1½, model 1 has ½ + 2 = 2½; a = ((⅔, 0), (⅓, ⅕), (0, ⅘)). Client 1 sees
    q_10 = ½·⅔ = ⅓ and q_12 = ½·⅘ = ⅖: p = (5/11, 6/11), K_eff = 121/(25 + 36). Clients 0 and 2 see client 1 alone.
    """
    found = crowd(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), torch.tensor([1, 1, 2]))
    assert found.effective.tolist() == pytest.approx([1, 121 / 61, 1])
    assert found.nearest.tolist() == [1, 2, 1]
    assert found.nearest_share.tolist() == pytest.approx([1, 6 / 11, 1])
    assert found.largest.tolist() == pytest.approx([2 / 3, 1 / 3, 4 / 5])
    assert found.leverage.tolist() == pytest.approx([2 / 3, 1 / 6 + 1 / 10, 4 / 5])


@pytest.mark.parametrize(
    ("weights", "examples", "alone"),
    [
        ([[1.0]], [3], [True]),
        ([[0.3, 0.7]], [3], [True]),
        ([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [3, 3, 3], [True, False, False]),
        ([[0.0, 0.0], [0.5, 0.5], [0.5, 0.5]], [3, 3, 3], [True, False, False]),
        ([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [3, 0, 0], [True, False, False]),
        ([[1.0], [1.0]], [0, 0], [True, True]),
    ],
    ids=["one client", "one client of two models", "alone in a model", "no weights", "others are empty", "all empty"],
)
def test_whom_nobody_moves_has_no_crowd(weights, examples, alone):
    found = crowd(torch.tensor(weights), torch.tensor(examples))
    assert found.effective.isnan().tolist() == found.nearest_share.isnan().tolist() == alone
    assert (found.nearest == -1).tolist() == alone
    assert not (found.largest.isnan() | found.leverage.isnan()).any()


def test_a_client_alone_in_a_model_is_all_of_its_step():
    found = crowd(clusters(1, 2), torch.tensor([3, 3, 3]))
    assert found.leverage.tolist() == pytest.approx([1, 1 / 2, 1 / 2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1])
def test_numbers_that_mean_nothing_are_refused(bad):
    weights = torch.full((3, 2), 0.5)
    weights[1, 0] = bad
    with pytest.raises(ValueError, match="weights: got NaN, infinite or negative numbers; expected finite"):
        crowd(weights, torch.tensor([1, 1, 1]))


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="examples: got NaN, infinite or negative numbers; expected finite"):
        crowd(torch.full((3, 2), 0.5), torch.tensor([1, 1, -1]))


@pytest.mark.parametrize(("weights", "examples"), [((2, 2), (3,)), ((0, 2), (0,)), ((2, 0), (2,))])
def test_shapes_that_do_not_fit_are_refused(weights, examples):
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=r"expected \[N, d\]|annotation"):
        crowd(torch.zeros(weights), torch.zeros(examples, dtype=torch.int64))


# That it really can be read


def what_is_left(weights, examples, updates, i):
    """What client i sees of a round beside its own update, from its own models before and after alone."""
    models, share = normal(99, weights.shape[1], updates.shape[1]), shares(weights, examples)
    stepped = models - weighted_sum(share, updates)
    seen = merge(models, weights)[i] - merge(stepped, weights)[i]
    own = crowd(weights, examples).leverage[i]
    return seen - own * updates[i]


def test_with_two_clients_in_a_cluster_the_others_update_is_read_off_the_models():
    weights, examples = clusters(2, 2, 6), torch.tensor([30, 5, 8, 8, 9, 9, 9, 9, 9, 9])
    updates, found = normal(0, 10, 4000), crowd(weights, examples)
    for reader in range(4):
        other = int(found.nearest[reader])
        left = what_is_left(weights, examples, updates, reader)
        assert found.effective[reader] == 1
        assert float(torch.cosine_similarity(left, updates[other], dim=0)) == pytest.approx(1, abs=1e-9)


def test_in_a_crowd_the_best_cosine_is_that_of_one_among_as_many():
    """Updates of 4,000 random numbers are nearly orthogonal: one of K equal ones has the cosine 1/√K with their sum."""
    weights, examples = clusters(2, 2, 6), torch.full((10,), 9)
    updates, found = normal(0, 10, 4000), crowd(weights, examples)
    left = what_is_left(weights, examples, updates, 9)
    cosines = torch.cosine_similarity(left, updates, dim=1)
    assert found.effective[9] == pytest.approx(5)
    assert float(cosines.max()) == pytest.approx(5**-0.5, abs=0.05)  # 3 deviations of 1/√4000 each


@QUICK
@given(**SHAPES)
def test_of_orthogonal_updates_the_best_cosine_is_the_share_times_the_root_of_the_crowd(N, d, seed):
    weights, examples = federation(N, d, seed)
    found = crowd(weights, examples)
    assume(bool((found.leverage < 1 - 1e-6).all()))  # beside its own update there is something to see
    updates = torch.eye(N, dtype=torch.float64)
    for i in range(N):
        cosine = torch.cosine_similarity(what_is_left(weights, examples, updates, i), updates, dim=1).max()
        assert float(cosine) == pytest.approx(float(found.nearest_share[i] * found.effective[i].sqrt()), abs=1e-5)
