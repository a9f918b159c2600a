"""The other methods, each on a step that fits on a pencil's page, and their common limit."""

from dataclasses import replace

import pytest
import torch

from fedmerge.algorithms.cfl import SmoothedCfl
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.algorithms.fedprox import FedProx
from fedmerge.algorithms.fesem import FeSem
from fedmerge.algorithms.ifca import Choice, Ifca
from fedmerge.algorithms.local import Local
from fedmerge.algorithms.one_shot import OneShot
from fedmerge.algorithms.oracle import Oracle
from fedmerge.core.errors import DataError, UsageError
from fedmerge.core.protocol import Federation, Slope, Update, deliver
from small_federation import BareTask, small

FACTS = Federation(3, 1, (0, 1), ((0, 1),))
EVERYONE, COUNTS = torch.arange(3), torch.tensor([1, 1, 2])


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def ten(j):
    return column(10.0 * (j + 1))[0]


def begin(algorithm, facts=FACTS):
    return algorithm.init(ten, facts, 0)


# ---------------------------------------------------------------- FedAvg, FedProx


def test_fedavg_by_hand():
    """(1·1 + 1·3 + 2·4) / 4 = 3."""
    algorithm = FedAvg()
    state = deliver(algorithm, begin(algorithm), EVERYONE, Update(column(1, 3, 4)), COUNTS)
    assert state.models.tolist() == [[7.0]]


def test_server_momentum_and_rate_by_hand():
    """v = 3, then 0.5·3 + 3 = 4.5; with rate 2: 10 − 2·3 − 2·4.5 = −5."""
    algorithm = FedAvg(server_momentum=0.5, server_lr=2.0)
    state = begin(algorithm)
    for _ in range(2):
        state = deliver(algorithm, state, EVERYONE, Update(column(1, 3, 4)), COUNTS)
    assert state.models.tolist() == [[-5.0]]


def test_buffers_take_the_plain_average_whatever_the_momentum():
    algorithm, facts = FedAvg(server_momentum=0.5, server_lr=2.0), Federation(1, 1, (0, 1), ((0, 1),))
    state = algorithm.init(lambda j: torch.tensor([10.0, 10.0]).double(), facts, 0)
    for _ in range(2):
        state = deliver(algorithm, state, torch.arange(1), Update(torch.ones(1, 2).double()), torch.tensor([5]))
    assert state.models.tolist() == [[10 - 2 * 1 - 2 * 1.5, 8.0]]


@pytest.mark.parametrize("algorithm", [FedProx(proximal=0.0), Ifca(num_models=1), FeSem(num_models=1)], ids=repr)
def test_it_is_fedavg_in_its_limit(algorithm):
    federation = small()
    averaged, _ = federation.play(FedAvg(), rounds=3)
    found, _ = federation.play(algorithm, rounds=3)
    models = found.models if isinstance(algorithm, FedProx) else found.averages.models
    torch.testing.assert_close(models, averaged.models, rtol=1e-12, atol=1e-12)


def test_fedprox_stays_closer_to_where_it_started():
    federation = small()
    start = federation.draw(0)
    free, held = (federation.play(FedProx(proximal=mu), rounds=1)[0].models[0] for mu in (0.0, 5.0))
    assert (held - start).norm() < 0.9 * (free - start).norm()


# ---------------------------------------------------------------- clustering


def test_the_oracle_averages_inside_the_groups():
    """Group 0 holds clients 0 and 2: (1·1 + 2·4) / 3 = 3; group 1 holds client 1 alone."""
    algorithm = Oracle()
    state = begin(algorithm, replace(FACTS, groups=(0, 1, 0)))
    state = deliver(algorithm, state, EVERYONE, Update(column(1, 5, 4)), COUNTS)
    assert algorithm.send(state, EVERYONE).tolist() == [[7.0], [5.0], [7.0]]


@pytest.mark.parametrize(
    "algorithm",
    [
        FeSem(num_models=1, server_momentum=0.5),
        Ifca(num_models=1, server_momentum=0.5),
        OneShot(num_models=1, server_momentum=0.5),
        SmoothedCfl(gap=9.0, server_momentum=0.5),
    ],
    ids=repr,
)
def test_one_cluster_with_momentum_is_fedavg_with_momentum(algorithm):
    federation = small()
    averaged, _ = federation.play(FedAvg(server_momentum=0.5), rounds=3)
    found, _ = federation.play(algorithm, rounds=3)
    torch.testing.assert_close(found.averages.models, averaged.models, rtol=1e-12, atol=1e-12)
    assert algorithm.cost(found).server_floats >= found.averages.models.numel() + found.averages.velocity.numel()


def test_a_group_without_replies_stays_where_it_is():
    algorithm = Oracle(server_momentum=0.0)
    state = begin(algorithm, replace(FACTS, groups=(0, 1, 0)))
    state = deliver(algorithm, state, torch.tensor([1]), Update(column(5)), torch.tensor([1]))
    assert state.averages.models.tolist() == [[10.0], [5.0]]


def test_the_oracle_needs_groups():
    with pytest.raises(DataError, match="this data has none; use a partition with groups"):
        begin(Oracle())


