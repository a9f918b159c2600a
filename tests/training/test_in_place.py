"""Training in place gives the bits of training by new vectors."""

import pytest
import torch
from torch import nn

from fedmerge.core.vector import layout_of
from fedmerge.data.federated import Examples
from fedmerge.training import Descent, LocalTraining, ModuleTask, Planned, step_sizes
from fedmerge.training.batches import drawn_together

DESCENTS = {
    "sgd": Descent(),
    "momentum and decay": Descent(momentum=0.7, weight_decay=0.05),
    "adamw": Descent(optimizer="adamw", weight_decay=0.05),
}


def network(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DESCENTS)
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.BatchNorm2d(4)], ids=["group", "batch"])
def test_a_training_in_place_has_the_bits_of_one_on_new_vectors(norm, name, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        net = network(norm).to(dtype)
        inputs, targets = torch.randn(10, 1, 4, 4, dtype=dtype), torch.randint(0, 3, (10,))
    layout = layout_of(net)
    task, start = ModuleTask(net, layout, DESCENTS[name]), layout.read(net)
    steps = Planned(Examples(inputs, targets), LocalTraining(batch_size=4, epochs=3), 0.1, 0, 1, 0).drawn()
    for pull, towards in ((0.0, None), (0.3, None), (0.3, 2 * start)):
        ours = task.train(start, steps, pull=pull, towards=towards)
        theirs = task.descend(start, steps, task.gradient, pull=pull, towards=towards)
        assert not torch.equal(ours, start)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_training_leaves_what_it_was_given_as_it_was():
    net = network(nn.BatchNorm2d(4))
    layout = layout_of(net)
    task, start = ModuleTask(net, layout, Descent()), layout.read(net)
    steps = Planned(Examples(torch.ones(6, 1, 4, 4), torch.arange(6) % 3), LocalTraining(), 0.1, 0, 1, 0).drawn()
    before = start.clone()
    first, second = task.train(start, steps), task.train(start, steps)
    assert torch.equal(start, before)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
@pytest.mark.parametrize(
    "training", [LocalTraining(batch_size=4, epochs=2), LocalTraining(batch_size=3, epochs=2, steps=5)]
)
def test_clients_drawn_together_get_the_batches_that_they_draw_alone(training, shape):
    plans = [
        Planned(
            Examples(
                torch.arange(n * 24.0).reshape(n, -1)[:, : torch.Size(shape).numel()].reshape(n, *shape),
                torch.arange(n),
            ),
            training,
            0.1 * (n + 1),
            3,
            2,
            n,
        )
        for n in (4, 9, 1, 6)
    ]
    together = drawn_together(plans)
    for k, plan in enumerate(plans):
        alone = plan.drawn()
        assert [len(batch.targets) for batch in alone] == plan.sizes() == step_sizes(plan) == step_sizes(alone)
        for s, batch in enumerate(together):
            if s >= len(alone):
                assert float(batch.lr[k]) == 0
                assert not bool(batch.weight[k].any())
                continue
            n = len(alone[s].targets)
            assert torch.equal(batch.inputs[k, :n], alone[s].inputs)
            assert torch.equal(batch.targets[k, :n], alone[s].targets)
            assert torch.equal(batch.weight[k, :n], alone[s].weight)
            assert not bool(batch.weight[k, n:].any())
            assert torch.equal(batch.lr[k], alone[s].lr)
