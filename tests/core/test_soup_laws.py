"""Laws of merging: the gradient of the objective, the weights' sums, and accuracy where models are close."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fedmerge.core.soup import Soup, logit_gradient, merge, mixing, shares
from fedmerge.core.sums import (
    BLOCK,
    ROWS,
    along,
    centred,
    centred_products,
    compared,
    inner_products,
    shares_of_examples,
    squared_norms,
    weighted_sum,
)

QUICK = settings(max_examples=30, deadline=None)
SHAPES = {"N": st.integers(1, 6), "d": st.integers(1, 5), "seed": st.integers(0, 2**31)}


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quadratic(theta, client):
    return 0.5 * ((1 + client) * theta - normal(client, len(theta))).square().sum()


def softest_maximum(theta, client):
    return torch.logsumexp(theta * normal(50 + client, len(theta)), dim=0)


def small_network(theta, client):
    """2 inputs, 3 hidden units, 2 classes, 4 examples: P = 2·3 + 3 + 3·2 + 2 = 17."""
    hidden = torch.tanh(normal(99 + client, 4, 2) @ theta[:6].reshape(2, 3) + theta[6:9])
    return functional.cross_entropy(hidden @ theta[9:15].reshape(3, 2) + theta[15:17], torch.tensor([0, 1, 1, 0]))


LOSSES = [quadratic, softest_maximum, small_network]


def problem(N, d, seed):
    models, logits = normal(seed, d, 17), normal(seed + 1, N, d)
    proportions = functional.softmax(normal(seed + 2, N), dim=0)
    return models, logits, proportions


def objective(models, logits, proportions, loss):
    merged = torch.softmax(logits, dim=1) @ models
    return sum(p * loss(theta, i) for i, (p, theta) in enumerate(zip(proportions, merged, strict=True)))


def client_gradients(models, weights, loss):
    merged = merge(models, weights).requires_grad_()
    total = sum(loss(theta, i) for i, theta in enumerate(merged))
    return torch.autograd.grad(total, merged)[0]


@pytest.mark.parametrize("loss", LOSSES)
@given(**SHAPES)
@QUICK
def test_the_logit_gradient_is_the_gradient_of_the_objective(loss, N, d, seed):
    models, logits, proportions = problem(N, d, seed)
    weights = mixing(logits)
    ours = logit_gradient(weights, along(models, client_gradients(models, weights, loss), weights), proportions)
    free = logits.clone().requires_grad_()
    theirs = torch.autograd.grad(objective(models, free, proportions, loss), free)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@given(**SHAPES)
@QUICK
def test_the_model_gradient_is_the_weighted_sum_of_replies(N, d, seed):
    models, logits, proportions = problem(N, d, seed)
    weights = mixing(logits)
    ours = weighted_sum(proportions[:, None] * weights, client_gradients(models, weights, small_network))
    free = models.clone().requires_grad_()
    theirs = torch.autograd.grad(objective(free, logits, proportions, small_network), free)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@given(**SHAPES)
@QUICK
def test_rows_of_the_mixing_weights_and_columns_of_the_shares_sum_to_one(N, d, seed):
    weights = mixing(5 * normal(seed, N, d))
    counts = torch.randint(1, 1000, (N,), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        shares(weights, counts).sum(dim=0), torch.ones(d, dtype=torch.float64), rtol=0, atol=1e-14
    )


@given(shift=st.floats(-50, 50), **SHAPES)
@QUICK
def test_a_constant_added_to_a_row_of_logits_changes_nothing(N, d, seed, shift):
    logits = normal(seed, N, d)
    torch.testing.assert_close(mixing(logits + shift), mixing(logits), rtol=1e-12, atol=1e-14)


@given(**SHAPES)
@QUICK
def test_replies_along_the_models_vanish_under_their_own_weights(N, d, seed):
    weights = mixing(normal(seed, N, d))
    pull = along(normal(seed + 1, d, 17), normal(seed + 2, N, 17), weights)
    torch.testing.assert_close((weights * pull).sum(dim=1), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)


def test_shares_by_hand():
    weights, counts = torch.tensor([[0.5, 1.0], [0.5, 0.0]]).double(), torch.tensor([1, 3])
    expected = [[1 * 0.5 / (0.5 + 1.5), 1.0], [3 * 0.5 / (0.5 + 1.5), 0.0]]
    assert shares(weights, counts).tolist() == expected


def test_a_model_that_nobody_uses_gets_no_share():
    weights, counts = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double(), torch.tensor([2, 2])
    assert shares(weights, counts).tolist() == [[0.5, 0.0], [0.5, 0.0]]


def test_shares_of_examples_by_hand():
    assert shares_of_examples(torch.tensor([1, 3])).tolist() == [[0.25], [0.75]]


def test_merging_by_hand():
    models = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert merge(models, torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist() == [[2.0, 2.0], [1.0, 0.0]]


def test_the_soup_refuses_models_and_logits_of_different_number(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own shape check would be first
    with pytest.raises(ValueError, match="holds 2 models but its logits have 3 columns"):
        Soup(torch.zeros(2, 4), torch.zeros(1, 5, 3))


def test_inner_products_are_accurate_where_models_are_close():
    """Models that differ by 1e-4 of their size; a float32 product rounds most of the difference away."""
    base, noise, updates = (
        normal(0, 1, 20_000).float(),
        1e-4 * normal(1, 4, 20_000).float(),
        normal(2, 6, 20_000).float(),
    )
    models, weights = base + noise, mixing(torch.zeros(6, 4, dtype=torch.float64))
    exact = torch.einsum(
        "jip,ip->ij", models.double()[:, None] - merge(models.double(), weights)[None], updates.double()
    )
    naive = updates @ models.T - (updates * merge(models, weights)).sum(dim=1, keepdim=True)
    size = exact.abs().max()
    assert (naive.double() - exact).abs().max() / size > 1e-3
    assert (along(models, updates, weights) - exact).abs().max() / size < 1e-5


@pytest.mark.parametrize("d", [2, 3, 5, 7])
def test_identical_models_are_exactly_at_their_centre(d):
    assert torch.equal(centred(normal(4, 1, 1000).expand(d, -1)), torch.zeros(d, 1000, dtype=torch.float64))


def test_sums_over_blocks_are_the_sums_over_everything():
    left, right = normal(5, 2, BLOCK + 3), normal(6, 3, BLOCK + 3)
    torch.testing.assert_close(inner_products(left, right), left @ right.T)
    torch.testing.assert_close(squared_norms(left), left.square().sum(dim=1))
    torch.testing.assert_close(weighted_sum(normal(7, 3, 2), right), normal(7, 3, 2).T @ right)


@pytest.mark.parametrize("d", [1, 2, 5, 6, 7, 8, 14, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_pass_tells_what_several_would(d, dtype):
    """More rows and columns than one block; numbers of models with and without rows of zeros beside them."""
    models, updates = normal(8, d, BLOCK + 3).to(dtype), normal(9, 2 * ROWS + 3, BLOCK + 3).to(dtype)
    before, seen = updates.clone(), compared(models, updates)
    middle = centred(models)
    torch.testing.assert_close(seen.products, updates.double() @ middle.T)
    torch.testing.assert_close(seen.squares, updates.double().square().sum(dim=1))
    torch.testing.assert_close(seen.spread, middle.square().sum(dim=1))
    torch.testing.assert_close(seen.reach(), seen.squares.sqrt() * middle.norm(dim=1).max())
    torch.testing.assert_close(centred_products(models), middle @ middle.T)
    some, weights = slice(ROWS, ROWS + 2), normal(10, 2 * ROWS + 3, d)
    torch.testing.assert_close(weighted_sum(weights, updates), weights.T @ updates.double())
    assert torch.equal(seen.rows(some).along(weights[some]), seen.along(weights)[some])
    assert torch.equal(updates, before)


def test_a_float32_sum_is_taken_in_float64():
    """1 + 2^-30 is 1 in float32."""
    tiny = torch.tensor([[1.0], [2.0**-30]])
    assert float(weighted_sum(torch.ones(2, 1), tiny)) == 1 + 2.0**-30
