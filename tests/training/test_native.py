"""The compiled kernels give what torch gives, to float32 rounding against float64, at every size; folded to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmerge.core.protocol import Batch
from fedmerge.core.vector import layout_of
from fedmerge.models.cnn import Cnn
from fedmerge.models.resnet9 import Residual, ResNet9
from fedmerge.training import Descent, ModuleTask, native
from fedmerge.training.native import functions

REASON = native.available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no compiled kernels: {REASON}")


@pytest.fixture(autouse=True)
def _small_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "FEWEST_EXAMPLES", 1)


# batch, groups, channels in and out of a group, height, width, kernel, stride, padding
SHAPES = {
    "as in the first layer": (32, 1, 3, 8, 32, 32, (3, 3), 1, 1),
    "as in the middle": (32, 1, 16, 16, 16, 16, (3, 3), 1, 1),
    "as in the last layers": (32, 1, 64, 64, 4, 4, (3, 3), 1, 1),
    "two clients": (32, 2, 8, 16, 8, 8, (3, 3), 1, 1),
    "three clients, odd channels": (16, 3, 9, 11, 7, 9, (3, 3), 1, 1),
    "odd size": (16, 1, 8, 8, 13, 5, (3, 3), 1, 1),
    "one pixel": (16, 1, 8, 4, 1, 1, (3, 3), 1, 1),
    "two by three pixels": (16, 1, 8, 4, 2, 3, (3, 3), 1, 1),
    "no padding": (16, 1, 8, 8, 6, 7, (3, 3), 1, 0),
    "more padding": (16, 1, 8, 8, 5, 4, (3, 3), 1, 2),
    "odd batch": (13, 1, 8, 12, 6, 6, (3, 3), 1, 1),
    "odd batch of two clients": (33, 2, 4, 12, 6, 6, (3, 3), 1, 1),
    "batch of one": (1, 1, 8, 8, 6, 6, (3, 3), 1, 1),
    "largest batch": (functions.MOST_EXAMPLES, 1, 8, 8, 6, 6, (3, 3), 1, 1),
    "five by five": (16, 1, 6, 16, 12, 12, (5, 5), 1, 0),
    "five by five, padded": (16, 1, 16, 20, 9, 9, (5, 5), 1, 2),
    "stride": (16, 1, 8, 16, 14, 14, (3, 3), 2, 1),
    "stride, few channels, odd size": (20, 2, 1, 8, 15, 13, (3, 3), 2, 1),
    "stride beyond the kernel": (16, 1, 16, 32, 9, 8, (1, 1), 2, 0),
    "oblong": (16, 1, 9, 7, 8, 8, (3, 5), (2, 1), (0, 2)),
    "wide kernel, few channels": (16, 1, 2, 9, 8, 8, (1, 7), 1, (0, 3)),
    "one channel out": (16, 1, 8, 1, 8, 8, (3, 3), 1, 1),
}
ROUNDING = {tile: units * torch.finfo(torch.float32).eps for tile, units in {0: 2, 2: 2, 4: 12}.items()}
"""Largest error of a sum of products, over the largest sum of their absolute values; torch's own is 1.6 units here."""


