"""The closed-form gradient of a perceptron is autograd's, and only perceptrons get it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedmerge.core.protocol import Batch
from fedmerge.core.vector import layout_of
from fedmerge.training import Descent, FunctionalTask
from fedmerge.training.dense import chain_of, gradient
from fedmerge.training.objective import Objective, is_best


class Watched(nn.Sequential):
    """Not a plain nn.Sequential: its forward pass may be anything."""


def hooked():
    module = nn.Sequential(nn.Linear(3, 2))
    module[0].register_forward_pre_hook(lambda _, inputs: inputs)
    return module


def tied():
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    module[2].weight = module[0].weight
    return module


def with_buffer():
    module = nn.Sequential(nn.Linear(3, 2))
    module.register_buffer("mean", torch.zeros(3))
    return module


def twice():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


def one_relu_twice():
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))


def frozen():
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    return module


def mixed():
    return nn.Sequential(nn.Linear(3, 3).double(), nn.ReLU(), nn.Linear(3, 2))


CHAINS = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 2)),
    "flattened": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
    "without bias": lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)),
    "one ReLU in two places": one_relu_twice,
    "two linear layers in a row": lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
}
OTHERS = {
    "not plain": lambda: Watched(nn.Linear(3, 2)),
    "hook": hooked,
    "tied": tied,
    "one layer in two places": twice,
    "buffer": with_buffer,
    "frozen": frozen,
    "mixed dtypes": mixed,
    "tanh": lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
    "normalised": lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)),
    "ends in ReLU": lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()),
    "ReLU first": lambda: nn.Sequential(nn.ReLU(), nn.Linear(3, 2)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2)),
    "flattens a part": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(3, 2)),
}


def batch_for(module, width=7):
    first, last = (part for part in (module[0], module[-1]))
    shape = (2, 3) if isinstance(first, nn.Flatten) else (first.in_features,)
    torch_rng = torch.Generator().manual_seed(3)
    inputs = torch.randn(width, *shape, generator=torch_rng, dtype=torch.float64)
    targets = torch.randint(last.out_features, (width,), generator=torch_rng)
    weight = torch.rand(width, generator=torch_rng, dtype=torch.float64)
    weight[-1] = 0  # a padded example
    return Batch(inputs, targets, weight, torch.tensor(0.1, dtype=torch.float64))


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shifted outputs"])
@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS.keys())
def test_it_is_autograds_gradient(make, shift):
    module = make().double()
    layout, batch = layout_of(module), batch_for(module)
    offset = torch.arange(7 * module[-1].out_features, dtype=torch.float64).reshape(7, -1) / 5 if shift else None
    chain = chain_of(module, layout)
    found = gradient(chain, layout, layout.read(module), batch, offset)
    outputs = module(batch.inputs) if offset is None else module(batch.inputs) + offset
    loss = (functional.cross_entropy(outputs, batch.targets, reduction="none") * batch.weight).sum()
    slopes = torch.autograd.grad(loss, list(module.parameters()))
    expected = layout.flatten(dict(zip([name for name, _ in module.named_parameters()], slopes, strict=True)))
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.gradient, expected, rtol=1e-12, atol=1e-13)
    assert found.buffers.numel() == 0


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_other_networks_are_left_to_autograd(make):
    module = make()
    assert chain_of(module, layout_of(module)) is None


def test_inputs_that_are_not_vectors_are_left_to_autograd():
    """A linear layer without Flatten maps the last axis of [B, 4, 3]; its outputs are then no class scores."""
    module = nn.Sequential(nn.Linear(3, 2))
    chain = chain_of(module, layout_of(module))
    assert chain.takes(torch.zeros(5, 3))
    assert not chain.takes(torch.zeros(5, 4, 3))


def test_a_loss_of_ones_own_is_left_to_autograd():
    """Twice the cross-entropy: the gradient doubles."""
    module = nn.Sequential(nn.Linear(3, 2)).double()
    layout, batch = layout_of(module), batch_for(module)

    def doubled(outputs, targets):
        return 2 * functional.cross_entropy(outputs, targets, reduction="none")

    own = FunctionalTask(module, layout, Descent(), objective=Objective(doubled, is_best)).gradient(
        layout.read(module), batch
    )
    usual = FunctionalTask(module, layout, Descent()).gradient(layout.read(module), batch)
    torch.testing.assert_close(own.gradient, 2 * usual.gradient)


def test_a_label_without_an_output_is_an_error():
    module = nn.Sequential(nn.Linear(3, 2)).double()
    layout, batch = layout_of(module), batch_for(module)
    batch = batch._replace(targets=batch.targets + 2)
    with pytest.raises(RuntimeError, match="out of bounds"):
        FunctionalTask(module, layout, Descent()).gradient(layout.read(module), batch)
