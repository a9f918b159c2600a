"""Methods that find groups once, from the clients' updates: one-shot k-means and FL+HC."""

import numpy as np
import pytest
import torch

from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.algorithms.flhc import Flhc
from fedmerge.algorithms.one_shot import OneShot
from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Federation, Update, deliver
from small_federation import small

FACTS = Federation(4, 2, (0, 2), ((0, 2),))
EVERYONE, COUNTS = torch.arange(4), torch.tensor([1, 3, 1, 1])
TWO_SIDES = torch.tensor([[1.0, 0.0, 9.0], [1.0, 0.2, 9.0], [-2.0, 0.0, 9.0], [-1.8, 0.2, 9.0]]).double()
BOTH = [OneShot(num_models=2), Flhc(num_models=2, warmup=0)]


def begin(algorithm):
    return algorithm.init(lambda j: torch.tensor([10.0, 10.0, 1.0]).double(), FACTS, 0)


def reply(algorithm, state, clients=EVERYONE, updates=TWO_SIDES):
    return deliver(algorithm, state, clients, Update(updates[: len(clients)]), COUNTS[clients])


@pytest.mark.parametrize(
    "algorithm",
    [
        OneShot(num_models=1),
        OneShot(num_models=3, warmup=3),
        Flhc(num_models=1, warmup=1),
        Flhc(threshold=1e9, warmup=1),
        Flhc(threshold=2.0, metric="cosine", linkage="complete", warmup=0),
        Flhc(warmup=3),
    ],
    ids=repr,
)
def test_it_is_fedavg_in_its_limit(algorithm):
    federation = small()
    averaged, _ = federation.play(FedAvg(), rounds=3)
    found, _ = federation.play(algorithm, rounds=3)
    assert len(found.averages.models) == 1
    torch.testing.assert_close(found.averages.models, averaged.models, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("algorithm", BOTH, ids=repr)
def test_groups_are_made_in_the_round_after_the_warmup_and_averaged_apart(algorithm):
    """Means by examples: (1·(1, 0) + 3·(1, .2)) / 4 and ((−2, 0) + (−1.8, .2)) / 2; the buffer takes 9."""
    state = reply(algorithm, begin(algorithm))
    assert state.assigned.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(state.averages.models.numpy(), [[9.0, 9.85, -8.0], [11.9, 9.9, -8.0]])
    assert algorithm.mixing(state).tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("algorithm", BOTH, ids=repr)
def test_groups_stay_as_they_were_made(algorithm):
    state = reply(algorithm, begin(algorithm))
    again = reply(algorithm, state, updates=TWO_SIDES.flip(0))
    assert again.assigned.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("algorithm", BOTH, ids=repr)
def test_a_late_client_receives_the_mean_and_joins_the_group_with_its_direction(algorithm):
    """Clients 0, 1 and 2 are known: two in the first group, so its model counts 2/3 until client 3 replies."""
    state = reply(algorithm, begin(algorithm), torch.tensor([0, 1, 2]))
    expected = state.averages.models[0] * 2 / 3 + state.averages.models[1] / 3
    torch.testing.assert_close(algorithm.send(state, torch.tensor([3]))[0], expected)
    torch.testing.assert_close(algorithm.mixing(state)[3], torch.tensor([2 / 3, 1 / 3]).double())
    state = deliver(algorithm, state, torch.tensor([3]), Update(torch.tensor([[-0.1, 0.01, 0.0]]).double()), COUNTS[3:])
    assert state.assigned.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("algorithm", [OneShot(num_models=3), Flhc(num_models=3, warmup=0)], ids=repr)
def test_it_waits_until_enough_clients_were_heard(algorithm):
    state = reply(algorithm, begin(algorithm), torch.tensor([0, 1]))
    assert len(state.averages.models) == 1
    state = deliver(algorithm, state, torch.tensor([2]), Update(TWO_SIDES[2:3]), COUNTS[2:3])
    assert len(state.averages.models) == 3
    assert sorted(state.assigned.tolist()) == [-1, 0, 1, 2]


def test_the_server_forgets_the_updates_once_it_has_groups():
    """3 numbers of one model and 4·2 of updates; then 2·3 of models and 2·2 of directions."""
    algorithm = BOTH[0]
    assert algorithm.cost(begin(algorithm)).server_floats == 3 + 8
    assert algorithm.cost(reply(algorithm, begin(algorithm))).server_floats == 6 + 4


def test_the_threshold_of_flhc_in_units_of_the_typical_update():
    """Updates ±1 on a line and (0, 1): norms 1, distances 2 and √2. Single linkage joins all at √2."""
    updates = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]).double()
    for threshold, groups in ((1.41, 3), (1.42, 1)):
        algorithm = Flhc(threshold=threshold, linkage="single", warmup=0)
        assert len(reply(algorithm, begin(algorithm), updates=updates).averages.models) == groups
        assert len(reply(algorithm, begin(algorithm), updates=100 * updates).averages.models) == groups


def test_the_cosine_metric_of_flhc_ignores_length():
    """Cosine distances: 0 within the same direction, 1 across."""
    updates = torch.tensor([[1.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 9.0, 0.0]]).double()
    algorithm = Flhc(threshold=0.5, metric="cosine", linkage="average", warmup=0)
    assert reply(algorithm, begin(algorithm), updates=updates).assigned.tolist() == [0, 0, 1, 1]


def test_one_shot_measures_distance_and_not_direction():
    """1 and 9 point the same way, but 1 lies nearer to −1."""
    updates = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [9.0, 0.0, 0.0], [9.0, 0.0, 0.0]]).double()
    algorithm = OneShot(num_models=2)
    assert reply(algorithm, begin(algorithm), updates=updates).assigned.tolist() == [0, 0, 1, 1]


def test_ward_needs_euclidean_distances():
    with pytest.raises(UsageError, match="ward needs metric 'euclidean'"):
        Flhc(metric="cosine")


@pytest.mark.parametrize("algorithm", [OneShot(num_models=5), Flhc(num_models=5)], ids=repr)
def test_more_groups_than_clients_are_refused(algorithm):
    with pytest.raises(UsageError, match="got 5 groups for 4 clients"):
        begin(algorithm)


@pytest.mark.parametrize("algorithm", [OneShot(num_models=2, warmup=2), Flhc(num_models=2, warmup=2)], ids=repr)
def test_it_finds_the_groups_of_a_small_federation(algorithm):
    state, _ = small().play(algorithm, rounds=4)
    assert state.assigned.tolist() == [0] * 3 + [1] * 3
