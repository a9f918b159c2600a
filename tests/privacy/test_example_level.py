"""Training that protects each example equals clipping by hand, and what it cannot protect is refused."""

import importlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedmerge.algorithms.dp_fedmerge import DpFedMerge
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.algorithms.fedem import FedEm
from fedmerge.algorithms.fedrod import FedRod
from fedmerge.algorithms.ifca import Ifca
from fedmerge.algorithms.per_fedavg import PerFedAvg
from fedmerge.core.errors import UsageError
from fedmerge.core.keeping import keeping
from fedmerge.core.randomness import generator
from fedmerge.core.vector import layout_of
from fedmerge.data.federated import Examples
from fedmerge.experiment.trial import runtime_for
from fedmerge.privacy import epsilon, example_epsilon, example_epsilons
from fedmerge.runtime import Sequential, Vectorised
from fedmerge.training import Descent, LocalTraining, ModuleTask, draw_batches
from fedmerge.training.private import (
    ExampleGradients,
    PrivateBatches,
    PrivateTask,
    Protection,
    noise_of_step,
    protected_task,
    refuse_unfit,
)
from small_federation import images, small

TRAINING = LocalTraining(lr=0.1, batch_size=4, epochs=2, dp_clip=0.7, dp_noise=0.5)
FEDERATION = small()
PRIVATE = replace(FEDERATION, training=TRAINING)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)
    )


def pictures():
    return replace(FEDERATION, build=convolutional, data=images([9, 8], (0, 1), (1, 4, 4)), groups=(0, 1))


def batches(federation=FEDERATION, client=0, **changes):
    training = replace(TRAINING, **changes)
    return draw_batches(federation.data[client], training, lr=0.1, seed=3, round_number=2, client=client)


def unlimited(drawn):
    return PrivateBatches(tuple(drawn), replace(drawn.protection, clip=math.inf, noise=0.0))


def task_of(drawn, federation=FEDERATION, descent=None):
    plain = ModuleTask(federation.network(), federation.layout, descent or Descent())
    return plain, PrivateTask(plain, ExampleGradients(federation.network(), federation.layout), drawn)


def clipped_by_hand(plain, params, batch, clip, expected):
    """One example after another through the plain task."""
    total = torch.zeros(plain.layout.num_trainable, dtype=torch.float64)
    for b in range(len(batch.targets)):
        one = batch._replace(inputs=batch.inputs[b : b + 1], targets=batch.targets[b : b + 1], weight=torch.ones(1))
        slope = plain.gradient(params, one).gradient
        total += slope * min(1.0, clip / float(slope.norm()))
    return total / expected


@pytest.mark.parametrize("federation", [FEDERATION, pictures()], ids=["perceptron", "convolutions"])
def test_a_step_is_clipping_by_hand_with_noise(federation):
    drawn = batches(federation)
    plain, private = task_of(drawn, federation)
    params, lengths = federation.draw(0), []
    for step, batch in enumerate(drawn):
        noise = noise_of_step(drawn.protection, step, len(params)) / 4
        by_hand = clipped_by_hand(plain, params, batch, 0.7, 4)
        torch.testing.assert_close(private.gradient(params, batch).gradient, by_hand + noise, **CLOSE)
        lengths.append(float(by_hand.norm()) * 4)
    assert max(lengths) <= 0.7 * max(len(batch.targets) for batch in drawn) * (1 + 1e-9)


@pytest.mark.parametrize("descent", [Descent(momentum=0.5, weight_decay=0.1), Descent(optimizer="adamw")])
@pytest.mark.parametrize("federation", [FEDERATION, pictures()], ids=["perceptron", "convolutions"])
def test_without_noise_and_clipping_it_is_plain_training_on_the_same_batches(federation, descent):
    drawn = unlimited(batches(federation))
    plain, private = task_of(drawn, federation, descent)
    params = federation.draw(0)
    ours = private.train(params, drawn, pull=0.3)
    torch.testing.assert_close(ours, plain.train(params, tuple(drawn), pull=0.3), **CLOSE)
    assert not torch.equal(ours, params)


