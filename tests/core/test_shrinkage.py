"""How far a model's own update leaves the common one, by hand and in its limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.core.shrinkage import shrunk_updates
from fedmerge.core.soup import shares
from fedmerge.core.sums import weighted_sum


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_case(seed, C=6, d=3, P=8):
    source = torch.Generator().manual_seed(seed)
    updates = torch.randn(C, P, dtype=torch.float64, generator=source)
    weights = torch.softmax(torch.randn(C, d, dtype=torch.float64, generator=source), dim=1)
    counts = torch.randint(1, 50, (C,), generator=source)
    return updates, shares(weights, counts), counts / counts.sum(dtype=torch.float64)


def test_two_clients_and_two_models_by_hand():
    """g = 0 and 4, m = (1/2, 1/2), a_1 = (3/4, 1/4), a_2 = (1/4, 3/4).

    U = (1, 3), Ū = 2, ‖U_j − Ū‖² = 1.
    Σ a‖g − U‖²: model 1 = 3/4 · 1 + 1/4 · 9 = 3; 1 − Σ a² = 1 − 10/16 = 3/8, so s² = 8.
    Σ (a − m)² = 2/16 = 1/8, so v = 1 and λ = 1 − strength · 1 / 1. With 0.3 that is 0.7: 2 ∓ 0.7.
    """
    updates = column([0.0], [4.0])
    share = column([0.75, 0.25], [0.25, 0.75])
    found = shrunk_updates(updates, share, column(0.5, 0.5), strength=0.3)
    torch.testing.assert_close(found, column([1.3], [2.7]))


@pytest.mark.parametrize("strength", [1.0, 5.0])
def test_where_chance_explains_the_difference_the_models_move_together(strength):
    """The case above has v_j = ‖U_j − Ū‖²: λ = max(0, 1 − strength) = 0."""
    share = column([0.75, 0.25], [0.25, 0.75])
    found = shrunk_updates(column([0.0], [4.0]), share, column(0.5, 0.5), strength=strength)
    torch.testing.assert_close(found, column([2.0], [2.0]))


def test_replies_that_agree_inside_each_model_are_not_shrunk():
    """Two clients per model with the same reply: no spread, so nothing that chance could explain."""
    updates = column([1.0], [1.0], [5.0], [5.0])
    share = column([0.5, 0.0], [0.5, 0.0], [0.0, 0.5], [0.0, 0.5])
    found = shrunk_updates(updates, share, column(0.25, 0.25, 0.25, 0.25), strength=1.0)
    torch.testing.assert_close(found, column([1.0], [5.0]))


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_strength_zero_is_each_models_own_average(seed):
    updates, share, proportions = random_case(seed)
    assert torch.equal(shrunk_updates(updates, share, proportions, strength=0.0), weighted_sum(share, updates))


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_a_huge_strength_is_the_common_average(seed):
    updates, share, proportions = random_case(seed)
    common = weighted_sum(proportions[:, None], updates).expand(3, -1)
    torch.testing.assert_close(shrunk_updates(updates, share, proportions, strength=1e12), common)


@given(seed=st.integers(0, 2**31), strength=st.floats(0.01, 10))
@settings(max_examples=25, deadline=None)
def test_every_update_lies_between_the_common_one_and_its_own(seed, strength):
    updates, share, proportions = random_case(seed)
    own, common = weighted_sum(share, updates), weighted_sum(proportions[:, None], updates)
    kept = ((shrunk_updates(updates, share, proportions, strength=strength) - common) / (own - common)).mean(dim=1)
    assert bool(((kept >= 0) & (kept <= 1 + 1e-12)).all())


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_the_order_of_clients_does_not_matter(seed):
    updates, share, proportions = random_case(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    straight = shrunk_updates(updates, share, proportions, strength=0.3)
    torch.testing.assert_close(straight, shrunk_updates(updates[order], share[order], proportions[order], strength=0.3))


def test_a_model_that_nobody_uses_stays_where_it_is():
    share = column([0.5, 0.0], [0.5, 0.0])
    found = shrunk_updates(column([1.0], [3.0]), share, column(0.5, 0.5), strength=0.3)
    assert found[1].tolist() == [0.0]


@given(seed=st.integers(0, 2**31), shorten=st.floats(0.1, 1.0))
@settings(max_examples=25, deadline=None)
def test_the_spread_is_that_of_the_replies_one_by_one(seed, shorten):
    """Also where shares do not sum to 1, as behind a largest share of one client."""
    updates, share, proportions = random_case(seed)
    share = share.clamp_max(shorten * float(share.max()))
    own, common = weighted_sum(share, updates), weighted_sum(proportions[:, None], updates)
    spread = (share[:, :, None] * (updates[:, None] - own[None]) ** 2).sum(dim=(0, 2))
    chance = spread / (1 - (share**2).sum(dim=0)) * ((share - proportions[:, None]) ** 2).sum(dim=0)
    keep = (1 - 0.3 * chance / (own - common).square().sum(dim=1)).clamp_min(0)[:, None]
    expected = common + keep * (own - common)
    torch.testing.assert_close(shrunk_updates(updates, share, proportions, strength=0.3), expected)
    known = updates.square().sum(dim=1)
    torch.testing.assert_close(shrunk_updates(updates, share, proportions, strength=0.3, squares=known), expected)


def test_one_model_takes_the_common_average_as_it_is():
    found = shrunk_updates(column([1.0], [3.0]), column([0.25], [0.75]), column(0.25, 0.75), strength=9.0)
    assert found.tolist() == [[2.5]]


def test_updates_of_zero_stay_zero():
    found = shrunk_updates(
        torch.zeros(2, 3).double(), column([0.75, 0.25], [0.25, 0.75]), column(0.5, 0.5), strength=0.3
    )
    assert torch.equal(found, torch.zeros(2, 3).double())


def test_a_model_with_a_single_client_follows_it():
    """One reply has no spread that could be measured; rounding must not invent one."""
    updates = 1e3 * torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = shrunk_updates(updates, torch.eye(2).double(), column(0.5, 0.5), strength=0.3)
    torch.testing.assert_close(found, updates, rtol=1e-6, atol=1e-6)
