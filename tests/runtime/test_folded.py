"""Folded clients give the numbers of clients that run one by one, in every network that is folded."""

import pytest
import torch
from torch import nn

from fedmerge.core.errors import UsageError
from fedmerge.core.vector import layout_of
from fedmerge.data.federated import Examples
from fedmerge.models import NETWORKS
from fedmerge.runtime import Folded, Sequential
from fedmerge.training import Descent, LocalTraining, Planned
from fedmerge.training.folded.fold import DenseFold, ModuleFold, fold_of, looks_at_numbers, why_not
from fedmerge.training.objective import TOKENS

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
ADAPTIVE = {"rtol": 1e-7, "atol": 1e-7}  # AdamW divides by a slope's own size: rounding of a tiny slope grows with it
RAGGED, EQUAL = [10, 7, 12, 25, 9, 3, 1], [10, 10, 10, 10, 6]


class Texts(nn.Module):
    """Tokens in, one class for each token out; embedding and output layer are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.inner = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(x.clamp_min(0)))
        weights = torch.softmax(self.inner(hidden) @ hidden.transpose(1, 2), dim=2)
        y: torch.Tensor = self.out(torch.tanh(weights @ hidden))
        return y


class Half(nn.Module):
    """A plain body before the layer that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.top = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.top(torch.relu(self.body(x.flatten(1))))
        return y


def one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, groups=2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )


def built(name: str, shape: tuple[int, ...], **options: object) -> tuple[nn.Module, tuple[int, ...]]:
    return NETWORKS[name].cls(**options).build(shape, 3), shape


NETS = {
    "mlp": lambda: built("mlp", (1, 4, 4)),
    "linear": lambda: built("mlp", (1, 4, 4), hidden=()),
    "deep": lambda: built("mlp", (12,), hidden=(7, 5)),
    "cnn": lambda: built("cnn", (1, 8, 8)),
    "cnn, none": lambda: built("cnn", (2, 8, 8), norm="none"),
    "cnn, batch": lambda: built("cnn", (1, 8, 8), norm="batch"),
    "resnet9": lambda: built("resnet9", (3, 8, 8)),
    "resnet9, batch": lambda: built("resnet9", (3, 8, 8), norm="batch"),
    "layer norm": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (12,)),
    "conv1d": lambda: (one_dimensional(), (2, 6)),
    "half frozen": lambda: (Half(), (12,)),
}
DESCENTS = [Descent(momentum=0.5, weight_decay=0.01), Descent(optimizer="adamw", weight_decay=0.1), Descent()]


def train(task, params, steps):
    return task.train(params, steps)


def pulled(task, params, steps):
    return task.train(params, steps, pull=0.3, towards=0.5 * params)


def slope(task, params, steps):
    return tuple(task.gradient(params, steps[0]))


def stepped(task, params, steps):
    """A method's own loop on the task's gradient, with another rate for each entry."""
    rates = torch.linspace(0, 1, task.layout.num_trainable, dtype=params.dtype)
    return task.train(params, tuple(batch._replace(lr=batch.lr * rates) for batch in steps))


def loss(task, params, steps):
    return torch.stack([task.loss(params, batch) for batch in steps[:1]])


@pytest.fixture(autouse=True)
def _same_weights():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        yield


def clients_of(net, shape, layout, *, tokens=False):
    random = torch.Generator().manual_seed(1)
    sizes = EQUAL if any(isinstance(part, nn.modules.batchnorm._NormBase) for part in net.modules()) else RAGGED
    found = []
    for i, n in enumerate(sizes):
        if tokens:
            inputs, targets = (torch.randint(0, 11, (n, 5), generator=random) for _ in range(2))
        else:
            inputs = torch.randn(n, *shape, generator=random, dtype=torch.float64)
            targets = torch.randint(0, 3, (n,), generator=random)
        start = layout.read(net)
        T = layout.num_trainable
        start[:T] += 0.1 * torch.randn(T, generator=random, dtype=torch.float64)
        plan = Planned(Examples(inputs, targets), LocalTraining(batch_size=4, epochs=2), 0.05, 0, 1, i)
        found.append((start, plan))
    return found


