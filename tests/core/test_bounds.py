"""When a model is held back, who leaves it, and that nobody else notices."""

import torch

from fedmerge.core.bounds import GONE, LEAVE, distances, gaps, kept_together, mean_use, weighted_median
from fedmerge.core.sums import BLOCK

D = 5


def soup(apart=1.0, far=()):
    """Five models on an axis each, `apart` from the origin, those of `far` 100 times that; two clients for each."""
    models = apart * torch.eye(D, D + 2, dtype=torch.float64)
    for j in far:
        models[j] *= 100
    models[:, D:] = torch.arange(2 * D).reshape(D, 2).double()  # buffers
    logits = torch.eye(D, dtype=torch.float64).repeat(2, 1)[None]  # ten clients, two for every model
    return models, logits


def test_models_that_are_equally_far_from_each_other_stay_to_the_last_bit():
    models, logits = soup()
    after, rows = kept_together(models, logits, D, factor=1.1)
    assert after is models
    assert rows is logits


def test_a_remote_model_comes_within_the_limit_of_the_others_mean():
    models, logits = soup(far=[2])
    after, _ = kept_together(models, logits, D, factor=2.0)
    others = [0, 1, 3, 4]
    assert torch.equal(after[others], models[others])
    # the others are √2 apart; the limit is twice that, from their mean
    torch.testing.assert_close(
        (after[2, :D] - models[others, :D].mean(dim=0)).norm(), torch.tensor(8.0).double().sqrt()
    )
    assert torch.equal(after[:, D:], models[:, D:])  # buffers are no place


def test_rows_that_favour_another_model_leave_a_remote_one_and_its_own_stay():
    models, logits = soup(far=[2])
    _, rows = kept_together(models, logits, D, factor=2.0)
    moved = torch.zeros_like(logits)
    moved[0, [i for i in range(10) if i % D != 2], 2] = LEAVE
    torch.testing.assert_close(logits - rows, moved)


def test_rows_stop_where_nothing_is_left():
    models, logits = soup(far=[2])
    for _ in range(200):
        models_now, logits = kept_together(models, logits, D, factor=2.0)
    assert -GONE - LEAVE <= float(logits.min()) <= -GONE
    assert len(models_now) == D


def test_models_that_a_minority_favours_cannot_make_the_majority_remote():
    """Half of the models run away, each its own way, but three quarters of all weight are with the other half."""
    models = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [90.0, 0.0], [0.0, 90.0], [-90.0, 0.0]]).double()
    use = torch.tensor([0.25, 0.25, 0.25, 0.09, 0.08, 0.08]).double()
    typical, middle = gaps(models, use)
    assert (typical > 2 * middle).tolist() == [False, False, False, True, True, True]


def test_of_two_models_none_is_remote():
    models, logits = soup()
    after, _ = kept_together(models[:2] * 1000, logits[..., :2], D, factor=1.5)
    assert torch.equal(after, models[:2] * 1000)


def test_models_in_one_place_stay_there():
    models = torch.ones(4, 3)
    after, _ = kept_together(models, torch.zeros(1, 6, 4, dtype=torch.float64), 3, factor=2.0)
    assert torch.equal(after, models)


def test_the_bound_can_be_switched_off():
    models, logits = soup(far=[2])
    assert kept_together(models, logits, D, factor=0.0)[0] is models


def test_the_weighted_median_by_hand():
    values, weights = torch.tensor([9.0, 1.0, 5.0]), torch.tensor([0.3, 0.3, 0.4])
    assert float(weighted_median(values, weights)) == 5.0  # 1 has .3, 1 and 5 have .7
    assert float(weighted_median(values, torch.tensor([0.6, 0.2, 0.2]))) == 9.0


def test_distances_of_close_models_are_exact_in_float32():
    base = torch.full((1, 1000), 100.0)
    models = torch.cat([base, base + 1e-3, base])
    found = distances(models)
    step = (base.double() + 0 - (base + 1e-3).double()).norm()
    torch.testing.assert_close(found[0, 1], step)
    assert float(found[0, 2]) == 0.0


def test_mean_use_over_blocks_of_rows_is_that_over_all():
    logits = torch.randn(2, BLOCK + 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_use(logits), torch.softmax(logits, dim=-1).mean(dim=(0, 1)))
