"""Means of LoRA adapters as products: against dense products and their singular values, and on a pencil's page."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmerge.core.adapters import averaging_error, pairs_of, product_means
from fedmerge.core.vector import layout_of
from small_federation import perceptron
from small_lora import Adapted, adapted

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def one_layer(fan_in, fan_out, rank):
    """Layout of an adapted layer and an output layer of one number, which no pair holds."""
    return layout_of(nn.Sequential(Adapted(fan_in, fan_out, rank), nn.Linear(fan_out, 1, bias=False)).double())


def vectors_of(layout, count, seed=0, spread=1.0):
    """Vectors around a common one; the larger the spread, the less they have in common."""
    rng = np.random.default_rng([11, seed])
    common, own = rng.normal(size=layout.num_params), rng.normal(size=(count, layout.num_params))
    return torch.from_numpy(common + spread * own)


def vector(layout, a, b):
    """A vector with these factors of the only layer and 0 elsewhere."""
    (pair,) = pairs_of(layout)
    found = torch.zeros(layout.num_params, dtype=torch.float64)
    found[slice(*pair.a)] = torch.tensor(a, dtype=torch.float64).flatten()
    found[slice(*pair.b)] = torch.tensor(b, dtype=torch.float64).flatten()
    return found


def products(pair, vectors):
    return pair.left(vectors) @ pair.right(vectors)


def mean_product(pair, vectors, row):
    return torch.einsum("n,noi->oi", row, products(pair, vectors))


def truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def merged(layout, vectors, weights):
    return product_means(pairs_of(layout), vectors, weights, weights @ vectors)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------- where the factors are


def test_pairs_are_found_by_their_names():
    """A [2, 5] and B [6, 2] of the first layer, then A [2, 6] and B [4, 2] of the second."""
    first, second = pairs_of(layout_of(adapted()))
    assert (first.layer, first.a, first.b, first.rank, first.fan_in, first.fan_out) == ("0", (0, 10), (10, 22), 2, 5, 6)
    assert (second.layer, second.a, second.b, second.rank) == ("2", (22, 34), (34, 42), 2)
    assert (second.fan_in, second.fan_out) == (6, 4)


def test_the_factors_of_a_pair_give_what_the_layer_adds():
    module = adapted().double()
    with torch.no_grad():
        module[0].lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
    layout, x = layout_of(module), torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (product, *_) = products(pairs_of(layout)[0], layout.read(module)[None])
    torch.testing.assert_close(module[0](x) - module[0].base(x), x @ product.T)


def test_a_layer_with_one_frozen_factor_has_no_pair():
    module = adapted()
    module[0].lora_A.requires_grad_(False)
    assert [pair.layer for pair in pairs_of(layout_of(module))] == ["2"]


def test_networks_without_adapters_have_no_pairs():
    assert pairs_of(layout_of(perceptron())) == ()


def test_adapters_are_told_by_their_names():
    assert layout_of(adapted()).has_adapters
    assert not layout_of(perceptron()).has_adapters
    frozen = adapted()
    frozen[0].lora_A.requires_grad_(False)
    frozen[2].lora_A.requires_grad_(False)
    assert layout_of(frozen).has_adapters  # B alone is an adapter too
    scaled = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    scaled[0].ia3_l = nn.ParameterDict({"default": nn.Parameter(torch.ones(2))})
    assert layout_of(scaled).has_adapters


# ---------------------------------------------------------------------------------------- how far averaging is off


def test_the_error_of_averaging_factors_by_hand():
    """Products 1·1 and 3·3 have the mean 5; the mean factors 2 and 2 give 4."""
    layout = one_layer(1, 1, 1)
    both = torch.stack([vector(layout, [[1.0]], [[1.0]]), vector(layout, [[3.0]], [[3.0]])])
    found = averaging_error(pairs_of(layout), both, rows([0.5, 0.5]))
    torch.testing.assert_close(found, rows(abs(2 * 2 - (1 * 1 + 3 * 3) / 2) / 5))


def test_the_error_of_averaging_is_that_of_the_dense_products():
    layout = layout_of(adapted().double())
    vectors, weights = vectors_of(layout, 4), rows([0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1])
    for k, found in enumerate(averaging_error(pairs_of(layout), vectors, weights).tolist()):
        off = size = 0.0
        for pair in pairs_of(layout):
            wanted, (given, *_) = mean_product(pair, vectors, weights[k]), products(pair, weights[k : k + 1] @ vectors)
            off, size = off + float((given - wanted).square().sum()), size + float(wanted.square().sum())
        assert found == pytest.approx((off / size) ** 0.5, rel=1e-10)


def test_averaging_is_right_where_one_factor_is_shared_or_one_adapter_counts():
    layout = layout_of(adapted().double())
    vectors = vectors_of(layout, 3)
    assert float(averaging_error(pairs_of(layout), vectors, rows([0.0, 1.0, 0.0]))) < 1e-7  # the root of 1e-16
    for pair in pairs_of(layout):
        vectors[:, slice(*pair.a)] = vectors[0, slice(*pair.a)]
    assert float(averaging_error(pairs_of(layout), vectors, rows([0.2, 0.3, 0.5]))) < 1e-7


def test_adapters_that_add_nothing_yet_average_without_error():
    layout = layout_of(adapted().double())
    vectors = vectors_of(layout, 3)
    for pair in pairs_of(layout):
        vectors[:, slice(*pair.b)] = 0
    assert averaging_error(pairs_of(layout), vectors, rows([0.2, 0.3, 0.5])).tolist() == [0.0]


# ---------------------------------------------------------------------------------------- means of products


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 6),
    rank=st.integers(1, 4),
    fan_in=st.integers(4, 9),
    fan_out=st.integers(1, 9),
    spread=st.sampled_from([0.01, 0.3, 3.0]),
)
def test_no_product_of_that_rank_is_nearer_to_the_mean(seed, count, rank, fan_in, fan_out, spread):
    """Eckart and Young: the squared error is the sum of the squared singular values that were left out."""
    layout = one_layer(fan_in, fan_out, rank)
    (pair,), vectors = pairs_of(layout), vectors_of(layout, count, seed, spread)
    row = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(count)))
    wanted = mean_product(pair, vectors, row)
    left_out = torch.linalg.svdvals(wanted)[rank:]
    (found, *_) = products(pair, merged(layout, vectors, row[None]))
    size = float(wanted.norm())
    assert float((found - wanted).norm()) == pytest.approx(float(left_out.norm()), abs=1e-9 * size)


def test_the_mean_is_the_truncated_dense_one_layer_by_layer_and_row_by_row():
    layout = layout_of(adapted((7, 9, 8), rank=3).double())
    vectors = vectors_of(layout, 5)
    weights = torch.from_numpy(np.random.default_rng(3).dirichlet(np.ones(5), size=4))
    found = merged(layout, vectors, weights)
    for pair in pairs_of(layout):
        for k, row in enumerate(weights):
            wanted = truncated(mean_product(pair, vectors, row), pair.rank)
            torch.testing.assert_close(products(pair, found)[k], wanted, **CLOSE)


def test_it_is_exact_where_the_rank_suffices():
    """Two adapters of rank 1 written with rank 2: the second half of each factor is 0."""
    layout = one_layer(6, 5, 2)
    (pair,), vectors = pairs_of(layout), vectors_of(layout, 2)
    vectors[:, slice(*pair.a)].view(2, 2, 6)[:, 1] = 0
    vectors[:, slice(*pair.b)].view(2, 5, 2)[:, :, 1] = 0
    row = rows([0.3, 0.7])
    (found, *_) = products(pair, merged(layout, vectors, row))
    torch.testing.assert_close(found, mean_product(pair, vectors, row[0]), **CLOSE)


def test_with_all_weight_on_one_adapter_it_is_that_adapter():
    layout = layout_of(adapted().double())
    vectors = vectors_of(layout, 3)
    torch.testing.assert_close(merged(layout, vectors, rows([0.0, 1.0, 0.0]))[0], vectors[1], **CLOSE)


def test_by_hand():
    """Rank 1: products [[2, 0], [0, 0]] and [[0, 0], [0, 1]] have the mean diag(1, ½), of which diag(1, 0) is kept.

    Its rows are spanned by (1, 0). The mean A is (½, ½), of which (½, 0) lies there; B must then be (2, 0).
    """
    layout = one_layer(2, 2, 1)
    both = torch.stack([vector(layout, [[1.0, 0.0]], [[2.0], [0.0]]), vector(layout, [[0.0, 1.0]], [[0.0], [1.0]])])
    found = merged(layout, both, rows([0.5, 0.5]))[0]
    torch.testing.assert_close(found, vector(layout, [[(1 + 0) / 2, 0.0]], [[1 / 0.5], [0.0]]), **CLOSE)


def test_a_is_the_averaged_one_projected_on_the_rows_of_the_product():
    layout = one_layer(7, 6, 2)
    (pair,), vectors, row = pairs_of(layout), vectors_of(layout, 4, spread=0.5), rows([0.1, 0.2, 0.3, 0.4])
    kept = torch.linalg.svd(mean_product(pair, vectors, row[0]))[2][:2]
    averaged = pair.right(row @ vectors)[0]
    torch.testing.assert_close(pair.right(merged(layout, vectors, row))[0], averaged @ kept.T @ kept, **CLOSE)


def test_adapters_that_are_near_each_other_keep_their_factors():
    """To first order averaging the factors is right, so nothing may move by more than the square of the spread."""
    layout = layout_of(adapted().double())
    vectors, row = vectors_of(layout, 4, spread=1e-4), rows([0.1, 0.2, 0.3, 0.4])
    assert float((merged(layout, vectors, row) - row @ vectors).abs().max()) < 1e-6


def test_adapters_that_add_nothing_yet_keep_their_averaged_a():
    layout = layout_of(adapted().double())
    vectors, row = vectors_of(layout, 3), rows([0.2, 0.3, 0.5])
    for pair in pairs_of(layout):
        vectors[:, slice(*pair.b)] = 0
    torch.testing.assert_close(merged(layout, vectors, row), row @ vectors, **CLOSE)


def test_the_rows_that_a_product_of_lower_rank_does_not_use_are_the_averaged_ones():
    """Only the first row of A is in use (B's second column is 0), and all agree on it: A stays as it is, averaged."""
    layout = one_layer(6, 5, 2)
    (pair,), vectors, row = pairs_of(layout), vectors_of(layout, 3), rows([0.2, 0.3, 0.5])
    vectors[:, slice(*pair.b)].view(3, 5, 2)[:, :, 1] = 0
    vectors[:, slice(*pair.a)].view(3, 2, 6)[:, 0] = vectors[0, slice(*pair.a)].view(2, 6)[0]
    torch.testing.assert_close(merged(layout, vectors, row), row @ vectors, **CLOSE)


@pytest.mark.parametrize(("fan_in", "fan_out", "rank"), [(3, 5, 4), (5, 3, 4), (1, 1, 2)])
def test_a_rank_above_the_width_of_the_layer_is_exact(fan_in, fan_out, rank):
    layout = one_layer(fan_in, fan_out, rank)
    (pair,), vectors, row = pairs_of(layout), vectors_of(layout, 3), rows([0.2, 0.3, 0.5])
    (found, *_) = products(pair, merged(layout, vectors, row))
    torch.testing.assert_close(found, mean_product(pair, vectors, row[0]), **CLOSE)
    vectors[:, slice(*pair.b)] = 0
    torch.testing.assert_close(merged(layout, vectors, row), row @ vectors, **CLOSE)


@pytest.mark.parametrize("off", [0.0, 1e-6, 1e-4])
def test_factors_stay_of_one_size_where_the_averaged_a_says_nothing_about_the_product(off):
    """A and −A with B and −B: one product, but the averaged A has next to nothing along its rows."""
    layout = one_layer(4, 3, 1)
    a, b = [[1.0, 2.0, 0.0, 0.0]], [[1.0], [0.0], [2.0]]  # each as long as the other, √5
    other = vector(layout, [[-1.0, -2.0, 2 * off, 0.0]], [[-1.0], [0.0], [-2.0]])
    both, row = torch.stack([vector(layout, a, b), other]), rows([0.5, 0.5])
    (pair,), found = pairs_of(layout), merged(layout, both, row)
    torch.testing.assert_close(products(pair, found)[0], truncated(mean_product(pair, both, row[0]), 1), **CLOSE)
    assert float(pair.right(found).norm()) == pytest.approx(5**0.5, rel=1e-5)
    assert float(pair.left(found).norm()) == pytest.approx(5**0.5, rel=1e-5)


def test_factors_whose_average_leaves_out_one_row_still_give_the_product():
    """Rank 2, two adapters with opposite second rows: the averaged A has rank 1, the product rank 2."""
    layout = one_layer(4, 4, 2)
    one = vector(layout, [[1.0, 0, 0, 0], [0, 1.0, 0, 0]], [[1.0, 0], [0, 1.0], [0, 0], [0, 0]])
    two = vector(layout, [[1.0, 0, 0, 0], [0, -1.0, 0, 0]], [[1.0, 0], [0, -1.0], [0, 0], [0, 0]])
    (pair,), both, row = pairs_of(layout), torch.stack([one, two]), rows([0.5, 0.5])
    found = merged(layout, both, row)
    torch.testing.assert_close(products(pair, found)[0], torch.diag(rows(1.0, 1, 0, 0)), **CLOSE)
    assert float(found.abs().max()) < 10


def test_entries_outside_of_the_pairs_are_left_alone():
    layout = layout_of(adapted().double())
    vectors, weights = vectors_of(layout, 3), rows([0.2, 0.3, 0.5])
    means = torch.full((1, layout.num_params), 7.0, dtype=torch.float64)
    given = means.clone()
    found = product_means(pairs_of(layout), vectors, weights, means)
    assert torch.equal(found[:, 42:], means[:, 42:])  # the output layer
    assert not torch.equal(found[:, :42], means[:, :42])
    assert torch.equal(means, given)


def test_the_result_has_the_type_of_the_means():
    layout = layout_of(adapted())
    vectors, weights = vectors_of(layout, 3).float(), rows([0.2, 0.3, 0.5])
    found = product_means(pairs_of(layout), vectors, weights, (weights.float() @ vectors))
    assert found.dtype == torch.float32
    wide = merged(layout, vectors.double(), weights)
    for pair in pairs_of(layout):
        torch.testing.assert_close(products(pair, found), products(pair, wide), rtol=1e-4, atol=1e-5)