def test_weights_that_a_method_gives_its_examples_count():
    """Without a limit the gradient of a reweighted batch is the plain one's, in the vector's own precision."""
    drawn = unlimited(batches())
    plain, private = task_of(drawn)
    params, batch = FEDERATION.draw(0), drawn[0]
    uneven = batch._replace(weight=torch.linspace(0.1, 0.9, len(batch.targets), dtype=torch.float64))
    found = private.gradient(params, uneven).gradient
    torch.testing.assert_close(found, plain.gradient(params, uneven).gradient, **CLOSE)


def test_precision_is_that_of_the_vector():
    narrow = small(torch.float32)
    drawn = batches(narrow)
    _, private = task_of(drawn, narrow)
    assert private.gradient(narrow.draw(0), drawn[0]).gradient.dtype == torch.float32


def test_the_pull_goes_where_it_is_told_and_is_none_by_default():
    params, centre = FEDERATION.draw(0), FEDERATION.draw(1)
    drawn = unlimited(batches())
    for given in ({}, {"pull": 0.4, "towards": centre}):
        plain, private = task_of(drawn)
        wanted = plain.train(params, tuple(drawn), **given)
        torch.testing.assert_close(private.train(params, drawn, **given), wanted, **CLOSE)
        plain, private = task_of(drawn)
        found = private.descend(params, drawn, private.gradient, **given)
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_one_example_moves_a_step_by_the_clip_at_most():
    examples = FEDERATION.data[0]
    gradients, params = ExampleGradients(FEDERATION.network(), FEDERATION.layout), FEDERATION.draw(0)
    whole = draw_batches(examples, replace(TRAINING, batch_size=12), lr=0.1, seed=0, round_number=1, client=0)[0]
    for gone in range(12):
        left = torch.arange(12) != gone
        part = whole._replace(inputs=whole.inputs[left], targets=whole.targets[left])
        both = [gradients.clipped_sum(params, b, torch.full((len(b.targets),), 1e6), 0.7) for b in (whole, part)]
        assert float((both[0] - both[1]).norm()) <= 0.7 * (1 + 1e-9)


def test_weights_that_a_method_changes_are_clipped_too():
    drawn = unlimited(batches())
    drawn.protection = replace(drawn.protection, clip=0.01)
    _, private = task_of(drawn)
    batch = drawn[0]
    loud = private.gradient(FEDERATION.draw(0), batch._replace(weight=1e9 * batch.weight)).gradient
    assert 0 < float(loud.norm()) <= 0.01 * len(batch.targets) / 4 * (1 + 1e-9)


def test_frozen_and_unused_parts_have_no_gradient():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.used, self.unused = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.used(self.frozen(x))

    network = Partly().double()
    layout = layout_of(network, head="used")
    found = ExampleGradients(network, layout).clipped_sum(layout.read(network), batches()[0], torch.ones(1), 1e9)
    for slot in layout.slots:
        part = layout.views(found)[slot.name]
        assert bool(part.any()) == slot.name.startswith("used")


# ------------------------------------------------------------------------------------------------ batches and noise


def test_every_example_is_drawn_by_itself():
    """Of 4,000 steps with probability 1/3 the share is a third, within five standard errors, and sizes vary."""
    many = batches(steps=4000, epochs=2)
    sizes = np.array([len(batch.targets) for batch in many])
    assert abs(sizes.mean() - 4) < 5 * math.sqrt(12 * (1 / 3) * (2 / 3) / 4000)
    assert sizes.var() == pytest.approx(12 * (1 / 3) * (2 / 3), rel=0.15)
    assert sizes.min() == 0
    assert all(batch.weight.tolist() == [0.25] * len(batch.targets) for batch in many)
    assert all(float(batch.lr) == 0.1 for batch in many)


def test_steps_and_expected_sizes():
    assert [TRAINING.private_steps(n) for n in (3, 4, 5, 12)] == [2, 2, 4, 6]
    assert [TRAINING.expected(n) for n in (3, 4, 12)] == [3, 4, 4]
    assert replace(TRAINING, steps=5).private_steps(12) == 5
    assert TRAINING.passes(12) == 6 * 4
    assert len(batches()) == 6
    assert LocalTraining(batch_size=4, epochs=2).passes(12) == 24


def test_a_client_with_fewer_examples_than_a_batch_takes_all_of_them():
    drawn = batches(batch_size=100)
    assert [len(batch.targets) for batch in drawn] == [12, 12]
    assert drawn.protection.expected == 12


