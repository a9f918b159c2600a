"""One client's whole contribution to all models is never longer than the clip, whatever it sends."""

import math

import numpy as np
import pytest
import torch

from fedmerge.core.private import (
    KEY_BITS,
    SLACK,
    clip_factors,
    clipped_sum,
    contribution_weights,
    noise,
    number_of,
    public_denominator,
    secret_key,
    signal_to_noise,
    words_of,
)

CASES = 100_000
CLIENTS = 1000
ROUNDING = 1e-12
"""Of the others' sum, whose additions are rounded differently with and without one client; relative to its length."""


def rows_of(rng, d, kind):
    """Merging weights: anything on the simplex, one-hot, uniform, nearly nothing for one model."""
    if kind == "one-hot":
        return torch.eye(d, dtype=torch.float64)[torch.from_numpy(rng.integers(d, size=CLIENTS))]
    if kind == "uniform":
        return torch.full((CLIENTS, d), 1 / d, dtype=torch.float64)
    logits = rng.normal(size=(CLIENTS, d)) * (30 if kind == "tiny shares" else 1)
    return torch.softmax(torch.from_numpy(logits), dim=1)


def updates_of(rng, kind, size):
    """Updates: of any length over 30 orders of magnitude, on one axis, all alike, nothing at all."""
    drawn = rng.normal(size=(CLIENTS, size))
    if kind == "axis":
        drawn *= np.eye(size)[rng.integers(size, size=CLIENTS)]
    if kind == "alike":
        drawn[:] = drawn[0]
    if kind == "nothing":
        drawn[::2] = 0
    return torch.from_numpy(drawn * 10.0 ** rng.uniform(-15, 15, size=(CLIENTS, 1)))


def kinds():
    rows = ("simplex", "one-hot", "uniform", "tiny shares")
    return [(row, update) for row in rows for update in ("any", "axis", "alike", "nothing")]


def test_one_hundred_thousand_clients_come_and_go_and_never_move_the_sum_by_more_than_the_clip():
    """d from 1 to 9, with and without counts; the contribution is written down in full, d·P numbers."""
    seen = 0
    for trial in range(math.ceil(CASES / CLIENTS)):
        rng = np.random.default_rng([41, trial])
        row, update = kinds()[trial % 16]
        d, P, clip = int(rng.integers(1, 10)), int(rng.integers(1, 9)), float(10 ** rng.uniform(-6, 6))
        weights, updates = rows_of(rng, d, row), updates_of(rng, update, P)
        counts = torch.from_numpy(rng.integers(1, 10**12 if trial % 3 else 50, size=CLIENTS))
        scale = contribution_weights(counts, None if trial % 2 else 20)
        each = clip_factors(weights, updates, scale, clip=clip) * scale
        whole = each[:, None, None] * weights[:, :, None] * updates[:, None, :]
        assert bool((whole.flatten(1).norm(dim=1) <= clip).all())
        gone = int(rng.integers(CLIENTS))
        left = torch.arange(CLIENTS) != gone
        everyone = clipped_sum(weights, updates, scale, clip=clip)
        others = clipped_sum(weights[left], updates[left], scale[left], clip=clip)
        assert float((everyone - others).norm()) <= clip + ROUNDING * CLIENTS * clip
        seen += CLIENTS
    assert seen >= CASES


def test_what_is_shorter_than_the_clip_passes_as_it_is():
    weights, updates = torch.tensor([[0.25, 0.75]]), torch.tensor([[3.0, 4.0]])
    # ‖u‖ = √(.25² + .75²) · 5
    clip = 5 * math.sqrt(0.625) / (1 - SLACK) * (1 + 1e-12)
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(
        clipped_sum(weights, updates, one, clip=clip),
        torch.tensor([[0.75, 1.0], [2.25, 3.0]], dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )


def test_clipping_is_joint_over_the_models():
    """Two models with weight .6 and .8 and an update of length 10: ‖u‖ = 10, cut to 2 as a whole."""
    found = clipped_sum(torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, 10.0]]), torch.ones(1), clip=2.0)
    torch.testing.assert_close(found, (1 - SLACK) * torch.tensor([[0, 1.2], [0, 1.6]], dtype=torch.float64))


