"""The flat vector and a network's tensors are the same numbers, whatever the network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmerge.core.errors import UsageError
from fedmerge.core.randomness import fresh_module_randomness
from fedmerge.core.vector import find_head, layout_of, twin
from fedmerge.models.cnn import Cnn
from fedmerge.models.mlp import Mlp
from fedmerge.models.resnet9 import ResNet9


def cnn(norm):
    return Cnn(channels=(3, 5), norm=norm).build((2, 8, 8), 4)


def resnet(norm):
    return ResNet9(channels=(4, 4, 8, 8), norm=norm).build((3, 16, 16), 5)


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self):
        super().__init__()
        self.encoder, self.middle, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.middle(self.encoder(x)))


class Buffered(nn.Module):
    """One buffer that is saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("kept", torch.tensor([1.5, 2.5]))
        self.register_buffer("passing", torch.tensor([9.0]), persistent=False)


def mixed():
    return nn.Sequential(nn.Linear(2, 3).bfloat16(), nn.Linear(3, 3), nn.Linear(3, 2).double())


NETWORKS = {
    "mlp": lambda: Mlp((7, 3)).build((2, 4), 3),
    "cnn, group": lambda: cnn("group"),
    "cnn, batch": lambda: cnn("batch"),
    "resnet9, group": lambda: resnet("group"),
    "resnet9, batch": lambda: resnet("batch"),
    "tied": Tied,
    "mixed dtypes": mixed,
    "buffers": Buffered,
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def module(request):
    with fresh_module_randomness(0, "initial weights"):
        return request.param()


def normal(size, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_writing_what_was_read_changes_nothing(module):
    layout = layout_of(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    vector = layout.read(module)
    layout.write(torch.zeros_like(vector), module)
    layout.write(vector, module)
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_flatten_is_the_inverse_of_views(module):
    layout = layout_of(module)
    vector = layout.read(module)
    assert torch.equal(layout.flatten(layout.views(vector)), vector)


def test_every_saved_number_is_in_the_vector_once(module):
    layout = layout_of(module)
    tensors = {tensor.data_ptr(): tensor for tensor in module.state_dict().values()}
    assert layout.num_params == sum(tensor.numel() for tensor in tensors.values())
    assert [slot.start for slot in layout.slots[1:]] == [slot.stop for slot in layout.slots[:-1]]


def test_trainable_entries_come_first_with_the_head_last_among_them(module):
    layout = layout_of(module)
    trainable = {id(p): p for p in module.parameters() if p.requires_grad}
    assert layout.num_trainable == sum(p.numel() for p in trainable.values())
    assert layout.head[1] == layout.num_trainable
    roles = [slot.role for slot in layout.slots]
    assert roles == sorted(roles, key=["trainable", "head", "buffer"].index)


def test_layers_cover_the_trainable_entries_without_gaps(module):
    layout = layout_of(module)
    edges = [edge for layer in layout.layers for edge in layer]
    assert edges[0] == 0
    assert edges[-1] == layout.num_trainable
    assert edges[1:-1:2] == edges[2::2]


@pytest.mark.parametrize("norm", ["group", "none"])
def test_views_share_memory_with_the_vector(norm):
    layout = layout_of(cnn(norm))
    vector = torch.zeros(layout.num_params)
    views = layout.views(vector)
    views["0.weight"][1, 0, 2, 2] = 5.0
    assert vector.tolist().count(5.0) == 1
    vector.fill_(3.0)
    assert all(bool((view == 3.0).all()) for view in views.values())


def test_views_of_convolution_weights_are_channels_last():
    layout = layout_of(cnn("group"))
    weight = layout.views(torch.zeros(layout.num_params))["3.weight"]
    assert weight.shape == (5, 3, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.stride() == (27, 1, 9, 3)


def test_a_vector_of_trainable_entries_gives_trainable_tensors():
    layout = layout_of(cnn("batch"))
    names = set(layout.views(torch.zeros(layout.num_trainable)))
    assert names == {name for name, _ in cnn("batch").named_parameters()}


def test_reading_is_a_copy():
    module = nn.Linear(2, 2)
    vector = layout_of(module).read(module)
    before = module.weight.detach().clone()
    vector.fill_(7.0)
    assert torch.equal(module.weight, before)


def test_tied_weights_are_there_once_and_stay_tied():
    module = Tied()
    layout = layout_of(module)
    assert next(slot.aliases for slot in layout.slots if slot.name == "encoder.weight") == ("decoder.weight",)
    layout.write(torch.arange(layout.num_params).float(), module)
    assert module.decoder.weight is module.encoder.weight


def test_a_layer_that_is_used_twice_is_there_once():
    shared = nn.Linear(3, 3)
    layout = layout_of(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(3, 2)))
    assert layout.num_params == 12 + 8


def test_the_vector_has_the_widest_dtype_and_tensors_keep_theirs():
    module = mixed()
    layout = layout_of(module)
    assert layout.dtype == torch.float64
    assert not layout.has_uniform_dtype
    assert [view.dtype for view in layout.views(layout.read(module)).values()] == [
        *[torch.bfloat16] * 2,
        *[torch.float32] * 2,
        *[torch.float64] * 2,
    ]


def test_integer_buffers_are_rounded_and_do_not_widen_the_vector():
    """The mean of 3 and 4 batches, 3.5, becomes 4 (round half to even)."""
    module = nn.BatchNorm1d(2)
    layout = layout_of(module)
    assert layout.dtype == torch.float32
    vector = layout.read(module)
    vector[-1] = 3.5
    layout.write(vector, module)
    assert module.num_batches_tracked.dtype == torch.int64
    assert int(module.num_batches_tracked) == 4


def test_buffers_that_are_not_saved_do_not_travel():
    module = Buffered()
    layout = layout_of(module)
    assert [slot.name for slot in layout.slots] == ["layer.weight", "layer.bias", "kept"]
    layout.write(torch.zeros(layout.num_params), module)
    assert module.passing.tolist() == [9.0]


def test_frozen_parameters_stay_with_the_module():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].weight.requires_grad_(False)
    layout = layout_of(module, frozen=["1"])
    assert layout.frozen == ("0.weight", "1.weight", "1.bias")
    assert [slot.name for slot in layout.slots] == ["0.bias", "2.weight", "2.bias"]


def test_freezing_a_module_freezes_weights_that_are_tied_to_it():
    layout = layout_of(Tied(), frozen=["decoder"], head="middle")
    assert layout.frozen == ("encoder.weight", "decoder.bias")


def test_freezing_the_parent_freezes_everything_in_it():
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 1))
    assert layout_of(module, frozen=["0"]).num_params == 3