def test_batches_depend_on_seed_round_and_client_and_carry_the_protection():
    one, same = batches(), batches()
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(one, same, strict=True))
    assert one.protection == Protection(0.7, 0.5, 4, 3, 2, 0)
    tokens = Examples(torch.arange(12)[:, None], torch.zeros(12, dtype=torch.int64))
    drawn = draw_batches(tokens, TRAINING, lr=0.1, seed=3, round_number=2, client=0)
    assert drawn[0].weight.dtype == torch.float32
    assert [len(a.targets) for a in drawn] == [len(b.targets) for b in one]
    assert not isinstance(batches(dp_clip=None, dp_noise=None), PrivateBatches)


def test_an_empty_step_is_noise_alone():
    drawn = batches(steps=300)
    _, private = task_of(drawn)
    step = next(s for s, batch in enumerate(drawn) if not len(batch.targets))
    found = private.gradient(FEDERATION.draw(0), drawn[step]).gradient
    torch.testing.assert_close(found, noise_of_step(drawn.protection, step, len(found)) / 4, **CLOSE)


def test_noise_depends_on_seed_round_client_and_step():
    base = Protection(2.0, 3.0, 4, seed=1, round=2, client=3)
    first = noise_of_step(base, 0, 20_000)
    by_hand = generator(1, "example noise", 2, 3, 0).standard_normal(20_000)
    assert torch.equal(first, 6.0 * torch.from_numpy(by_hand))
    others = [replace(base, seed=2), replace(base, round=3), replace(base, client=4)]
    assert not any(torch.equal(first, noise_of_step(other, 0, 20_000)) for other in others)
    assert not torch.equal(first, noise_of_step(base, 1, 20_000))
    assert torch.equal(noise_of_step(replace(base, noise=0.0), 0, 5), torch.zeros(5, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ in the round loop


def test_rounds_with_protected_examples_train_and_repeat_to_the_bit():
    (one, _), (same, _), (plain, _) = PRIVATE.play(FedAvg(), 3), PRIVATE.play(FedAvg(), 3), FEDERATION.play(FedAvg(), 3)
    assert torch.equal(one.models, same.models)
    assert not torch.allclose(one.models, plain.models)
    assert bool(one.models.isfinite().all())


def test_both_levels_of_privacy_and_kept_parts_go_together():
    method = keeping(DpFedMerge(), FEDERATION.layout, ("head",))
    state, _ = PRIVATE.play(method, 2)
    assert bool(state.soup.models.isfinite().all())


def test_the_protected_task_is_for_clients_with_protected_batches_only():
    plain, made = object(), []
    assert protected_task(plain, lambda: made.append(1), (torch.zeros(1), tuple(batches()))) is plain
    assert made == []
    engine = Sequential(FEDERATION.network(), FEDERATION.layout, Descent())
    found = engine.map(lambda task, _: type(task).__name__, [(batches(),), (tuple(batches()),)])
    assert found == ["PrivateTask", "ModuleTask"]


BEYOND = (
    "training.dp_clip: this method's clients do more with their examples than the accountant counts: it {}; expected "
    "one protected step per batch. Use fedavg, fedavgm, fedprox, fedmerge or dp-fedmerge, or leave dp_clip out"
)


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (Ifca(num_models=2), "looks at losses"),
        (FedEm(num_models=2), "looks at outputs"),
        (PerFedAvg(), "looks at a batch more than once"),
        (FedRod(), "trains through changed features"),
    ],
    ids=["ifca", "fedem", "per-fedavg", "fedrod"],
)
def test_methods_that_look_at_their_examples_otherwise_are_refused(method, what):
    with pytest.raises(UsageError) as refused:
        PRIVATE.play(method, 1)
    assert str(refused.value) == BEYOND.format(what)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("slope_through", "trains through changed features"),
        ("features", "looks at features"),
        ("predict", "looks at outputs"),
        ("losses", "looks at losses"),
        ("loss", "looks at losses"),
        ("right", "looks at answers"),
    ],
)
def test_every_other_look_at_the_examples_is_refused(name, what):
    with pytest.raises(UsageError) as refused:
        getattr(task_of(batches())[1], name)(None, None)
    assert str(refused.value) == BEYOND.format(what)