def test_the_public_cap_scales_counts_to_one_at_most():
    counts = torch.tensor([1, 10, 40, 10**12])
    assert contribution_weights(counts, 40).tolist() == [1 / 40, 10 / 40, 1.0, 1.0]
    assert contribution_weights(counts, None).tolist() == [1.0] * 4
    assert contribution_weights(counts, None).dtype == torch.float64
    assert contribution_weights(torch.tensor([-5]), 40).tolist() == [0.0]


def test_a_count_below_the_cap_counts_before_clipping():
    """w = 1/4 makes ‖u‖ = 2.5, which a clip of 2.5 leaves alone."""
    one = torch.tensor([[1.0]]), torch.tensor([[10.0]]), torch.tensor([0.25], dtype=torch.float64)
    assert float(clipped_sum(*one, clip=2.5)) == pytest.approx(2.5, rel=2 * SLACK)
    assert float(clipped_sum(*one, clip=100.0)) == 2.5


def test_an_update_too_long_for_its_own_square_adds_nothing():
    found = clipped_sum(torch.ones(1, 1), torch.full((1, 2), 1e200, dtype=torch.float64), torch.ones(1), clip=1.0)
    assert found.tolist() == [[0.0, 0.0]]


def test_nobody_adds_nothing():
    nobody = torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, dtype=torch.float64)
    assert torch.equal(clipped_sum(*nobody, clip=1.0), torch.zeros(3, 4, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ noise


def test_noise_has_the_asked_standard_deviation_and_no_mean():
    drawn = noise((4, 50_000), std=2.5, key=7, round_number=3)
    assert drawn.dtype == torch.float64
    assert float(drawn.std()) == pytest.approx(2.5, rel=5 / math.sqrt(2 * 200_000))
    assert abs(float(drawn.mean())) < 5 * 2.5 / math.sqrt(200_000)


def test_noise_depends_on_key_and_round_alone():
    first = noise((2, 3), std=1.0, key=7, round_number=0)
    assert torch.equal(first, noise((2, 3), std=1.0, key=7, round_number=0))
    assert not torch.equal(first, noise((2, 3), std=1.0, key=7, round_number=1))
    assert not torch.equal(first, noise((2, 3), std=1.0, key=8, round_number=0))
    assert torch.equal(2 * first, noise((2, 3), std=2.0, key=7, round_number=0))
    assert len(first.unique()) == 6


def test_no_standard_deviation_is_no_noise():
    assert torch.equal(noise((2, 3), std=0.0, key=7, round_number=0), torch.zeros(2, 3, dtype=torch.float64))


def test_a_key_of_any_size_survives_as_words():
    for key in (0, 1, 2**32 - 1, 2**32, 2**63, 2**KEY_BITS - 1, 3**300):
        words = words_of(key)
        assert number_of(words) == key
        assert words.dtype == torch.int64
        assert bool(((words >= 0) & (words < 2**32)).all())
    assert len(words_of(0)) == len(words_of(2**32 - 1)) == 1
    assert len(words_of(2**32)) == 2


def test_secret_keys_are_long_and_never_the_same():
    keys = [secret_key() for _ in range(64)]
    assert len(set(keys)) == 64
    assert max(keys).bit_length() > KEY_BITS - 16  # of 64 keys none above 2^240 has probability 2^(-16·64)
    assert KEY_BITS >= 128


# ------------------------------------------------------------------------------------------------ public numbers


def test_the_denominator_is_the_expected_share_of_a_model():
    assert public_denominator(0.1, 1000, 4) == 0.1 * 1000 / 4
    assert public_denominator(1.0, 7, 1) == 7


def test_signal_to_noise_by_hand():
    """25 clients, noise of length z√P = 2·√100."""
    assert signal_to_noise(25.0, noise_multiplier=2.0, num_params=100) == 25 / 20
    assert signal_to_noise(25.0, noise_multiplier=0.05, num_params=100) == 25 / 0.5
    assert signal_to_noise(25.0, noise_multiplier=0.0, num_params=100) == math.inf
