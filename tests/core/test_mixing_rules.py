"""The four rules that move the logits, each on cases small enough for a pencil."""

import math

import pytest
import torch

from fedmerge.core.mixing import OFFICIAL_MAX_REPEATS, Moments, adam_step, gradient_step, mirror_step, official_step


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_official_step_by_hand():
    """Σ|slope| = 4, so r = ±1/4 and a repetition moves 0.01·p·r: 0.00125 for both rows (p = 1/2).

    0.01 is not passed before the ninth repetition: 8 · 0.00125 = 0.01 exactly is not more than 0.01.
    """
    moved = official_step(rows([0, 0], [0, 0]), rows([1, -1], [1, -1]), torch.tensor([0.5, 0.5]).double(), lr=0.01)
    torch.testing.assert_close(moved.abs(), torch.full((2, 2), 9 * 0.00125, dtype=torch.float64))
    assert torch.equal(moved.sign(), rows([-1, 1], [-1, 1]))


def test_the_official_step_stops_after_ten_thousand_and_one_repetitions():
    """A share of 1e-6 moves 0.01 · 1e-6 · 1/2 a repetition and would need 2,000,001 of them."""
    moved = official_step(rows([0, 0]), rows([1, -1]), torch.tensor([1e-6]).double(), lr=0.01)
    torch.testing.assert_close(moved, OFFICIAL_MAX_REPEATS * 0.01 * 1e-6 * 0.5 * rows([-1, 1]))


def test_the_official_step_ends_where_nobody_with_a_slope_has_examples():
    logits = rows([1, 2])
    assert torch.equal(official_step(logits, rows([1, -1]), torch.zeros(1).double(), lr=0.01), logits)


def test_the_official_step_of_one_row_depends_on_the_other():
    slope, louder, p = rows([1, -1], [1, -1]), rows([1, -1], [1000, -1000]), torch.tensor([0.5, 0.5]).double()
    calm, drowned = (official_step(rows([0, 0], [0, 0]), s, p, lr=0.01)[0] for s in (slope, louder))
    assert drowned.abs().max() < 0.01 * calm.abs().max()


def test_the_gradient_step_by_hand():
    assert gradient_step(rows([1, 2]), rows([0.5, -0.5]), lr=2.0).tolist() == [[0.0, 3.0]]


def test_the_first_adam_step_is_the_learning_rate_in_the_sign_of_the_gradient():
    memory = Moments(rows([0, 0]), rows([0, 0]), torch.tensor([0]))
    moved, after = adam_step(rows([0, 0]), rows([3, -0.2]), memory, lr=0.1)
    torch.testing.assert_close(moved, rows([-0.1, 0.1]))
    torch.testing.assert_close(after.first, 0.1 * rows([3, -0.2]))
    torch.testing.assert_close(after.second, 0.01 * rows([9, 0.04]))
    assert after.steps.tolist() == [1]


def test_adam_agrees_with_torch_over_many_steps():
    gradients = torch.randn(20, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([free], lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    logits, memory = (
        torch.zeros(3, 2).double(),
        Moments(*torch.zeros(2, 3, 2).double(), torch.zeros(3, dtype=torch.int64)),
    )
    for gradient in gradients:
        free.grad = gradient.clone()
        reference.step()
        logits, memory = adam_step(logits, gradient, memory, lr=0.1)
    torch.testing.assert_close(logits, free.detach(), rtol=1e-10, atol=1e-10)


def test_adam_counts_the_steps_of_each_row_apart():
    memory = Moments(rows([0], [0.5]), rows([0], [0.5]), torch.tensor([0, 9]))
    _, after = adam_step(rows([0], [0]), rows([1], [1]), memory, lr=0.1)
    assert after.steps.tolist() == [1, 10]


def test_the_mirror_step_by_hand():
    """(1 − 0.02) · (1 − 0.2 · 4/4) = 0.784 and (1 − 0.02) · (0 − 0.2 · (−2)/4) = 0.098."""
    moved = mirror_step(rows([1, 0]), rows([4, -2]), torch.ones(1).double(), lr=0.2, decay=0.02)
    torch.testing.assert_close(moved, rows([0.784, 0.098]))


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e9])
def test_the_mirror_step_does_not_depend_on_the_length_of_the_update(factor):
    along = rows([4, -2])
    one, other = (
        mirror_step(rows([1, 0]), f * along, f * torch.ones(1).double(), lr=0.2, decay=0.02) for f in (1.0, factor)
    )
    torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


def test_the_mirror_step_leaves_a_row_of_rounding_noise_alone():
    """A millionth of what the inner product could be is the floor."""
    logits, scale = rows([1, 0], [1, 0]), torch.ones(2).double()
    moved = mirror_step(logits, rows([9e-7, -9e-7], [1.1e-6, -1.1e-6]), scale, lr=0.2, decay=0.02)
    assert torch.equal(moved[0], logits[0])
    assert not torch.equal(moved[1], logits[1])


def test_repeated_mirror_steps_settle_where_decay_and_push_balance():
    """w = 0.98 (w + 0.2) has its fixed point at 0.98 · 0.2 / 0.02 = 9.8: weights stay away from one-hot."""
    logits = rows([0, 0])
    for _ in range(2000):
        logits = mirror_step(logits, rows([-1, 1]), torch.ones(1).double(), lr=0.2, decay=0.02)
    torch.testing.assert_close(logits, rows([9.8, -9.8]))
    assert math.isclose(float(torch.softmax(logits, 1)[0, 0]), 1 / (1 + math.exp(-19.6)))
