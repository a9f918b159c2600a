"""CFL, as published and smoothed: when it splits, whom it separates, and that it is FedAvg until then."""

import numpy as np
import pytest
import torch

from fedmerge.algorithms.cfl import Cfl, SmoothedCfl, bipartition
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.core.protocol import Federation, Update, deliver
from small_federation import small

FACTS = Federation(4, 2, (0, 2), ((0, 2),))
EVERYONE, COUNTS = torch.arange(4), torch.tensor([1, 1, 1, 1])
EAGER = Cfl(warmup=0, min_size=1)


def start(j):
    return torch.tensor([10.0, 10.0, 1.0]).double()  # the last entry is a buffer


def rows(*values):
    return Update(torch.tensor(values, dtype=torch.float64))


OPPOSED = rows((1.0, 0.1, 0.2), (-1.0, 0.1, 0.2), (1.0, -0.1, 0.2), (-1.0, -0.1, 0.2))


def begin(algorithm):
    return algorithm.init(start, FACTS, 0)


def reply(algorithm, state, update=OPPOSED, clients=EVERYONE):
    return deliver(algorithm, state, clients, update, COUNTS[: len(clients)])


@pytest.mark.parametrize(
    "algorithm", [Cfl(warmup=99), SmoothedCfl(warmup=0, gap=2.0), Cfl(warmup=0, min_size=4)], ids=repr
)
def test_without_a_split_it_is_fedavg(algorithm):
    federation = small()
    averaged, _ = federation.play(FedAvg(), rounds=3)
    found, _ = federation.play(algorithm, rounds=3)
    torch.testing.assert_close(found.averages.models, averaged.models, rtol=1e-12, atol=1e-12)


def test_opposed_clients_are_separated_and_their_models_go_apart():
    """Mean of the updates (0, 0, .2): both start from (10, 10, .8); then each follows its own mean, (±1, 0, .2)."""
    state = reply(EAGER, begin(EAGER))
    assert state.assigned.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(state.averages.models.numpy(), [[10, 10, 0.8]] * 2)
    state = reply(EAGER, state)
    np.testing.assert_allclose(state.averages.models.numpy(), [[9, 10, 0.6], [11, 10, 0.6]])
    assert EAGER.describe(state) == {"num_models": 2}
    assert EAGER.mixing(state).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


def test_a_new_cluster_begins_with_the_velocity_of_the_one_it_leaves():
    """Mean (0, 1): V = (0, 1), both at (10, 9). Then V = (0, 1) / 2 + (±1, 1) in each: (9, 7.5) and (11, 7.5)."""
    moving = rows((1.0, 1.0, 0.0), (-1.0, 1.0, 0.0), (1.0, 1.0, 0.0), (-1.0, 1.0, 0.0))
    algorithm = SmoothedCfl(stationary=1.0, warmup=0, min_size=1, smooth_rounds=1, gap=0.0, server_momentum=0.5)
    state = reply(algorithm, begin(algorithm), moving)
    np.testing.assert_allclose(state.averages.models.numpy(), [[10, 9, 1]] * 2)
    state = reply(algorithm, state, moving)
    np.testing.assert_allclose(state.averages.models.numpy(), [[9, 7.5, 1], [11, 7.5, 1]])


