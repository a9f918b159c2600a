"""Where clients are computed, with how many bits, and what happens where memory does not suffice."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import UsageError
from fedmerge.core.options import option_fields
from fedmerge.core.protocol import take
from fedmerge.core.vector import layout_of
from fedmerge.data.federated import Examples
from fedmerge.runtime import Folded, Sequential, Vectorised
from fedmerge.runtime.place import HERE, Place, device_of
from fedmerge.training import Descent, LocalTraining, ModuleTask, Planned
from small_federation import small

META = torch.device("meta")
"""A device without memory: whoever mixes its tensors with those of the CPU is told."""


def there(tree):
    return tree_map(lambda leaf: leaf.to(META) if isinstance(leaf, torch.Tensor) else leaf, tree)


@pytest.mark.parametrize("name", [*ALGORITHMS])
def test_clients_make_no_tensors_on_another_device_than_theirs(name):
    federation, cls = small(), ALGORITHMS[name].cls
    options = {"num_models": 2} if "num_models" in option_fields(cls) and name not in ("fedmerge", "oracle") else {}
    algorithm = cls(**options)
    state, fleet = federation.begin(algorithm)
    task = ModuleTask(federation.network().to(META), federation.layout, Descent(momentum=0.5))
    down, steps = algorithm.send(state, torch.arange(len(federation.data))), federation.batches([0], 1)[0]
    reply, own = algorithm.train(there(take(down, 0)), there(fleet.private[0]), there(steps), task)
    model = algorithm.personal(there(take(down, 0)), own, there(steps), task)
    found = [leaf for leaf in tree_leaves((reply, own, model)) if isinstance(leaf, torch.Tensor)]
    assert found
    assert {leaf.device.type for leaf in found} == {"meta"}


def test_examples_that_are_there_stay_there():
    place, examples = Place(META), Examples(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
    plan = Planned(examples, LocalTraining(), 0.1, 0, 1, 0)
    one, other = place.there((plan, torch.ones(2), "text"))[0], place.there(plan)
    assert one.examples.inputs.device.type == "meta"
    assert one.examples is other.examples
    assert HERE.there(plan) is plan
    assert HERE.back("anything") == "anything"


@pytest.mark.parametrize("name", ["cuda:99", "nowhere", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UsageError, match=f"device: got '{name}', which cannot be used here .*; expected cpu or cuda"):
        device_of(name)
    assert device_of("cpu") == torch.device("cpu")


def convolutions() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(4)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))


@pytest.mark.parametrize("kind", [Sequential, Vectorised, Folded])
def test_fewer_bits_train_nearly_as_well_and_do_not_hold_on_to_old_weights(kind):
    net = convolutions()
    layout, random = layout_of(net), torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(24, 1, 8, 8, generator=random), torch.arange(24) % 3
    plan = Planned(Examples(inputs, targets), LocalTraining(batch_size=8, epochs=10), 0.05, 0, 1, 0)

    def moved(arithmetic):
        engine = kind(net, layout, Descent(), place=Place(arithmetic=arithmetic))
        start = layout.read(net)
        (after,) = engine.map(lambda task, params, steps: task.train(params, steps), [(start, plan)])
        assert after.dtype == torch.float32
        return after - start

    exact, coarse = moved("float32"), moved("bfloat16")
    assert not torch.equal(exact, coarse)
    assert float((exact - coarse).norm() / exact.norm()) < 0.05


def test_tensor_cores_are_asked_for_within_a_call_only():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with Place(arithmetic="tf32").computing():
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("kind", [Vectorised, Folded])
def test_where_memory_does_not_suffice_chunks_are_halved_and_nobody_is_lost(kind, caplog):
    federation = small()
    engine = kind(federation.network(), federation.layout, federation.descent, most=6)
    clients = [(federation.draw(i), steps) for i, steps in enumerate(federation.batches(list(range(6)), 1))]
    sizes = []

    def train(task, params, steps):
        sizes.append(torch._C._functorch.get_unwrapped(params).shape[0])
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError("too many")
        return task.train(params, steps)

    found = engine.map(train, clients)
    wanted = federation.engine().map(lambda task, params, steps: task.train(params, steps), clients)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert max(sizes) > 2
    assert "memory does not suffice" in caplog.text
    tried = len(sizes)
    engine.map(train, clients)
    assert max(sizes[tried:]) <= 2  # it goes on with what fits


def test_one_client_that_does_not_fit_is_an_error():
    federation = small()
    engine = Vectorised(federation.network(), federation.layout, federation.descent)

    def train(task, params):
        raise torch.cuda.OutOfMemoryError("too large")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        engine.map(train, [(federation.draw(0),)])
