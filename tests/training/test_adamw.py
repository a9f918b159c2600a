"""Local AdamW against PyTorch's own, and the same numbers however it is run."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import Batch, Slope
from fedmerge.runtime import Sequential, Vectorised
from fedmerge.training import Descent, FunctionalTask, LocalTraining, ModuleTask, draw_batches
from small_federation import SmallFederation, perceptron, tables

ADAMW = Descent(optimizer="adamw")
DECAYED = Descent(optimizer="adamw", weight_decay=0.05)
RATES = [(0.1, 0.0), (0.3, 1.0), (0.05, -1.0), (0.2, 0.5), (0.1, 0.1), (0.02, -0.3)]
START = [1.0, -2.0, 0.5]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def batch(lr, number=0.0):
    """A step; the only input is a number that the gradient may look at."""
    one = torch.ones(1, dtype=torch.float64)
    return Batch(number * one, torch.zeros(1, dtype=torch.int64), one, torch.tensor(lr, dtype=torch.float64))


def start(*values):
    return torch.tensor(values or START, dtype=torch.float64)


def curved(params, step):
    """Gradient of Σ log cosh(θ) · exp(input) − θ."""
    return Slope(torch.tensor(0.0), torch.tanh(params) * torch.exp(step.inputs[:1]) - 1, params[:0])


def theirs(steps, *, weight_decay=0.0, slope=curved):
    """Where PyTorch's own optimiser ends."""
    params = torch.nn.Parameter(start())
    optimizer = torch.optim.AdamW([params], lr=1.0, weight_decay=weight_decay)
    for step in steps:
        params.grad = slope(params.detach(), step).gradient
        optimizer.param_groups[0]["lr"] = float(step.lr)
        optimizer.step()
    return params.detach()


# ---------------------------------------------------------------------------------------- PyTorch's own


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("count", range(1, len(RATES) + 1))
def test_it_is_torchs_adamw_step_for_step(count, weight_decay):
    steps = tuple(batch(*values) for values in RATES[:count])
    found = replace(ADAMW, weight_decay=weight_decay)(start(), steps, curved)
    torch.testing.assert_close(found, theirs(steps, weight_decay=weight_decay), rtol=1e-12, atol=1e-12)


def test_the_first_step_has_the_length_of_the_rate():
    """Both moments are unbiased: g / (|g| + 1e-8), so θ moves by 0.1 against the sign of each gradient."""
    found = ADAMW(start(1.0, 1.0), (batch(0.1),), lambda p, _: Slope(p.sum(), start(5.0, -0.01), p[:0]))
    torch.testing.assert_close(found, start(1 - 0.1 * 5 / (5 + 1e-8), 1 + 0.1 * 0.01 / (0.01 + 1e-8)))


def test_weight_decay_shrinks_what_has_no_gradient():
    """Decoupled: 2 · (1 − 0.1 · 0.05), without going through the moments."""
    found = DECAYED(start(2.0), (batch(0.1),), lambda p, _: Slope(p.sum(), torch.zeros_like(p), p[:0]))
    torch.testing.assert_close(found, start(2 * (1 - 0.1 * 0.05)))


def test_the_pull_is_a_part_of_the_gradient():
    steps, centre = tuple(batch(*values) for values in RATES), start(0.2, 0.3, -0.4)

    def pulled(params, step):
        slope = curved(params, step)
        return slope._replace(gradient=slope.gradient + 0.7 * (params - centre))

    found = DECAYED(start(), steps, curved, pull=0.7, towards=centre)
    torch.testing.assert_close(found, theirs(steps, weight_decay=0.05, slope=pulled), rtol=1e-12, atol=1e-12)


def test_every_round_starts_from_empty_moments():
    first = ADAMW(start(), (batch(0.1),), curved)
    assert torch.equal(ADAMW(first, (batch(0.1),), curved), ADAMW(first, (batch(0.1),), curved))
    assert not torch.allclose(ADAMW(first, (batch(0.1),), curved), ADAMW(start(), (batch(0.1),) * 2, curved))


def test_buffers_follow_their_batches_and_get_no_decay():
    def counted(params, step):
        return Slope(torch.tensor(0.0), torch.tanh(params[:2]), params[2:] + 1)

    found = DECAYED(start(1.0, 2.0, 10.0), (batch(0.1), batch(0.1)), counted)
    assert float(found[2]) == 12.0


# ---------------------------------------------------------------------------------------- steps without a rate