def leaves(results):
    return [leaf for result in results for leaf in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("descent", DESCENTS, ids=["momentum", "adamw", "sgd"])
@pytest.mark.parametrize("name", NETS)
def test_every_network_gives_the_numbers_of_one_by_one(name, descent):
    net, shape = NETS[name]()
    net = net.double()
    layout = layout_of(net, frozen=("body",) if name == "half frozen" else ())
    assert why_not(net, layout) is None
    clients = clients_of(net, shape, layout)
    one, other = Sequential(net, layout, descent), Folded(net, layout, descent, most=3)
    for function in (train, pulled, slope, stepped, loss):
        for ours, theirs in zip(leaves(one.map(function, clients)), leaves(other.map(function, clients)), strict=True):
            torch.testing.assert_close(ours, theirs, **(ADAPTIVE if descent.optimizer == "adamw" else CLOSE))


def test_tied_embeddings_and_attention_fold():
    net = Texts().double()
    layout = layout_of(net)
    clients = clients_of(net, (), layout, tokens=True)
    one = Sequential(net, layout, DESCENTS[0], objective=TOKENS)
    other = Folded(net, layout, DESCENTS[0], objective=TOKENS, most=4)
    for function in (train, slope, loss):
        for ours, theirs in zip(leaves(one.map(function, clients)), leaves(other.map(function, clients)), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


def test_the_number_of_clients_at_once_does_not_matter():
    net, shape = NETS["cnn"]()
    net = net.double()
    layout = layout_of(net)
    clients = clients_of(net, shape, layout)
    alone, three, all_of_them = (Folded(net, layout, Descent(), most=most).map(train, clients) for most in (1, 3, 64))
    for a, b, c in zip(alone, three, all_of_them, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
        torch.testing.assert_close(a, c, **CLOSE)


def test_perceptrons_have_a_fold_of_their_own():
    net, _ = NETS["mlp"]()
    assert isinstance(fold_of(net, layout_of(net), 2), DenseFold)
    net, _ = NETS["cnn"]()
    assert isinstance(fold_of(net, layout_of(net), 2), ModuleFold)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x * self.scale)
        return y


def _partly_frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3))
    net[0].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Scaled(), "a layer of class Scaled has weights"),
        (nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2)), "cumulative mean"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 2)), "stands beside conv"),
        (nn.Sequential(nn.Embedding(4, 2, padding_idx=0), nn.Linear(2, 2)), "embeddings with padding"),
        (nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 2)), "another type than the vector"),
        (_partly_frozen(), "0.bias is frozen and the rest of its layer is not"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(net, reason):
    layout = layout_of(net)
    found = why_not(net, layout)
    assert found is not None
    assert reason in found
    with pytest.raises(UsageError, match=f"runtime 'folded' cannot run .*{reason}"):
        Folded(net, layout, Descent())


def test_a_frozen_part_beside_convolutions_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    assert "0.weight is frozen in a network with convolutions" in str(why_not(net, layout_of(net, frozen=("0",))))


def test_a_hooked_layer_is_refused():
    net = nn.Sequential(nn.Linear(4, 2))
    net[0].register_forward_hook(lambda *_: None)
    assert "carries hooks" in str(why_not(net, layout_of(net)))


class Peeking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return 2 * y if y.sum() > 0 else y


def test_a_network_that_looks_at_numbers_is_noticed():
    net = Peeking()
    assert looks_at_numbers(net, layout_of(net), torch.ones(2, 4))
    net = nn.Sequential(nn.Linear(4, 3))
    assert not looks_at_numbers(net, layout_of(net), torch.ones(2, 4))