def test_class_counts_in_the_outputs_are_refused():
    drawn = batches()
    with pytest.raises(UsageError) as refused:
        task_of(drawn)[1].gradient(FEDERATION.draw(0), drawn[0], torch.zeros(1))
    assert str(refused.value) == BEYOND.format("adds to the outputs what it knows of the client's classes")


def test_batches_of_ones_own_and_batches_used_twice_are_refused():
    drawn, params = batches(), FEDERATION.draw(0)
    _, private = task_of(drawn)
    with pytest.raises(UsageError, match="it makes batches of its own;"):
        private.gradient(params, drawn[0]._replace(inputs=drawn[0].inputs.clone()))
    assert math.isnan(float(private.gradient(params, drawn[0]).loss))
    with pytest.raises(UsageError, match="it looks at a batch more than once;"):
        private.gradient(params, drawn[0])


# ------------------------------------------------------------------------------------------------ refusals


def test_the_vectorised_engine_refuses_protected_examples():
    wanted = "training.dp_clip: runtime 'vectorised' has no gradients of single examples; use runtime 'sequential'"
    with pytest.raises(UsageError) as refused:
        PRIVATE.play(FedAvg(), 1, Vectorised)
    assert str(refused.value) == wanted
    with pytest.raises(UsageError) as refused:
        runtime_for(TRAINING, "vectorised", FEDERATION.network(), FEDERATION.layout)
    assert str(refused.value) == wanted


def test_auto_takes_the_sequential_engine():
    network, layout = FEDERATION.network(), FEDERATION.layout
    assert runtime_for(TRAINING, "auto", network, layout) == "sequential"
    assert runtime_for(LocalTraining(), "auto", network, layout) == "auto"
    assert runtime_for(LocalTraining(), "vectorised", network, layout) == "vectorised"


def test_networks_with_batchnorm_are_refused_word_by_word():
    normed = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with pytest.raises(UsageError) as refused:
        runtime_for(TRAINING, "auto", normed, layout_of(normed))
    assert str(refused.value) == (
        "training.dp_clip: got a Sequential that Opacus rejects (BatchNorm cannot support training with differential "
        "privacy); expected a network in which examples do not meet: use GroupNorm or LayerNorm instead of BatchNorm"
    )


def test_other_buffers_are_refused():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.register_buffer("seen", torch.zeros(2))

    with pytest.raises(UsageError) as refused:
        refuse_unfit(Counting(), layout_of(Counting()))
    assert str(refused.value) == (
        "training.dp_clip: got a Counting with 2 numbers in buffers, which would leave the client unprotected; "
        "expected a network without"
    )


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError) as refused:
        refuse_unfit(FEDERATION.network(), FEDERATION.layout)
    assert str(refused.value) == (
        "training.dp_clip: the package opacus is missing; install it with pip install 'fedmerge[privacy]'"
    )


@pytest.mark.parametrize("given", [{"dp_clip": 1.0}, {"dp_noise": 1.0}])
def test_one_of_clip_and_noise_alone_is_refused(given):
    with pytest.raises(UsageError) as refused:
        LocalTraining(**given)
    assert str(refused.value) == "LocalTraining.dp_clip: got one of dp_clip and dp_noise; give both or none"


# ------------------------------------------------------------------------------------------------ epsilon


def test_epsilon_of_an_example_by_hand():
    """12 examples, 4 expected: a rate of 1/3 and 6 steps in each of 5 rounds."""
    assert example_epsilon(TRAINING, 12, 5, 1e-5) == epsilon(0.5, 4 / 12, 30, 1e-5)
    assert example_epsilons(TRAINING, [12, 3, 12], 1, 1e-5) == (
        epsilon(0.5, 4 / 12, 6, 1e-5),
        epsilon(0.5, 1.0, 2, 1e-5),
        epsilon(0.5, 4 / 12, 6, 1e-5),
    )
    assert example_epsilons(TRAINING, [0], 1, 1e-5) == (math.inf,)


def test_training_without_protection_has_no_epsilon():
    with pytest.raises(UsageError) as refused:
        example_epsilon(LocalTraining(), 12, 1, 1e-5)
    assert str(refused.value) == (
        "training.dp_clip: got none; expected dp_clip and dp_noise: examples are not protected without them"
    )