def test_steps_of_rate_zero_change_nothing():
    steps, padding = tuple(batch(*values) for values in RATES[:3]), (batch(0.0, 5.0), batch(0.0))
    short = DECAYED(start(), steps, curved, pull=0.1)
    assert torch.equal(DECAYED(start(), steps + padding, curved, pull=0.1), short)
    assert torch.equal(DECAYED(start(), padding, curved), start())


@given(places=st.lists(st.integers(0, len(RATES)), max_size=5))
def test_steps_of_rate_zero_leave_the_moments_alone(places):
    """Padding between real steps, as where a client goes through padded batches twice."""
    steps = [batch(*values) for values in RATES]
    padded = list(steps)
    for place in sorted(places, reverse=True):
        padded.insert(place, batch(0.0, 3.0))
    short = DECAYED(start(), tuple(steps), curved)
    torch.testing.assert_close(DECAYED(start(), tuple(padded), curved), short, rtol=0, atol=0)


def test_an_entry_without_a_rate_for_a_while_begins_as_if_it_were_alone():
    """Where clients train one part after the other, the second part's moments begin with its own first step."""
    rates = [start(0.1, 0.0), start(0.3, 0.0), start(0.0, 0.2), start(0.0, 0.1)]
    steps = [batch(0.0, number)._replace(lr=lr) for lr, number in zip(rates, (0.0, 1.0, -1.0, 0.5), strict=True)]
    found = DECAYED(start(1.0, -2.0), tuple(steps), curved)
    alone = [
        DECAYED(start(value), tuple(step._replace(lr=step.lr[k]) for step in steps), curved)
        for k, value in enumerate((1.0, -2.0))
    ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------- however it is run


def federation_of(sizes, size=4):
    return SmallFederation(
        perceptron,
        tables(sizes, (0,) * len(sizes)),
        (0,) * len(sizes),
        training=LocalTraining(lr=0.01, batch_size=size, epochs=2, optimizer="adamw", weight_decay=0.05),
        descent=DECAYED,
    )


@given(sizes=st.lists(st.integers(1, 25), min_size=1, max_size=7), most=st.integers(1, 4), size=st.integers(1, 7))
@settings(max_examples=10, deadline=None)
def test_clients_of_any_size_train_as_if_alone(sizes, most, size):
    federation = federation_of(sizes, size)
    clients = [(federation.draw(i), steps) for i, steps in enumerate(federation.batches(list(range(len(sizes))), 1))]
    mapped = Vectorised(federation.network(), federation.layout, federation.descent, most=most)
    one, other = (
        engine.map(lambda task, params, batches: task.train(params, batches), clients)
        for engine in (federation.engine(Sequential), mapped)
    )
    torch.testing.assert_close(torch.stack(one), torch.stack(other), **CLOSE)


def test_both_forms_of_a_task_give_the_same_numbers_under_vmap():
    federation = federation_of([12, 12])
    parts = (federation.network(), federation.layout, federation.descent)
    steps = federation.batches([0, 1], 1)
    starts = torch.stack([federation.draw(0), federation.draw(1)])
    alone = [ModuleTask(*parts).train(vector, own) for vector, own in zip(starts, steps, strict=True)]
    side_by_side = tuple(Batch(*map(torch.stack, zip(*pair, strict=True))) for pair in zip(*steps, strict=True))
    mapped = vmap(FunctionalTask(*parts).train)(starts, side_by_side)
    torch.testing.assert_close(mapped, torch.stack(alone), **CLOSE)


def test_training_descends():
    federation = federation_of([40])
    task = ModuleTask(federation.network(), federation.layout, federation.descent)
    (steps,) = federation.batches([0], 1)
    before, after = (
        task.loss(vector, steps[0]) for vector in (federation.draw(0), task.train(federation.draw(0), steps))
    )
    assert float(after) < float(before)


# ---------------------------------------------------------------------------------------- options


def test_momentum_of_sgd_is_refused():
    message = r"LocalTraining.momentum: got one for adamw, which has its own; leave it out"
    with pytest.raises(UsageError, match=message):
        LocalTraining(optimizer="adamw", momentum=0.5)


def test_options_reach_the_descent():
    training = LocalTraining(optimizer="adamw", weight_decay=0.05, batch_size=4)
    assert training.descent() == DECAYED
    examples = tables([8], (0,))[0]
    assert len(draw_batches(examples, training, lr=0.1, seed=0, round_number=1, client=0)) == 2 * 2  # epochs · 8 / 4
