"""Shapes and sizes of our networks, with the arithmetic of their parameter counts."""

import pytest
import torch
from torch import nn

from fedmerge.core.errors import UsageError
from fedmerge.core.vector import find_head
from fedmerge.models import NETWORKS, Network
from fedmerge.models._layers import norm_layer
from fedmerge.models.cnn import Cnn
from fedmerge.models.mlp import Mlp
from fedmerge.models.resnet9 import ResNet9

CASES = [
    (Mlp(), (1, 28, 28)),
    (Mlp(hidden=()), (7,)),
    (Mlp(hidden=(8, 4)), (2, 3)),
    *((Cnn(norm=norm), (1, 28, 28)) for norm in ("group", "batch", "none")),
    (Cnn(channels=(4, 6, 8)), (3, 15, 9)),
    *((ResNet9(norm=norm), (3, 32, 32)) for norm in ("group", "batch", "none")),
    (ResNet9(channels=(4, 4, 8, 8)), (1, 8, 9)),
]


@pytest.mark.parametrize(("recipe", "shape"), CASES, ids=repr)
def test_a_network_gives_one_number_per_class(recipe, shape):
    module = recipe.build(shape, 5)
    assert module(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))).shape == (3, 5)
    assert isinstance(module.get_submodule(find_head(module)), nn.Linear)


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_size_of_the_paper_s_resnet9():
    """Channels 8-16-32-64 on colour images of 100 classes, BatchNorm (2 numbers per channel), no bias.

    Convolutions, 9 weights per pair of channels:
      3·8 + 8·16 + 2·16·16 + 16·32 + 32·64 + 2·64·64 = 24 + 128 + 512 + 512 + 2048 + 8192 = 11,416; times 9 = 102,744
    Normalisation: 2 · (8 + 16 + 16 + 16 + 32 + 64 + 64 + 64) = 2 · 280 = 560
    Linear: 64 · 100 + 100 = 6,500
    """
    for norm in ("batch", "group"):
        assert size(ResNet9(norm=norm).build((3, 32, 32), 100)) == 102_744 + 560 + 6_500


def test_the_resnet_without_normalisation_has_a_bias_instead():
    assert size(ResNet9(norm="none").build((3, 32, 32), 100)) == 102_744 + 280 + 6_500


def test_the_size_of_the_cnn():
    """28 → 14 → 7: (9·1 + 1)·8 + (9·8 + 1)·16 = 80 + 1,168; norms 2·24 = 48; linear 7·7·16·10 + 10 = 7,850."""
    assert size(Cnn().build((1, 28, 28), 10)) == 80 + 1_168 + 48 + 7_850


def test_the_size_of_the_mlp():
    """784·64 + 64 + 64·10 + 10."""
    assert size(Mlp().build((1, 28, 28), 10)) == 50_890


@pytest.mark.parametrize(
    ("recipe", "shape", "least"),
    [
        (Cnn(), (1, 3, 28), 4),
        (Cnn(channels=(4, 4, 4)), (1, 28, 7), 8),
        (Cnn(), (64,), 4),
        (ResNet9(), (3, 7, 32), 8),
        (ResNet9(), (32, 32), 8),
        (ResNet9(), (1, 3, 32, 32), 8),
    ],
)
def test_inputs_that_are_no_large_enough_images_are_refused(recipe, shape, least):
    with pytest.raises(UsageError) as refusal:
        recipe.build(shape, 5)
    message = str(refusal.value)
    assert f"needs images [channels, height, width] of at least {least} x {least} pixels" in message
    assert f"got inputs of shape {list(shape)}; use model 'mlp' for other inputs" in message


def test_the_smallest_images_work():
    for recipe, shape in ((Cnn(), (1, 4, 4)), (ResNet9(), (3, 8, 8))):
        assert recipe.build(shape, 2).train()(torch.zeros(2, *shape)).shape == (2, 2)


@pytest.mark.parametrize("channels", [(8, 16, 32), (8, 16, 32, 64, 64), ()])
def test_a_resnet9_has_four_stages(channels):
    with pytest.raises(UsageError, match=r"ResNet9.channels: got \[.*\]; expected four numbers"):
        ResNet9(channels=channels)


@pytest.mark.parametrize(
    "make", [lambda: Mlp(hidden=(0,)), lambda: Cnn(channels=(0, 4)), lambda: ResNet9(channels=(1, 0, 1, 1))]
)
def test_layers_of_no_width_are_refused(make):
    with pytest.raises(UsageError, match="expected a list of a whole number >= 1"):
        make()


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 1), (6, 1), (8, 2), (12, 3), (16, 4), (20, 5), (22, 2)])
def test_group_normalisation_has_groups_of_at_least_four_channels(channels, groups):
    assert norm_layer("group", channels).num_groups == groups


def test_our_networks_are_registered():
    assert set(NETWORKS) >= {"cnn", "import", "mlp", "resnet9"}
    assert all(isinstance(NETWORKS[name].cls.build, type(Mlp.build)) for name in NETWORKS)
    assert isinstance(Mlp(), Network)
