"""Parts of the network that clients keep: any method on the rest, and FedPer and LG-FedAvg as its limits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmerge.algorithms import ALGORITHMS
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.algorithms.fedbabu import FedBabu
from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.algorithms.fedper import FedPer
from fedmerge.algorithms.fedprox import FedProx
from fedmerge.algorithms.fedrod import FedRod
from fedmerge.algorithms.lg_fedavg import LgFedAvg
from fedmerge.core.errors import UsageError
from fedmerge.core.keeping import Keeping, keeping
from fedmerge.core.protocol import tree_bytes
from fedmerge.core.ranges import gathered, rest, woven
from fedmerge.core.vector import layout_of
from fedmerge.runtime import Vectorised, personal_models, run_round
from fedmerge.training import Descent, one_pass
from small_federation import small

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
FEDERATION = replace(small(), descent=Descent(momentum=0.5, weight_decay=0.02))
"""Layers of 36 and 21 numbers: 0 is the body, 2 the output layer."""


def with_kept(method, *modules):
    return keeping(method, FEDERATION.layout, modules)


def models_after(method, kind=None, federation=FEDERATION):
    """Personal models after a round of all and a round of two clients."""
    engine = federation.engine(*([kind] if kind else []))
    state, fleet = federation.begin(method)
    for r, cohort in enumerate(([0, 1, 2, 3, 4, 5], [1, 4]), 1):
        counts = federation.counts[cohort]
        result = run_round(method, state, fleet, torch.tensor(cohort), federation.batches(cohort, r), counts, engine)
        state, fleet = result.state, result.fleet
    return torch.stack(personal_models(method, state, fleet, [one_pass(e, 4, 0.1) for e in federation.data], engine))


@pytest.mark.parametrize("kind", [None, Vectorised], ids=["sequential", "vectorised"])
def test_fedavg_whose_clients_keep_the_head_is_fedper(kind):
    torch.testing.assert_close(models_after(with_kept(FedAvg(), "head"), kind), models_after(FedPer(), kind), **CLOSE)


def test_fedavg_whose_clients_keep_the_body_is_lg_fedavg():
    torch.testing.assert_close(models_after(with_kept(FedAvg(), "0")), models_after(LgFedAvg()), **CLOSE)


def test_one_model_whose_clients_keep_the_head_is_fedper():
    merged = FedMerge(num_models=1, momentum=0.0, proximal=0.0)
    torch.testing.assert_close(models_after(with_kept(merged, "head")), models_after(FedPer()), **CLOSE)


def test_a_method_that_trains_on_slopes_of_its_own_moves_the_kept_part_too():
    """FedProx without its pull is FedAvg; with it the body stays closer to what was received."""
    free = models_after(with_kept(FedProx(proximal=0.0), "head"))
    torch.testing.assert_close(free, models_after(FedPer()), **CLOSE)
    held = models_after(with_kept(FedProx(proximal=5.0), "head"))
    start = FEDERATION.draw(0)
    assert (held - start)[:, :36].norm() < (free - start)[:, :36].norm()
    assert (held - start)[:, 36:].norm() > 0


def test_only_the_rest_is_sent():
    """36 of 57 numbers in float64, and nothing of the head in the server's state."""
    method = with_kept(FedMerge(num_models=2), "head")
    state, _ = FEDERATION.play(method, rounds=4)
    assert method.cost(state).bytes_down == method.cost(state).bytes_up == 36 * 8
    assert tree_bytes(method.send(state, torch.tensor([0]))) == 36 * 8
    assert state.soup.models.shape == (2, 36)


def test_a_client_that_takes_no_part_keeps_what_it_has():
    method = with_kept(FedAvg(), "head")
    state, fleet = FEDERATION.begin(method)
    steps = FEDERATION.batches([1, 4], 1)
    after = run_round(method, state, fleet, torch.tensor([1, 4]), steps, FEDERATION.counts[[1, 4]], FEDERATION.engine())
    start = FEDERATION.draw(0)[36:]
    moved = [not torch.equal(private.own, start) for private in after.fleet.private]
    assert moved == [False, True, False, False, True, False]


def test_nothing_to_keep_is_the_method_itself():
    method = FedAvg()
    assert with_kept(method) is method


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (("haed",), "unknown module with trainable parameters 'haed'; did you mean 'head'"),
        (("1",), "unknown module with trainable parameters '1'"),  # ReLU
        (("0", "head"), "keep: 0, head are the whole network: nothing would be sent; use method local"),
    ],
)
def test_what_cannot_be_kept_is_refused(modules, message):
    with pytest.raises(UsageError, match=message):
        with_kept(FedAvg(), *modules)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FedPer(), "the clients keep the output layer already .*use method fedavg"),
        (FedBabu(), "the clients keep the output layer already .*use method fedavg"),
        (FedRod(), "the output layer is not one linear layer with a bias, which this method needs"),
        (FedMerge(rule="official"), "expected scope='all' and another `rows`"),
        (FedMerge(rows="body-head"), "expected scope='all' and another `rows`"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_methods_that_need_the_head_are_refused_where_clients_keep_it(method, message):
    with pytest.raises(UsageError, match=message):
        FEDERATION.begin(with_kept(method, "head"))


@pytest.mark.parametrize("name", ["apfl", "ditto", "fedala", "fedem", "femam", "gated-mixture", "per-fedavg", "pfedme"])
def test_methods_whose_clients_train_several_networks_are_refused(name):
    with pytest.raises(
        UsageError, match="train several networks in a round, and which of them would have the kept part"
    ):
        with_kept(ALGORITHMS[name].cls(), "head")


def test_what_is_left_of_a_head_is_no_head():
    """A head of two layers of which the clients keep the second: the first must not pass for an output layer."""
    module = nn.Sequential()
    module.add_module("body", nn.Linear(5, 6))
    module.add_module("classifier", nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    whole = layout_of(module, head="classifier")
    left = whole.without(whole.below(["classifier.2"]))
    assert (left.num_params, left.head, left.head_bias) == (36 + 28, (64, 64), None)


def test_the_travelling_layout_is_that_of_a_network_without_the_kept_part():
    whole = FEDERATION.layout
    parts = Keeping(FedAvg(), whole, whole.below(["0"])).travelling
    assert (parts.num_params, parts.num_trainable, parts.head, parts.layers) == (21, 21, (0, 21), ((0, 21),))
    bodied = whole.without(whole.below(["head"]))
    assert (bodied.num_params, bodied.head, bodied.layers, bodied.head_bias) == (36, (36, 36), ((0, 36),), None)


@given(st.lists(st.integers(0, 30), unique=True, max_size=10), st.integers(0, 5))
def test_weaving_is_the_inverse_of_gathering(cuts, more):
    edges = sorted(cuts)[: len(cuts) // 2 * 2]
    ranges = tuple(zip(edges[::2], edges[1::2], strict=True))
    vector = torch.arange(max([0, *edges]) + more, dtype=torch.float64)
    part, others = gathered(vector, ranges), gathered(vector, rest(ranges, len(vector)))
    assert torch.equal(woven(part, others, ranges), vector)
