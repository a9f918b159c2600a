"""Both forms of a task give the numbers that autograd gives on the module itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedmerge.core.protocol import Batch, Task
from fedmerge.core.randomness import fresh_module_randomness
from fedmerge.core.vector import layout_of
from fedmerge.models.cnn import Cnn
from fedmerge.models.mlp import Mlp
from fedmerge.models.resnet9 import ResNet9
from fedmerge.training import Descent, FunctionalTask, ModuleTask, is_batch_coupled
from fedmerge.training.objective import Objective, is_best
from fedmerge.training.task import has_dropout, measured_buffers, measuring_twin

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
DESCENT = Descent(momentum=0.5, weight_decay=0.01)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.flatten, self.first, self.second = nn.Flatten(), nn.Linear(128, 4), nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.third.weight = self.second.weight

    def forward(self, x):
        return self.third(torch.tanh(self.second(self.first(self.flatten(x)))))


def frozen():
    module = Mlp((6, 5)).build((2, 8, 8), 4)
    module[1].requires_grad_(False)
    return module


NETWORKS = {
    "mlp": lambda: Mlp((6,)).build((2, 8, 8), 4),
    "frozen layer": frozen,
    "tied": Tied,
    **{f"cnn, {norm}": lambda norm=norm: Cnn((3, 4), norm).build((2, 8, 8), 4) for norm in ("group", "batch", "none")},
    **{
        f"resnet9, {norm}": lambda norm=norm: ResNet9((4, 4, 4, 4), norm).build((2, 8, 8), 4)
        for norm in ("group", "batch")
    },
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def module(request):
    with fresh_module_randomness(0, "initial weights"):
        return request.param().double()


def batches(count=3, width=5):
    source = torch.Generator().manual_seed(0)

    def one():
        inputs = torch.randn(width, 2, 8, 8, dtype=torch.float64, generator=source)
        targets = torch.randint(4, (width,), generator=source)
        weight = torch.full((width,), 1 / width, dtype=torch.float64)
        return Batch(inputs, targets, weight, torch.tensor(0.1, dtype=torch.float64))

    return tuple(one() for _ in range(count))


def both(module, descent=DESCENT, head=None):
    layout = layout_of(module, head=head)
    return layout, ModuleTask(module, layout, descent), FunctionalTask(module, layout, descent)


def test_both_forms_are_tasks(module):
    _, one, other = both(module)
    assert isinstance(one, Task)
    assert isinstance(other, Task)


def test_the_gradient_is_autograds(module):
    layout, *tasks = both(module)
    params, batch = layout.read(module), batches()[0]
    module.train()
    loss = functional.cross_entropy(module(batch.inputs), batch.targets)
    loss.backward()
    slopes = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    for task in tasks:
        found = task.gradient(params, batch)
        torch.testing.assert_close(found.loss, loss.detach(), **CLOSE)
        torch.testing.assert_close(found.gradient, layout.flatten(slopes), **CLOSE)
        torch.testing.assert_close(found.buffers, layout.read(module)[layout.num_trainable :], **CLOSE)


def test_training_and_predicting_agree(module):
    layout, one, other = both(module)
    params, steps = layout.read(module), batches()
    trained, mapped = one.train(params, steps, pull=0.1), other.train(params, steps, pull=0.1)
    torch.testing.assert_close(trained, mapped, **CLOSE)
    assert not torch.equal(trained[: layout.num_trainable], params[: layout.num_trainable])
    torch.testing.assert_close(one.predict(trained, steps[0].inputs), other.predict(trained, steps[0].inputs), **CLOSE)
    torch.testing.assert_close(one.loss(trained, steps[0]), other.loss(trained, steps[0]), **CLOSE)


def test_a_task_depends_on_its_arguments_alone(module):
    layout, *tasks = both(module)
    params, steps = layout.read(module), batches()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for task in tasks:
        first = task.train(params, steps)
        task.train(2 * params, steps[::-1])
        task.predict(3 * params, steps[0].inputs)
        assert torch.equal(task.train(params, steps), first)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(layout.read(module), params)


@pytest.mark.parametrize("form", [ModuleTask, FunctionalTask])
def test_examples_of_weight_zero_are_not_there(form):
    with fresh_module_randomness(0, "initial weights"):
        module = Cnn((3, 4)).build((2, 8, 8), 4).double()
    layout = layout_of(module)
    task, batch = form(module, layout, DESCENT), batches()[0]
    padded = Batch(
        torch.cat([batch.inputs, torch.zeros_like(batch.inputs)]),
        torch.cat([batch.targets, torch.zeros_like(batch.targets)]),
        torch.cat([batch.weight, torch.zeros_like(batch.weight)]),
        batch.lr,
    )
    params = layout.read(module)
    for found, wanted in zip(task.gradient(params, padded), task.gradient(params, batch), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


class Mixed(nn.Module):
    """A narrow body and a wide head."""

    def __init__(self):
        super().__init__()
        self.body, self.unused, self.head = nn.Linear(128, 3), nn.Linear(1, 1), nn.Linear(3, 4).double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1).float())).double())


def test_tensors_of_several_dtypes_are_trained_in_their_own():
    """float32 rounding in the body bounds the agreement; a layer without influence has slope 0."""
    with fresh_module_randomness(0, "initial weights"):
        module = Mixed()
    layout, one, other = both(module, Descent())
    params, steps = layout.read(module), batches()
    assert params.dtype == torch.float64
    trained, mapped = one.train(params, steps), other.train(params, steps)
    torch.testing.assert_close(trained, mapped, rtol=1e-6, atol=1e-6)
    unused = next(slot for slot in layout.slots if slot.name == "unused.weight")
    assert trained[unused.start] == params[unused.start] != 0


def test_a_chosen_criterion_is_used():
    module = nn.Sequential(nn.Flatten(), nn.Linear(128, 4)).double()
    layout, batch = layout_of(module), batches()[0]

    def brier(outputs, targets):
        return (torch.softmax(outputs, 1) - functional.one_hot(targets, 4)).square().sum(dim=1)

    expected = brier(module(batch.inputs), batch.targets).detach()
    for form in (ModuleTask, FunctionalTask):
        task = form(module, layout, DESCENT, objective=Objective(brier, is_best))
        torch.testing.assert_close(task.loss(layout.read(module), batch), expected.mean(), **CLOSE)
        torch.testing.assert_close(
            task.losses(task.predict(layout.read(module), batch.inputs), batch.targets), expected
        )


def normalised():
    """One BatchNorm layer on three inputs, then a linear one."""
    with fresh_module_randomness(1, "initial weights"):
        return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)).double()


@pytest.mark.parametrize("form", [ModuleTask, FunctionalTask])
@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=4), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_measured_statistics_are_those_of_the_data(form, sizes, seed):
    """Mean of all examples; variance as the mean of the batches' own, weighted by their size."""
    module = normalised()
    layout = layout_of(module)
    inputs = [torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + n)) for n in sizes]
    zero = torch.zeros((), dtype=torch.float64)
    steps = tuple(
        Batch(x, torch.zeros(len(x), dtype=torch.int64), torch.full((len(x),), 1 / len(x)).double(), zero)
        for x in inputs
    )
    task = form(measuring_twin(module), layout, Descent())
    params = layout.read(module)
    measured = layout.views(torch.cat([params[: layout.num_trainable], measured_buffers(task.gradient, params, steps)]))
    torch.testing.assert_close(measured["0.running_mean"], torch.cat(inputs).mean(dim=0), **CLOSE)
    variance = sum(len(x) * x.var(dim=0) for x in inputs) / sum(sizes)
    torch.testing.assert_close(measured["0.running_var"], variance, **CLOSE)


def test_the_measuring_twin_leaves_the_module_alone():
    module = normalised()
    twin = measuring_twin(module)
    assert (module[0].momentum, twin[0].momentum) == (0.1, 1.0)


@pytest.mark.parametrize(
    ("module", "coupled", "dropout"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), True, False),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.LayerNorm(4)), False, False),
        (nn.GroupNorm(1, 4), False, False),
        (nn.Sequential(nn.Dropout(0.2), nn.Linear(2, 2)), False, True),
        (nn.Dropout(0.0), False, False),
        (nn.TransformerEncoderLayer(4, 1, dim_feedforward=4, dropout=0.1), False, True),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), False, True),
        (nn.MultiheadAttention(4, 1, dropout=0.1), False, True),
        (nn.RReLU(), False, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_look_across_the_batch_or_draw_numbers_are_recognised(module, coupled, dropout):
    assert is_batch_coupled(module) is coupled
    assert has_dropout(module) is dropout