@pytest.mark.parametrize(
    ("algorithm", "why"),
    [
        (Cfl(warmup=1, min_size=1), "too early"),
        (Cfl(warmup=0, min_size=3), "halves too small"),
        (Cfl(warmup=0, min_size=1, gap=1.99), "gap below: within 0.98, across −0.99 at most"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_does_not_split(algorithm, why):
    assert len(reply(algorithm, begin(algorithm)).averages.models) == 1


def test_a_model_that_still_moves_is_not_split():
    """Mean (0, 1), longest √2: the ratio .707 lies between the two thresholds."""
    moving = rows((1.0, 1.0, 0.0), (-1.0, 1.0, 0.0), (1.0, 1.0, 0.0), (-1.0, 1.0, 0.0))
    for stationary, models in ((0.70, 1), (0.71, 2)):
        algorithm = Cfl(warmup=0, min_size=1, stationary=stationary)
        assert len(reply(algorithm, begin(algorithm), moving).averages.models) == models


def test_clients_that_hardly_move_any_more_are_not_split():
    """Half as long as in the first round, in which the cluster was too young to be split."""
    for activity, models in ((0.49, 2), (0.51, 1)):
        algorithm = Cfl(warmup=1, min_size=1, activity=activity)
        first = reply(algorithm, begin(algorithm))
        assert len(first.averages.models) == 1
        assert len(reply(algorithm, first, Update(OPPOSED.delta / 2)).averages.models) == models


def test_the_bound_on_the_closest_pair():
    """Orthogonal halves: sqrt((1 − 0) / 2) = .7071."""
    apart = rows((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    for separation, models in ((0.70, 2), (0.71, 1)):
        algorithm = Cfl(warmup=0, min_size=1, stationary=1.0, separation=separation)
        assert len(reply(algorithm, begin(algorithm), apart).averages.models) == models


def test_buffers_take_no_part_in_the_decision():
    """Buffers that all move by 100 would make the updates alike and the model restless."""
    update = Update(OPPOSED.delta * torch.tensor([1.0, 1.0, 500.0]).double())
    assert len(reply(EAGER, begin(EAGER), update).averages.models) == 2


def test_single_linkage_cuts_at_the_widest_gap_as_in_the_text():
    """Angles 0°, 40°, 80°, 130°: single linkage leaves out 130° (gap 50°); complete linkage pairs neighbours."""
    angles = np.deg2rad([0.0, 40.0, 80.0, 130.0])
    cosines = np.cos(angles[:, None] - angles[None, :])
    assert bipartition(cosines, "single").tolist() == [0, 0, 0, 1]
    assert bipartition(cosines, "complete").tolist() == [0, 0, 1, 1]


def test_smoothing_averages_the_replies():
    """Rate 1/2: (1, .1), then halfway to (3, .3): (2, .2)."""
    algorithm = SmoothedCfl(smooth_rounds=2.0)
    state = reply(algorithm, begin(algorithm))
    state = reply(algorithm, state, Update(3 * OPPOSED.delta))
    np.testing.assert_allclose(state.progress[0].numpy(), [2.0, 0.2])


def test_noise_splits_the_published_one_but_not_the_smoothed_one():
    """Four clients of one kind whose updates are noise around a mean that is nearly 0."""
    published, smoothed = Cfl(warmup=8, min_size=1, stationary=1.0), SmoothedCfl(warmup=8, min_size=1, stationary=1.0)
    facts = Federation(8, 400, (0, 400), ((0, 400),))
    states = {method: method.init(lambda j: torch.zeros(400).double(), facts, 0) for method in (published, smoothed)}
    rng = np.random.default_rng(0)
    for _ in range(12):
        update = Update(torch.from_numpy(0.1 + rng.normal(size=(8, 400))))
        for method, state in states.items():
            states[method] = deliver(method, state, torch.arange(8), update, torch.ones(8, dtype=torch.int64))
    assert len(states[published].averages.models) > 1
    assert len(states[smoothed].averages.models) == 1


def test_a_client_that_comes_late_receives_the_mean_and_joins_those_like_it():
    """Two members each: models 9 and 11 have mean 10; the late client pulls like client 1."""
    known = torch.tensor([0, 1])
    update = rows((1.0, 0.0, 0.0), (-1.0, 0.0, 0.0))
    state = begin(EAGER)
    for _ in range(2):
        state = reply(EAGER, state, update, known)
    assert state.averages.models[:, 0].tolist() == [9.0, 11.0]
    assert EAGER.send(state, torch.tensor([3])).tolist() == [[10.0, 10.0, 1.0]]
    assert EAGER.mixing(state)[3].tolist() == [0.5, 0.5]
    state = reply(EAGER, state, rows((-2.0, 0.5, 0.0)), torch.tensor([3]))
    assert state.assigned.tolist() == [0, 1, -1, 1]
    assert state.averages.models[1].tolist() == [13.0, 9.5, 1.0]


def test_it_finds_the_groups_of_a_small_federation():
    federation = small()
    algorithm = SmoothedCfl(warmup=5, stationary=1.0, gap=0.1)
    state, _ = federation.play(algorithm, rounds=15)
    assert state.assigned.tolist() == [0] * 3 + [1] * 3
