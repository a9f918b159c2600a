"""One server step of the authors' published implementation, in numbers that it left behind (tests/golden)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedmerge.algorithms.fedmerge import FedMerge, State
from fedmerge.core.errors import UsageError
from fedmerge.core.mixing import official_step
from fedmerge.core.protocol import Update, deliver
from fedmerge.core.soup import Soup, merge, mixing, shares
from fedmerge.core.sums import along, shares_of_examples, weighted_sum

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = ["one_big_client", "trained_weights", "two_models", "uniform_start"]
CLOSE = {"rtol": 0, "atol": 1e-6}  # the traces were computed in float32


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def tensor(trace, name):
    return torch.from_numpy(trace[name])


def last_layer(trace):
    """The authors' inner products run from the first tensor whose name contains 'linear'."""
    first = next(k for k, name in enumerate(trace["names"]) if "linear" in name)
    return int(trace["sizes"][:first].sum()), int(trace["sizes"].sum())


def state_of(trace):
    models, logits = tensor(trace, "theta"), tensor(trace, "logits")
    (N, d), P = logits.shape, models.shape[1]
    return State(
        soup=Soup(models, logits[None]),
        velocity=torch.zeros_like(models),
        progress=models.new_zeros(0, P),
        seen=torch.zeros(N, dtype=torch.int64),
        rounds=torch.tensor(0),
        searching=torch.tensor(False),
        gate=torch.tensor(float("nan"), dtype=torch.float64),
        moments=torch.zeros(2, 0, N, d, dtype=torch.float64),
        blocks=torch.tensor([[0, P]]),
        scope=torch.tensor([last_layer(trace)]),
        adapters=torch.tensor(False),
    )


@pytest.mark.parametrize("name", TRACES)
def test_the_method_repeats_the_authors_step(name):
    trace = load(name)
    state, everyone = state_of(trace), torch.arange(len(trace["logits"]))
    algorithm = FedMerge(
        rule="official", num_models=len(trace["theta"]), mixing_lr=float(trace["learning_rate_w"]), proximal=0.0
    )
    merged = algorithm.send(state, everyone)
    after = deliver(algorithm, state, everyone, Update(tensor(trace, "updates")), tensor(trace, "num_samples"))
    torch.testing.assert_close(merged, tensor(trace, "merged"), **CLOSE)
    torch.testing.assert_close(after.soup.logits[0], tensor(trace, "new_logits"), **CLOSE)
    torch.testing.assert_close(after.soup.models, tensor(trace, "new_theta"), **CLOSE)


@pytest.mark.parametrize("name", TRACES)
def test_the_core_functions_repeat_the_authors_step(name):
    trace = load(name)
    models, logits, updates = (tensor(trace, key) for key in ("theta", "logits", "updates"))
    counts, (a, b) = tensor(trace, "num_samples"), last_layer(trace)
    weights = mixing(logits)
    slope = weights * along(models[:, a:b], updates[:, a:b], weights)
    moved = official_step(logits, slope, shares_of_examples(counts)[:, 0], lr=float(trace["learning_rate_w"]))
    theta = models - weighted_sum(shares(mixing(moved), counts), updates)
    torch.testing.assert_close(merge(models, weights), tensor(trace, "merged"), **CLOSE)
    torch.testing.assert_close(moved, tensor(trace, "new_logits"), **CLOSE)
    torch.testing.assert_close(theta, tensor(trace, "new_theta"), **CLOSE)


def test_the_traces_would_notice_inner_products_over_all_layers():
    trace = load("trained_weights")
    models, logits, updates = (tensor(trace, key) for key in ("theta", "logits", "updates"))
    weights = mixing(logits)
    slope = weights * along(models, updates, weights)
    counts = shares_of_examples(tensor(trace, "num_samples"))[:, 0]
    moved = official_step(logits, slope, counts, lr=float(trace["learning_rate_w"]))
    assert float((moved - tensor(trace, "new_logits")).abs().max()) > 1e-4


def test_one_model_where_the_authors_code_gives_nan_is_refused():
    assert np.isnan(load("single_model")["new_logits"]).all()
    with pytest.raises(UsageError, match="num_models: got 1 with rule='official', which divides by zero there"):
        FedMerge(rule="official", num_models=1)


def test_a_slope_of_zero_leaves_the_logits_where_the_authors_divide_by_zero():
    trace = load("single_model")
    logits, weights = tensor(trace, "logits"), mixing(tensor(trace, "logits"))
    slope = weights * along(tensor(trace, "theta"), tensor(trace, "updates"), weights)
    proportions = shares_of_examples(tensor(trace, "num_samples"))[:, 0]
    assert torch.equal(official_step(logits, slope, proportions, lr=0.01), logits)