def test_the_head_is_the_last_layer_with_parameters_or_the_one_asked_for():
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Softmax(dim=1))
    assert find_head(module) == "2"
    assert layout_of(module).head == (9, 13)
    chosen = layout_of(module, head="0")
    assert chosen.head == (4, 13)
    assert [slot.name for slot in chosen.slots] == ["2.weight", "2.bias", "0.weight", "0.bias"]


def test_a_weight_tied_to_the_head_belongs_to_the_head():
    layout = layout_of(Tied(), head="decoder")
    assert {slot.name for slot in layout.slots if slot.role == "head"} == {"encoder.weight", "decoder.bias"}


def test_parameters_of_the_module_itself_are_its_head():
    assert layout_of(nn.Linear(2, 3)).head == (0, 9)


class Nested(nn.Module):
    """Random parameters and buffers at random depth."""

    def __init__(self, shapes, children):
        super().__init__()
        for k, (shape, trains) in enumerate(shapes):
            if trains:
                self.register_parameter(f"p{k}", nn.Parameter(torch.zeros(shape)))
            else:
                self.register_buffer(f"b{k}", torch.zeros(shape))
        for k, child in enumerate(children):
            self.add_module(f"m{k}", child)


SHAPES = st.lists(st.tuples(st.lists(st.integers(1, 3), max_size=5).map(tuple), st.booleans()), max_size=3)
MODULES = st.recursive(
    SHAPES.map(lambda shapes: Nested(shapes, [])),
    lambda inner: st.builds(Nested, SHAPES, st.lists(inner, max_size=3)),
    max_leaves=6,
)