class Distances(BareTask):
    """A task whose loss is the distance to `target`, and whose training goes half of the way."""

    def __init__(self, target):
        self.target = target

    def gradient(self, params, batch):
        return Slope(self.loss(params, batch), (params - self.target).sign(), params[:0])

    def loss(self, params, batch):
        return (params - self.target).abs().sum()

    def train(self, params, batches, *, pull=0.0, towards=None):
        return params + 0.5 * (self.target - params)


def test_ifca_trains_the_model_that_fits_best_and_no_other():
    """Models at 10 and 20, target 18: model 1 is nearer; training moves it by −1 · 1/2 · 2, so delta = 1."""
    federation, algorithm = small(), Ifca(num_models=2)
    batches = federation.batches([0], 1)[0]
    models = torch.stack([ten(0), ten(1)])
    reply, _ = algorithm.train(models, (), batches, Distances(18.0))
    assert (reply.delta.tolist(), int(reply.model)) == ([1.0], 1)
    assert algorithm.personal(models, (), batches, Distances(11.0)).tolist() == [10.0]


def test_ifca_moves_a_model_by_those_who_chose_it():
    """Clients 0 and 2 chose model 1: (1·1 + 2·4) / 3 = 3; nobody chose model 0 but client 1."""
    algorithm = Ifca(num_models=2)
    state = begin(algorithm)
    assert algorithm.mixing(state).tolist() == [[0.5, 0.5]] * 3
    choice = Choice(column(1, 5, 4), torch.tensor([1, 0, 1]))
    state = deliver(algorithm, state, EVERYONE, choice, COUNTS)
    assert state.averages.models.tolist() == [[5.0], [17.0]]
    assert algorithm.mixing(state).tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    assert algorithm.describe(state) == {"num_models": 2, "models_in_use": 2}


def test_fesem_groups_the_trained_models():
    """All start at 10; trained models 9, 5, 9.4 (weights 1, 1, 2): centres (9 + 2·9.4)/3 and 5."""
    algorithm = FeSem(num_models=2)
    state = deliver(algorithm, begin(algorithm), EVERYONE, Update(column(1.0, 5.0, 0.6)), COUNTS)
    sent = algorithm.send(state, EVERYONE)
    torch.testing.assert_close(sent, column((9 + 2 * 9.4) / 3, 5.0, (9 + 2 * 9.4) / 3))


def test_fesem_assigns_a_reply_to_its_nearest_centre():
    """Client 1 trains from 5 to 8.9, which is nearer to 9.27."""
    algorithm = FeSem(num_models=2)
    state = deliver(algorithm, begin(algorithm), EVERYONE, Update(column(1.0, 5.0, 0.6)), COUNTS)
    state = deliver(algorithm, state, torch.tensor([1]), Update(column(-3.9)), torch.tensor([1]))
    assert state.assigned[0] == state.assigned[1]
    assert sorted(state.averages.models[:, 0].tolist()) == pytest.approx([5.0, 8.9])


def test_fesem_measures_distance_and_not_direction():
    """Centres 9, 5 and 20; a model at 13 is nearest to 9 (4 away), though 20 lies farthest in its direction."""
    algorithm = FeSem(num_models=3)
    state = deliver(algorithm, begin(algorithm), EVERYONE, Update(column(1.0, 5.0, -10.0)), COUNTS)
    after = deliver(algorithm, state, torch.tensor([0]), Update(column(-4.0)), torch.tensor([1]))
    assert after.assigned.tolist() == state.assigned.tolist()
    assert sorted(after.averages.models[:, 0].tolist()) == pytest.approx([5.0, 13.0, 20.0])


def test_fesem_sends_the_mean_of_the_centres_to_a_client_it_does_not_know():
    algorithm = FeSem(num_models=2)
    known = torch.tensor([0, 1])
    state = deliver(algorithm, begin(algorithm), known, Update(column(1.0, 5.0)), COUNTS[:2])
    assert algorithm.send(state, torch.tensor([2])).tolist() == [[7.0]]
    assert algorithm.mixing(state)[2].tolist() == [0.5, 0.5]


def test_fesem_needs_as_many_clients_as_centres_in_the_first_round():
    algorithm = FeSem(num_models=3)
    with pytest.raises(UsageError, match="got 3 centres but only 2 clients in the first round"):
        deliver(algorithm, begin(algorithm), torch.tensor([0, 1]), Update(column(1.0, 5.0)), COUNTS[:2])


@pytest.mark.parametrize("cls", [Ifca, FeSem])
def test_more_models_than_clients_are_refused(cls):
    with pytest.raises(UsageError, match=r"num_models: got 4 .* for 3 clients; expected at most one"):
        begin(cls(num_models=4))


# ---------------------------------------------------------------- Local


def test_local_training_sends_nothing_and_keeps_its_model():
    algorithm = Local()
    state = begin(algorithm)
    reply, own = algorithm.train(algorithm.send(state, EVERYONE), algorithm.start(ten(0)), (), Distances(18.0))
    assert reply.delta.numel() == 0
    assert own.tolist() == [14.0]
    assert algorithm.personal((), own, (), Distances(0.0)).tolist() == [14.0]


@pytest.mark.parametrize(("momentum", "kept"), [(0.0, 1), (0.5, 2)])
def test_the_server_keeps_a_velocity_only_for_momentum(momentum, kept):
    algorithm = FedAvg(server_momentum=momentum)
    assert algorithm.cost(begin(algorithm)).server_floats == kept
