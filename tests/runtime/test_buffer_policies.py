"""Whose BatchNorm statistics a client's model has, under each policy, from both engines."""

import pytest
import torch
from torch import nn

from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.algorithms.ifca import Ifca
from fedmerge.algorithms.local import Local
from fedmerge.core.protocol import state_tensors
from fedmerge.models.cnn import Cnn
from fedmerge.runtime import Folded, Sequential, Vectorised, finetuned, personal_models, run_round, score
from fedmerge.training import Descent, LocalTraining, ModuleTask, one_pass
from small_federation import SmallFederation, images, tables

SIZES, GROUPS = [6, 9, 6, 10, 12, 9], (0, 0, 0, 1, 1, 1)  # two pairs share a size, the rest run alone
POLICIES = ["merge", "local", "recalibrate"]
CLOSE = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}
CNN = SmallFederation(
    lambda: Cnn((3, 4), "batch").build((1, 6, 6), 3),
    images(SIZES, GROUPS, (1, 6, 6)),
    GROUPS,
    training=LocalTraining(lr=0.1, batch_size=4, epochs=1),
    descent=Descent(momentum=0.5),
)
TABLE = SmallFederation(
    lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)),
    tables([8, 12, 11, 9], (0, 0, 1, 1)),
    (0, 0, 1, 1),
    training=LocalTraining(lr=0.1, batch_size=3, epochs=1),
)
METHODS = [FedAvg(), FedAvg(server_momentum=0.5), FedMerge(num_models=2, search_rounds=1), Local(), Ifca(num_models=2)]


def passes(federation):
    return [one_pass(examples) for examples in federation.data]


def models_after(federation, algorithm, policy, kind=Sequential, rounds=3):
    state, fleet = federation.play(algorithm, rounds, kind, policy)
    return state, fleet, personal_models(algorithm, state, fleet, passes(federation), federation.engine(kind))


@pytest.mark.parametrize("kind", [Vectorised, Folded])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("algorithm", METHODS, ids=lambda method: type(method).__name__)
def test_all_engines_give_the_same_numbers(algorithm, policy, kind):
    state, fleet, models = models_after(CNN, algorithm, policy)
    mapped, mapped_fleet, mapped_models = models_after(CNN, algorithm, policy, kind)
    ours, theirs = state_tensors(state), state_tensors(mapped)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
    torch.testing.assert_close(torch.stack(fleet.buffers), torch.stack(mapped_fleet.buffers), **CLOSE)
    torch.testing.assert_close(torch.stack(models), torch.stack(mapped_models), **CLOSE)
    one, other = (score(models, passes(CNN), CNN.engine(one)) for one in (Sequential, kind))
    for ours_tally, theirs_tally in zip(one, other, strict=True):
        torch.testing.assert_close(torch.stack(ours_tally), torch.stack(theirs_tally), **CLOSE)


def test_merged_buffers_are_the_weighted_mean_of_the_clients_own():
    """One FedAvg round by hand: each client's statistics after its own training, weighted by its examples."""
    T, algorithm = TABLE.layout.num_trainable, FedAvg()
    state, _ = TABLE.play(algorithm, 1)
    task, start = ModuleTask(TABLE.network(), TABLE.layout, TABLE.descent), TABLE.draw(0)
    alone = torch.stack([task.train(start, steps)[T:] for steps in TABLE.batches([0, 1, 2, 3], 1)])
    weights = TABLE.counts.double() / TABLE.counts.sum()
    torch.testing.assert_close(state.models[0, T:], weights @ alone, **CLOSE)


@pytest.mark.parametrize("algorithm", [FedAvg(), FedMerge(num_models=2, search_rounds=1)], ids=["fedavg", "fedmerge"])
def test_under_local_the_servers_buffers_never_move(algorithm):
    T = TABLE.layout.num_trainable
    state, _ = TABLE.play(algorithm, 3, policy="local")
    for model in algorithm.send(state, torch.arange(4)):
        torch.testing.assert_close(model[T:], TABLE.draw(0)[T:], rtol=0, atol=1e-15)


def test_under_local_each_clients_own_buffers_continue_over_the_rounds():
    """Replayed by hand: the server's parameters with the client's last buffers, trained alone."""
    T, algorithm, engine = TABLE.layout.num_trainable, FedAvg(), TABLE.engine()
    task = ModuleTask(TABLE.network(), TABLE.layout, TABLE.descent)
    state, fleet = TABLE.begin(algorithm, "local")
    own = [TABLE.draw(0)[T:]] * 4
    for r in (1, 2, 3):
        steps = TABLE.batches([0, 1, 2, 3], r)
        own = [task.train(torch.cat([state.models[0, :T], own[i]]), steps[i])[T:] for i in range(4)]
        result = run_round(algorithm, state, fleet, torch.arange(4), steps, TABLE.counts, engine)
        state, fleet = result.state, result.fleet
        torch.testing.assert_close(torch.stack(fleet.buffers), torch.stack(own), **CLOSE)
    models = personal_models(algorithm, state, fleet, passes(TABLE), engine)
    for i in range(4):
        torch.testing.assert_close(models[i], torch.cat([state.models[0, :T], own[i]]), **CLOSE)


def test_under_local_a_client_that_stays_away_keeps_its_buffers():
    algorithm, engine = FedAvg(), TABLE.engine()
    state, fleet = TABLE.begin(algorithm, "local")
    cohort = torch.tensor([1, 3])
    result = run_round(algorithm, state, fleet, cohort, TABLE.batches([1, 3], 1), TABLE.counts[cohort], engine)
    assert [torch.equal(result.fleet.buffers[i], fleet.buffers[i]) for i in range(4)] == [True, False, True, False]