def _draw(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def _case(name: str) -> tuple[Tensor, Tensor, Tensor, dict]:
    batch, groups, inner, outer, height, width, kernel, stride, padding = SHAPES[name]
    x = _draw(batch, groups * inner, height, width, seed=1)
    weight = _draw(groups * outer, inner, *kernel, seed=2) / (inner * kernel[0] * kernel[1]) ** 0.5
    return x, weight, _draw(groups * outer, seed=3), {"stride": stride, "padding": padding, "groups": groups}


def _slopes(outputs: Tensor, *tensors: Tensor) -> list[Tensor]:
    weights = torch.cos(torch.arange(outputs.numel(), dtype=torch.float64)).to(outputs.dtype).view(outputs.shape)
    return [outputs, *torch.autograd.grad((outputs * weights).sum(), tensors)]


def _followed(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [tensor.detach().clone().to(dtype).requires_grad_() for tensor in tensors]


def _sizes(x: Tensor, weight: Tensor, bias: Tensor, how: dict) -> list[float]:
    """The largest sum of absolute products behind outputs and slopes; a weight on an output is at most 1."""
    sizes = _followed(x.abs(), weight.abs(), bias.abs(), dtype=torch.float64)
    outputs = functional.conv2d(*sizes, **how)
    return [float(tensor.max().detach()) for tensor in (outputs, *torch.autograd.grad(outputs.sum(), sizes))]


def _error(found: Tensor, right: Tensor) -> float:
    return float(((found.double() - right).abs().max() / right.abs().max().clamp_min(1e-30)).detach())


@pytest.mark.parametrize("tile", [0, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_a_convolution_and_its_slopes_are_torchs(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "TILE", tile)
    functions._sizes.cache_clear()
    x, weight, bias, how = _case(name)
    exact = _followed(x, weight, bias, dtype=torch.float64)
    ours = _followed(x, weight, bias)
    right = _slopes(functional.conv2d(*exact, **how), *exact)
    found = _slopes(native.conv2d(*ours, **how), *ours)
    functions._sizes.cache_clear()
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in right]
    for got, want, size in zip(found, right, _sizes(x, weight, bias, how), strict=True):
        assert (got.double() - want).abs().max() < ROUNDING[tile] * size


@pytest.mark.parametrize("clients", [2, 3, 5])
@pytest.mark.parametrize("size", [(3, 8, 12), (8, 16, 8), (16, 5, 4)])
def test_folded_clients_get_the_bits_they_get_alone(clients: int, size: tuple[int, int, int]) -> None:
    inner, outer, side = size
    x, weight = _draw(32, clients * inner, side, side, seed=4), _draw(clients * outer, inner, 3, 3, seed=5)
    folded = _followed(x, weight)
    together = _slopes(native.conv2d(*folded, padding=1, groups=clients), *folded)
    slope = torch.cos(torch.arange(together[0].numel(), dtype=torch.float64)).float().view(together[0].shape)
    for i in range(clients):
        own, ends = slice(i * inner, (i + 1) * inner), slice(i * outer, (i + 1) * outer)
        alone = _followed(x[:, own], weight[ends])
        y = native.conv2d(*alone, padding=1)
        dx, dw = torch.autograd.grad(y, alone, slope[:, ends])
        assert torch.equal(y, together[0][:, ends])
        assert torch.equal(dx, together[1][:, own])
        assert torch.equal(dw, together[2][ends])


def test_the_same_input_gives_the_same_bits() -> None:
    x, weight, bias, how = _case("as in the middle")
    runs = []
    for _ in range(2):
        own = _followed(x, weight, bias)
        runs.append(_slopes(native.conv2d(*own, **how), *own))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_bound_on_the_error_finds_a_wrong_tap() -> None:
    x, weight, bias, how = _case("as in the middle")
    right = functional.conv2d(x.double(), weight.double(), bias.double(), **how)
    bound = ROUNDING[functions.TILE] * _sizes(x, weight, bias, how)[0]
    weight[0, 0, 0, 0] += 1e-5
    assert (native.conv2d(x, weight, bias, **how).double() - right).abs().max() > bound


@pytest.mark.parametrize("order", ["first", "last", "lanes", "other"])
def test_any_order_of_memory_is_taken(order: str) -> None:
    x, weight, _, how = _case("two clients")
    orders = {
        "first": x,
        "last": x.contiguous(memory_format=torch.channels_last),
        "lanes": x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        "other": x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
    }
    assert torch.equal(orders[order], x)
    assert torch.equal(native.conv2d(orders[order], weight, **how), native.conv2d(x, weight, **how))
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(native.conv2d(orders[order], weight_last, **how), native.conv2d(x, weight, **how))


def test_the_input_is_not_changed_and_parts_of_a_batch_are_taken() -> None:
    x, weight, _, how = _case("as in the middle")
    lanes = x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    part = lanes[:20]  # looks like lanes but for its neighbours, which must not leak into the slope
    own = _followed(weight)
    native.conv2d(part, *own, **how).sum().backward()
    alone = _followed(weight)
    native.conv2d(part.contiguous(), *alone, **how).sum().backward()
    assert torch.equal(own[0].grad, alone[0].grad)
    assert torch.equal(lanes, x)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_asked_for_gets_a_slope(needs: tuple[bool, bool]) -> None:
    x, weight, _, how = _case("two clients")
    x.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    native.conv2d(x, weight, **how).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == needs


def test_what_the_kernels_cannot_take_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, how = _case("two clients")
    doubles = native.conv2d(x.double(), weight.double(), bias.double(), **how)
    assert torch.equal(doubles, functional.conv2d(x.double(), weight.double(), bias.double(), **how))
    many = x.repeat(8, 1, 1, 1)
    assert len(many) > functions.MOST_EXAMPLES
    assert torch.equal(native.conv2d(many, weight, bias, **how), functional.conv2d(many, weight, bias, **how))
    monkeypatch.setattr(functions, "FEWEST_EXAMPLES", 8)
    assert torch.equal(native.conv2d(x[:7], weight, bias, **how), functional.conv2d(x[:7], weight, bias, **how))
    assert not torch.equal(native.conv2d(x[:8], weight, bias, **how), functional.conv2d(x[:8], weight, bias, **how))
    assert native.conv2d(x[:0], weight, bias, **how).shape == (0, 32, 8, 8)
    with pytest.raises(RuntimeError, match="channels"):
        native.conv2d(x[:, :3], weight, bias, **how)


def _stage(pool: bool, relu: bool, channels: int, sets: int, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(8, channels, 3, padding=1, bias=bias), nn.GroupNorm(sets, channels)]
    layers += [nn.ReLU()] if relu else []
    layers += [nn.MaxPool2d(2)] if pool else []
    return _filled(nn.Sequential(*layers))


def _filled(module: nn.Module) -> nn.Module:
    """The module with the same numbers on every run: a rounding that flips a ReLU would move single slopes."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(_draw(*parameter.shape, seed=10 + i) / parameter[0].numel() ** 0.5)
    return module


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize(("channels", "sets", "bias"), [(16, 4, False), (12, 1, True), (10, 10, False)])
@pytest.mark.parametrize(("batch", "height", "width"), [(32, 8, 8), (13, 7, 5), (16, 2, 3)])
def test_a_stage_and_its_slopes_are_torchs(
    batch: int, height: int, width: int, channels: int, sets: int, bias: bool, pool: bool, relu: bool
) -> None:
    plain = _stage(pool, relu, channels, sets, bias)
    exact, ours = copy.deepcopy(plain).double(), native.accelerated(plain)
    assert type(ours) is not nn.Sequential
    x = _draw(batch, 8, height, width, seed=6) + 3.0  # a mean that is far from 0
    inputs, doubled = _followed(x)[0], _followed(x, dtype=torch.float64)[0]
    right = _slopes(exact(doubled), doubled, *exact.parameters())
    found = _slopes(ours(inputs), inputs, *ours.parameters())
    for got, want in zip(found, right, strict=True):
        assert _error(got, want) < 2e-5


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize(("batch", "height", "width"), [(32, 8, 8), (13, 7, 5), (2, 2, 3), (1, 8, 8)])
def test_batch_norm_its_slopes_and_its_running_mean_are_torchs(batch: int, height: int, width: int, pool: bool) -> None:
    plain = _stage(pool, True, 12, 1, False)
    plain[1] = nn.BatchNorm2d(12, momentum=0.3)
    exact, ours = copy.deepcopy(plain).double(), native.accelerated(plain)
    x = _draw(batch, 8, height, width, seed=6) + 3.0
    inputs, doubled = _followed(x)[0], _followed(x, dtype=torch.float64)[0]
    right = _slopes(exact(doubled), doubled, *exact.parameters())
    found = _slopes(ours(inputs), inputs, *ours.parameters())
    for got, want in zip(found, right, strict=True):
        assert _error(got, want) < 2e-5
    for (name, got), want in zip(ours.named_buffers(), exact.buffers(), strict=True):
        assert torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-6), name
    assert torch.allclose(ours.eval()(x).double(), exact.eval()(x.double()), atol=1e-4)


def test_ties_and_nan_are_torchs() -> None:
    x = torch.zeros(16, 8, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    plain = _stage(True, True, 8, 2, False)
    assert torch.equal(native.accelerated(plain)(x).isnan(), plain(x).isnan())
    tied = torch.ones(16, 3, 3, 3, requires_grad=True)
    functions.largest(tied).sum().backward()
    assert tied.grad is not None
    assert torch.equal(tied.grad[:, :, 0, 0], torch.ones(16, 3))
    assert tied.grad.sum() == 16 * 3


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize(("build", "shape"), [(ResNet9, (3, 32, 32)), (Cnn, (1, 28, 28)), (ResNet9, (1, 11, 9))])
@pytest.mark.parametrize("batch", [32, 7])
def test_a_network_keeps_its_tensors_and_its_numbers(
    build: type, shape: tuple[int, int, int], norm: str, batch: int
) -> None:
    plain = _filled(build(norm=norm).build(shape, 10))
    ours = native.accelerated(plain)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert not {id(p) for p in ours.parameters()} & {id(p) for p in plain.parameters()}
    x, targets = _draw(batch, *shape, seed=7), torch.arange(batch) % 10
    exact = copy.deepcopy(plain).double()
    functional.cross_entropy(exact(x.double()), targets).backward()
    functional.cross_entropy(ours(x), targets).backward()
    for (name, got), want in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert got.grad is not None
        error = (got.grad.double() - want.grad).norm() / want.grad.norm().clamp_min(1e-3)
        assert error < 1e-2, name  # a rounding that flips one ReLU shows as up to 4e-3, in torch too
    assert torch.allclose(ours.eval()(x), plain.eval()(x) if norm != "batch" else ours(x), atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_task_on_flat_buffers_finds_the_same_slope(norm: str) -> None:
    plain = _filled(ResNet9(norm=norm).build((3, 16, 16), 10))
    layout = layout_of(plain)
    batch = Batch(_draw(32, 3, 16, 16, seed=13), torch.arange(32) % 10, torch.full((32,), 1 / 32), torch.tensor(0.1))
    params = layout.read(plain)
    right = ModuleTask(plain, layout, Descent()).gradient(params, batch)
    found = ModuleTask(native.accelerated(plain), layout, Descent()).gradient(params, batch)
    assert torch.allclose(found.loss, right.loss, rtol=1e-5)
    assert (found.gradient - right.gradient).norm() < 1e-2 * right.gradient.norm()
    assert torch.allclose(found.buffers, right.buffers, rtol=1e-4, atol=1e-5)


def test_what_is_watched_or_unknown_is_left_as_it_is() -> None:
    watched = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    watched[0].register_forward_hook(lambda *_: None)
    assert type(native.accelerated(watched)[0]) is nn.Conv2d
    for odd in (nn.Conv2d(3, 8, 3, dilation=2), nn.Conv2d(3, 8, 3, padding="same"), nn.Conv1d(3, 8, 3)):
        assert type(native.accelerated(nn.Sequential(odd))[0]) is type(odd)
    reflecting = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
    assert type(native.accelerated(nn.Sequential(reflecting))[0]) is nn.Conv2d


def test_a_layer_that_stands_twice_is_used_twice() -> None:
    relu, same = nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    plain = nn.Sequential(same, nn.GroupNorm(2, 8), relu, same, nn.GroupNorm(2, 8), relu)
    x = _draw(16, 8, 6, 6, seed=8)
    ours = native.accelerated(plain)
    assert torch.allclose(ours(x), plain(x), atol=1e-5)
    assert len(list(ours.parameters())) == len(list(plain.parameters()))


def test_stages_that_follow_each_other_give_what_each_gives_alone() -> None:
    first, second = _stage(True, True, 8, 2, False), _stage(False, True, 12, 3, True)
    plain = nn.Sequential(first, nn.Sequential(second, nn.Sequential(nn.Identity())), nn.Flatten())
    for batch in (32, 21):
        x = _draw(batch, 8, 9, 8, seed=11)
        whole, parts = native.accelerated(plain), [native.accelerated(first), native.accelerated(second)]
        outputs = parts[1](parts[0](x)).flatten(1)
        assert torch.equal(whole(x), outputs)
        whole(x).square().sum().backward()
        outputs.square().sum().backward()
        alone = [parameter.grad for part in parts for parameter in part.parameters()]
        assert all(torch.equal(a.grad, b) for a, b in zip(whole.parameters(), alone, strict=True))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("batch", [32, 21, 4])
def test_a_shortcut_that_joins_a_step_changes_no_bit(norm: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "FEWEST_EXAMPLES", 8)  # torch takes four
    plain = _filled(ResNet9(norm=norm).build((3, 16, 16), 10))
    apart, joined = native.accelerated(plain), native.accelerated(plain, (Residual,))
    assert sum(isinstance(part, list) for part in joined._plan) == 1
    assert [name for name, _ in joined.named_parameters()] == [name for name, _ in plain.named_parameters()]
    x, other = _followed(_draw(batch, 3, 16, 16, seed=14), _draw(batch, 3, 16, 16, seed=14))
    a, b = apart(x), joined(other)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(apart.parameters(), joined.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(apart.buffers(), joined.buffers(), strict=True))


def test_a_shortcut_at_the_start_of_a_network_is_added() -> None:
    plain = nn.Sequential(Residual(nn.Sequential(_stage(False, True, 8, 2, False))), Residual(nn.Linear(6, 6)))
    ours = native.accelerated(plain, (Residual,))
    x, other = _followed(_draw(16, 8, 6, 6, seed=15), _draw(16, 8, 6, 6, seed=15))
    a, b = plain(x), ours(other)
    assert torch.allclose(a, b, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.allclose(x.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_a_shortcut_whose_sizes_differ_gets_torchs_complaint() -> None:
    plain = nn.Sequential(Residual(nn.Sequential(_stage(False, True, 12, 2, False))))
    for module in (plain, native.accelerated(plain, (Residual,))):
        with pytest.raises(RuntimeError, match="must match the size"):
            module(_draw(16, 8, 6, 6, seed=16))


def test_an_image_that_is_too_small_gets_torchs_complaint() -> None:
    plain = _stage(True, True, 8, 2, False)
    for module in (plain, native.accelerated(plain)):
        with pytest.raises(RuntimeError, match="too small"):
            module(_draw(16, 8, 1, 1, seed=12))


def test_a_weight_with_gaps_or_overlaps_is_taken() -> None:
    x, weight, bias, how = _case("two clients")
    apart = torch.stack([weight, weight], dim=-1)[..., 0]
    assert torch.equal(native.conv2d(x, apart, bias, **how), native.conv2d(x, weight, bias, **how))
    one = torch.ones(1, 1, 1, 1, requires_grad=True)
    native.conv2d(x, one.expand(32, 8, 3, 3), bias, **how).sum().backward()
    exact = torch.ones(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    functional.conv2d(x.double(), exact.expand(32, 8, 3, 3), bias.double(), **how).sum().backward()
    assert torch.allclose(one.grad.double(), exact.grad, rtol=1e-4)


def test_frozen_tensors_are_shared_and_get_no_slope() -> None:
    plain = _stage(False, True, 8, 2, False)
    plain[0].weight.requires_grad_(False)
    ours = native.accelerated(plain)
    ours(_draw(16, 8, 6, 6, seed=9)).sum().backward()
    weights = dict(ours.named_parameters())
    assert weights["0.weight"] is plain[0].weight
    assert plain[0].weight.grad is None
    assert weights["1.weight"].grad is not None
