"""Two engines, one result: order, padding, refusals, and bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.algorithms.ifca import Ifca
from fedmerge.algorithms.local import Local
from fedmerge.core.errors import UsageError
from fedmerge.core.vector import layout_of
from fedmerge.runtime import Engine, Sequential, Vectorised, run_round, score
from fedmerge.training import Descent, LocalTraining, one_pass
from small_federation import SmallFederation, perceptron, small, tables

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def train(task, params, batches):
    return task.train(params, batches)


@given(sizes=st.lists(st.integers(1, 25), min_size=1, max_size=9), most=st.integers(1, 4), size=st.integers(1, 7))
@settings(max_examples=10, deadline=None)
def test_clients_of_any_size_in_any_order_train_as_if_alone(sizes, most, size):
    federation = SmallFederation(
        perceptron,
        tables(sizes, (0,) * len(sizes)),
        (0,) * len(sizes),
        training=LocalTraining(lr=0.1, batch_size=size, epochs=2),
        descent=Descent(momentum=0.5, weight_decay=0.01),
    )
    clients = [(federation.draw(i), steps) for i, steps in enumerate(federation.batches(list(range(len(sizes))), 1))]
    mapped = Vectorised(federation.network(), federation.layout, federation.descent, most=most)
    ours, theirs = federation.engine().map(train, clients), mapped.map(train, clients)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), **CLOSE)


@pytest.mark.parametrize("kind", [Sequential, Vectorised])
def test_both_are_engines(kind):
    assert isinstance(small().engine(kind), Engine)


@pytest.mark.parametrize("kind", [Sequential, Vectorised])
def test_nobody_to_run_gives_no_results(kind):
    assert small().engine(kind).map(train, []) == []


@pytest.mark.parametrize("kind", [Sequential, Vectorised])
def test_functions_without_batches_run_too(kind):
    found = small().engine(kind).map(lambda task, x: (x + 1, -x), [(torch.tensor(1.0),), (torch.tensor(5.0),)])
    assert [[float(part) for part in result] for result in found] == [[2.0, -1.0], [6.0, -5.0]]


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.AlphaDropout(0.1), nn.RReLU()], ids=repr)
def test_the_vectorised_engine_refuses_layers_that_draw_numbers(layer):
    module = nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 3))
    with pytest.raises(UsageError, match=r"cannot reproduce dropout .* use runtime 'sequential'"):
        Vectorised(module, layout_of(module), Descent())


def test_dropout_that_is_off_is_no_dropout():
    module = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.0), nn.Linear(4, 3))
    assert isinstance(Vectorised(module, layout_of(module), Descent()), Engine)


@pytest.mark.parametrize("kind", [Sequential, Vectorised])
def test_scores_of_clients_without_examples_are_empty(kind):
    federation = small()
    data = [one_pass(examples) for examples in federation.data]
    models = [federation.draw(0)] * len(data)
    all_of_them, without = (
        score(models, data, federation.engine(kind)),
        score(models, [(), *data[1:]], federation.engine(kind)),
    )
    assert [float(part) for part in without[0]] == [0.0, 0.0, 0.0]
    for ours, theirs in zip(all_of_them[1:], without[1:], strict=True):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), **CLOSE)


@pytest.mark.parametrize("kind", [Sequential, Vectorised])
def test_scores_count_every_example_once(kind):
    federation = small()
    found = score([federation.draw(0)] * 6, [one_pass(e, 5) for e in federation.data], federation.engine(kind))
    assert [int(tally.count) for tally in found] == federation.counts.tolist()
    logits = federation.network()(federation.data[0].inputs)
    assert int(found[0].right) == int((logits.argmax(dim=1) == federation.data[0].targets).sum())


@pytest.mark.parametrize(
    ("algorithm", "down", "up"),
    [(FedAvg(), 1, 1), (FedMerge(num_models=2, search_rounds=1), 1, 1), (Local(), 0, 0)],
    ids=["fedavg", "fedmerge", "local"],
)
@pytest.mark.parametrize("kind", [Sequential, Vectorised])
def test_bytes_are_counted_for_the_cohort(kind, algorithm, down, up):
    """P = (5 · 6 + 6) + (6 · 3 + 3) = 57 float64 numbers for each of three clients."""
    assert moved_bytes(kind, algorithm) == (3 * 57 * 8 * down, 3 * 57 * 8 * up)


@pytest.mark.parametrize("kind", [Sequential, Vectorised])
def test_ifca_sends_every_model_down_and_an_index_up(kind):
    assert moved_bytes(kind, Ifca(num_models=2)) == (3 * 2 * 57 * 8, 3 * (57 * 8 + 8))


def moved_bytes(kind, algorithm):
    federation = small()
    state, fleet = federation.begin(algorithm)
    for r in (1, 2):  # FedMerge splits after the first
        cohort = torch.arange(6) if r == 1 else torch.tensor([0, 3, 5])
        steps = federation.batches(cohort.tolist(), r)
        result = run_round(algorithm, state, fleet, cohort, steps, federation.counts[cohort], federation.engine(kind))
        state, fleet = result.state, result.fleet
    return result.bytes_down, result.bytes_up


def test_a_client_that_stays_away_keeps_its_private_state():
    federation, algorithm = small(), Local()
    state, fleet = federation.begin(algorithm)
    cohort = torch.tensor([2, 4])
    steps = federation.batches([2, 4], 1)
    result = run_round(algorithm, state, fleet, cohort, steps, federation.counts[cohort], federation.engine())
    kept = [torch.equal(result.fleet.private[i], fleet.private[i]) for i in range(6)]
    assert kept == [True, True, False, True, False, True]
