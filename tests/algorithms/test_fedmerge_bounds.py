"""FedMerge's own bounds: shares, logits, and how far apart its models may come."""

from dataclasses import replace

import pytest
import torch

from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.core.protocol import Federation, Update, deliver
from fedmerge.core.soup import Soup, mixing

N, T = 6, 5
FACTS = Federation(N, T, (3, T), ((0, 3), (3, T)))
EVERYONE, COUNTS = torch.arange(N), torch.full((N,), 10)


def draw(j):
    return torch.randn(T, generator=torch.Generator().manual_seed(j), dtype=torch.float64)


def replies():
    return Update(torch.randn(N, T, generator=torch.Generator().manual_seed(9), dtype=torch.float64))


def with_rows(method, logits, models=None):
    state = method.init(draw, FACTS, 0)
    return replace(state, soup=Soup(state.soup.models if models is None else models, logits))


def plain(**options):
    """Three models that start apart, without momentum, shrinkage or a bound on gaps unless asked for."""
    base = {"num_models": 3, "initial": "noise", "momentum": 0.0, "shrinkage": 0.0, "max_gap": 0.0}
    return FedMerge(**{**base, **options})


def test_a_share_is_cut_and_the_rest_is_not_made_larger():
    """Client 0 alone favours model 0: nearly all of the model's step is its reply, of which `max_share` is left."""
    logits = torch.zeros(1, N, 3, dtype=torch.float64)
    logits[0, :, 1] = 200.0
    logits[0, 0] = torch.tensor([200.0, 0.0, 0.0])
    free, cut = plain(order="together"), plain(order="together", max_share=0.4)
    state = with_rows(free, logits)
    moved, less = (deliver(method, state, EVERYONE, replies(), COUNTS) for method in (free, cut))
    steps = [(state.soup.models - after.soup.models)[0] for after in (moved, less)]
    torch.testing.assert_close(steps[0], replies().delta[0])
    torch.testing.assert_close(steps[1], 0.4 * replies().delta[0])
    torch.testing.assert_close(moved.soup.models[1], less.soup.models[1])  # five clients with a fifth each


def test_one_model_with_a_cut_share_is_fedavg_with_it_bit_for_bit():
    counts = torch.tensor([10, 10, 10, 10, 10, 500])
    merge, average = FedMerge(num_models=1, momentum=0.0, max_share=0.3), FedAvg(max_share=0.3)
    left = deliver(merge, merge.init(draw, FACTS, 0), EVERYONE, replies(), counts)
    right = deliver(average, average.init(draw, FACTS, 0), EVERYONE, replies(), counts)
    assert torch.equal(left.soup.models, right.models)


@pytest.mark.parametrize("rule", ["mirror", "gradient", "adam"])
def test_logits_stay_within_the_limit(rule):
    method = plain(rule=rule, mixing_lr=500.0, max_logit=1.5)
    after = deliver(method, with_rows(method, torch.zeros(1, N, 3, dtype=torch.float64)), EVERYONE, replies(), COUNTS)
    assert float(after.soup.logits.abs().max()) == 1.5


def test_a_runaway_model_is_held_back_and_left():
    models = torch.eye(4, T, dtype=torch.float64)
    models[3] *= 1000
    logits = 3 * torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1, 2, 3]][None]
    bound, free = plain(num_models=4, max_gap=2.0), plain(num_models=4)
    nothing = Update(torch.zeros(N, T, dtype=torch.float64))
    held, left_alone = (
        deliver(method, with_rows(method, logits, models), EVERYONE, nothing, COUNTS) for method in (bound, free)
    )
    assert float(left_alone.soup.models[3].norm()) == 1000
    assert float(held.soup.models[3].norm()) < 5
    assert torch.equal(held.soup.models[:3], models[:3])
    others = mixing(held.soup.logits)[0, :5, 3] < mixing(left_alone.soup.logits)[0, :5, 3]
    assert bool(others.all())
    assert torch.equal(held.soup.logits[0, 5], left_alone.soup.logits[0, 5])  # whoever favours it keeps it