@given(module=MODULES)
@settings(max_examples=60, deadline=None)
def test_any_nested_module_survives_the_round_trip(module):
    module.add_module("head", nn.Linear(2, 2))
    layout = layout_of(module)
    vector = normal(layout.num_params)
    layout.write(vector, module)
    assert torch.equal(layout.read(module), vector)
    assert torch.equal(layout.flatten(layout.views(vector)), vector)
    shapes = {name: view.shape for name, view in layout.views(vector).items()}
    assert shapes == {name: tensor.shape for name, tensor in module.state_dict().items()}


def sharing():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight.data = module[0].weight.data[:2].expand(2, 4)
    return module


def without_gradient():
    return nn.Linear(2, 2).requires_grad_(False)


REFUSED = {
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(3)),
        {},
        "lazy parameters without a shape yet: 0.weight, 0.bias; run one",
    ),
    "complex": (
        lambda: nn.Linear(2, 2, dtype=torch.complex64),
        {},
        "complex tensors, which cannot be merged here: weight",
    ),
    "sharing": (sharing, {}, "'1.weight' and '0.weight' share memory without being the same parameter"),
    "nothing": (nn.ReLU, {}, "ReLU has no trainable parameters: nothing could be learned"),
    "all frozen": (without_gradient, {}, "Linear has no trainable parameters"),
    "unknown head": (mixed, {"head": "fc"}, "unknown head module 'fc'. Known: 0, 1, 2"),
    "head without parameters": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        {"head": "1"},
        "unknown head module '1'",
    ),
    "frozen head": (mixed, {"head": "2", "frozen": ["2"]}, "head module '2' has only frozen parameters; name another"),
    "unknown frozen": (mixed, {"frozen": ["O"]}, "unknown frozen module 'O'. Known: 0, 1, 2"),
    "frozen without a name": (mixed, {"frozen": [""]}, "unknown frozen module ''. Known: 0, 1, 2"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize(("build", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_merged_is_refused_by_name(build, options, message):
    with pytest.raises(UsageError) as refusal:
        layout_of(build(), **options)
    assert message in str(refusal.value)


# --- twins ---


def based():
    """A frozen base with a tied tensor, a trainable layer, and buffers."""
    module = nn.Sequential(Tied().requires_grad_(False), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[0].middle.requires_grad_(True)
    return module


def test_a_twin_shares_what_is_frozen_and_copies_the_rest():
    module = based()
    copied = twin(module)
    own = dict(copied.named_parameters())
    for name, parameter in module.named_parameters():
        shared = own[name].data_ptr() == parameter.data_ptr()
        assert shared == (not parameter.requires_grad)
        assert (own[name] is parameter) == shared
        assert torch.equal(own[name], parameter)
    for name, buffer in module.named_buffers():
        assert dict(copied.named_buffers())[name].data_ptr() != buffer.data_ptr()


def test_a_twin_is_trained_without_a_trace_in_the_original():
    module = based()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    copied = twin(module)
    copied(torch.randn(5, 4, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.1).step()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not torch.equal(copied[2].weight, module[2].weight)


def test_a_twin_keeps_the_same_ties():
    copied = twin(based())
    assert copied[0].decoder.weight is copied[0].encoder.weight


def test_a_twin_of_a_twin_shares_the_same_base():
    module = based()
    assert twin(twin(module))[0].encoder.weight is module[0].encoder.weight


def test_a_twin_has_the_layout_of_the_original():
    module = based()
    assert layout_of(twin(module)) == layout_of(module)
