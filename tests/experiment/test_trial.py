"""Networks are tried before a run: what does not fit is refused, and what cannot be vectorised runs all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import UsageError
from fedmerge.data import FederatedData
from fedmerge.experiment.config import RunOptions, build_config
from fedmerge.experiment.federation import load_data, make_module
from fedmerge.experiment.simulation import advance, prepare
from fedmerge.models.mlp import Mlp
from fedmerge.runtime import Sequential, Vectorised
from fedmerge.training import LocalTraining
from small import small


def clients() -> FederatedData:
    config = build_config(small())
    return load_data(config.source, config.partition, 0)


class Item(nn.Module):
    """Cannot be vectorised: it looks at a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.flatten(1))
        return 2 * y if y.sum().item() > 0 else y


class Centred(nn.Module):
    """An unknown layer that looks across its batch: padding would change its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.flatten(1) + 1)
        return y - y.mean(0)


class Recurrent(nn.Module):
    """torch has no vectorised form of its GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.linear = nn.GRU(8, 4, batch_first=True), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.gru(x[:, 0])[0][:, -1])
        return y


def prepared(model: Any, runtime: Any = "auto", **training: Any) -> Any:
    return prepare(ALGORITHMS["fedavg"].cls(), clients(), model, LocalTraining(**training), RunOptions(runtime=runtime))


def test_auto_vectorises_small_networks_and_no_convolutions() -> None:
    assert isinstance(prepared(Mlp())[0].engine, Vectorised)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    assert isinstance(prepared(conv)[0].engine, Sequential)


@pytest.mark.parametrize("module", [Item, Centred, Recurrent])
def test_auto_runs_a_module_that_cannot_be_vectorised_sequentially(module: type[nn.Module]) -> None:
    assert isinstance(prepared(module)[0].engine, Sequential)
    with pytest.raises(UsageError, match=f"'vectorised' cannot run {module.__name__}: .*Use runtime 'auto'"):
        prepared(module, "vectorised")


def test_the_users_module_is_neither_changed_nor_kept() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = [parameter.clone() for parameter in net.parameters()]
    setup, progress = prepare(
        ALGORITHMS["fedavg"].cls(), clients(), net, LocalTraining(), RunOptions(precision="float64")
    )
    advance(setup, progress)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(before, net.parameters(), strict=True))


def test_a_module_is_the_first_draw_and_later_draws_are_fresh() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    first, second, again = (make_module(net, clients(), 0, draw) for draw in (0, 1, 1))
    assert torch.equal(first[1].weight, net[1].weight)
    assert not torch.equal(second[1].weight, net[1].weight)
    assert torch.equal(second[1].weight, again[1].weight)


class Bare(nn.Module):
    """Parameters without a way to draw them anew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


def test_several_draws_of_a_module_need_reset_parameters() -> None:
    with pytest.raises(UsageError, match="no reset_parameters"):
        make_module(Bare(), clients(), 0, 1)
    assert make_module(Bare, clients(), 0, 1).weight.shape == (64, 10)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(63, 10)),
            r"cannot be trained on a batch of 10 inputs \[1, 8, 8\]",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), r"gives \(10, 9\) .* expected a tensor \(10, 10\)"),
        (lambda: nn.Linear(8, 10), r"gives \(10, 1, 8, 10\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10).double()), "torch.float32"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "has lazy parameters"),
        (nn.Flatten, "has no trainable parameters"),
        (lambda: "a network", "your function gave a str; expected a torch.nn.Module"),
        (3, "got a int; expected a name, a torch.nn.Module, or a function that makes one"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_module_that_does_not_fit_is_refused_before_training(model: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        prepared(model)


def test_batch_norm_without_a_second_example_is_refused_before_training() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    assert prepared(net)
    with pytest.raises(UsageError, match=r"a batch of 1 inputs .* which client .* has: .*more than 1 value"):
        prepared(net, batch_size=9)  # 10 examples in batches of 9 and 1