def test_under_local_a_method_that_compares_losses_uses_the_clients_own_buffers():
    """Two models that differ in buffers alone are the same model to a client that keeps its own."""
    algorithm = Ifca(num_models=2)
    T = TABLE.layout.num_trainable
    state, fleet = TABLE.begin(algorithm, "local")
    models = TABLE.draw(0).repeat(2, 1)
    models[0, T:] += 5.0  # worse for everyone if it were used
    state = type(state)(type(state.averages)(models, state.averages.velocity), state.chosen)
    for kind in (Sequential, Vectorised, Folded):
        steps = TABLE.batches([0, 1, 2, 3], 1)
        result = run_round(algorithm, state, fleet, torch.arange(4), steps, TABLE.counts, TABLE.engine(kind))
        assert result.state.chosen.tolist() == [0, 0, 0, 0]
        used = personal_models(algorithm, state, fleet, passes(TABLE), TABLE.engine(kind))
        assert all(torch.equal(model, TABLE.draw(0)) for model in used)


def test_a_task_on_own_buffers_ignores_those_of_the_vector():
    """Every pass sees and moves the client's statistics and leaves those of the vector; other policies keep out."""
    task, T = ModuleTask(TABLE.network(), TABLE.layout, TABLE.descent), TABLE.layout.num_trainable
    params, batch = TABLE.draw(0), TABLE.batches([0], 1)[0][0]
    own, foreign = params[T:] + 0.5, torch.cat([params[:T], params[T:] + 9.0])
    _, fleet = TABLE.begin(FedAvg(), "local")
    mine, wanted = fleet.rules.own_task(task, own), torch.cat([params[:T], own])
    torch.testing.assert_close(mine.loss(foreign, batch), task.loss(wanted, batch), **CLOSE)
    torch.testing.assert_close(mine.predict(foreign, batch.inputs), task.predict(wanted, batch.inputs), **CLOSE)
    torch.testing.assert_close(mine.features(foreign, batch.inputs), task.features(wanted, batch.inputs), **CLOSE)
    expected = task.gradient(wanted, batch)
    found = mine.gradient(foreign, batch)
    torch.testing.assert_close(found.gradient, expected.gradient, **CLOSE)
    torch.testing.assert_close(mine.buffers, expected.buffers, **CLOSE)
    assert torch.equal(found.buffers, foreign[T:])
    again, trained = fleet.rules.own_task(task, own), task.train(wanted, (batch, batch))
    torch.testing.assert_close(again.train(foreign, (batch, batch))[:T], trained[:T], **CLOSE)
    torch.testing.assert_close(again.buffers, trained[T:], **CLOSE)
    assert TABLE.begin(FedAvg(), "merge")[1].rules.own_task(task, own) is None


def test_recalibrated_buffers_are_the_statistics_of_the_clients_own_data():
    """The normalisation comes first, so its statistics are those of the inputs: mean, and variance with n − 1."""
    algorithm = FedAvg()
    state, _, models = models_after(TABLE, algorithm, "recalibrate")
    T = TABLE.layout.num_trainable
    for model, examples in zip(models, TABLE.data, strict=True):
        views = TABLE.layout.views(model)
        torch.testing.assert_close(views["0.running_mean"], examples.inputs.mean(dim=0), **CLOSE)
        torch.testing.assert_close(views["0.running_var"], examples.inputs.var(dim=0), **CLOSE)
        assert torch.equal(model[:T], state.models[0, :T])


@pytest.mark.parametrize("policy", POLICIES)
def test_without_buffers_the_policies_agree(policy):
    federation = SmallFederation(lambda: nn.Linear(5, 3), TABLE.data, TABLE.groups)
    state, _, models = models_after(federation, FedAvg(), policy)
    assert all(torch.equal(model, state.models[0]) for model in models)


@pytest.mark.parametrize("algorithm", METHODS[:3], ids=["fedavg", "fedavgm", "fedmerge"])
def test_server_momentum_leaves_every_variance_positive(algorithm):
    """Inputs with a variance of 1e-4 pull the running variance down fast; momentum would carry it below zero."""
    quiet = [examples._replace(inputs=0.01 * examples.inputs) for examples in TABLE.data]
    training = LocalTraining(lr=0.1, batch_size=3, epochs=5)
    federation = SmallFederation(TABLE.build, quiet, TABLE.groups, training=training)
    state, fleet = federation.begin(algorithm)
    engine = federation.engine()
    for r in range(1, 5):
        steps = federation.batches([0, 1, 2, 3], r)
        result = run_round(algorithm, state, fleet, torch.arange(4), steps, federation.counts, engine)
        state = result.state
        for model in algorithm.send(state, torch.arange(4)):
            assert bool((federation.layout.views(model)["0.running_var"] > 0).all())


def test_fine_tuning_is_plain_local_training():
    task = ModuleTask(TABLE.network(), TABLE.layout, TABLE.descent)
    steps, start = TABLE.batches([0, 1], 1), TABLE.draw(0)
    for kind in (Sequential, Vectorised, Folded):
        tuned = finetuned([start, 2 * start], steps, TABLE.engine(kind))
        torch.testing.assert_close(tuned[0], task.train(start, steps[0]), **CLOSE)
        torch.testing.assert_close(tuned[1], task.train(2 * start, steps[1]), **CLOSE)
