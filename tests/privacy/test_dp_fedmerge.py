"""The method: its release is noise on a clipped sum, and everything else is computed from releases."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmerge.algorithms.dp_fedmerge import DpFedMerge
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.core.errors import UsageError
from fedmerge.core.mixing import mirror_step
from fedmerge.core.private import number_of
from fedmerge.core.protocol import Update, deliver, state_tensors
from fedmerge.core.soup import Soup, mixing
from fedmerge.core.sums import along
from fedmerge.runtime import Meeting, Vectorised, run_round
from fedmerge.runtime.rounds import everyone
from fedmerge.training import ModuleTask
from small_federation import small

FEDERATION = small()
N, EVERYONE = 6, torch.arange(6)
EQUAL = torch.full((N,), 12)


def begin(method, seed=0):
    return method.init(FEDERATION.draw, FEDERATION.facts(), seed)


def replies(seed=0, size=1.0, count=N):
    draw = torch.Generator().manual_seed(seed)
    return Update(size * torch.randn(count, FEDERATION.layout.num_params, dtype=torch.float64, generator=draw))


def with_rows(state, logits):
    return replace(state, soup=Soup(state.soup.models, logits[None]))


def test_one_model_without_noise_and_clipping_is_fedavg_of_equal_clients():
    ours, theirs = DpFedMerge(num_models=1, noise_multiplier=0.0, clip=1e9, proximal=0.0), FedAvg()
    equal = replace(FEDERATION, data=[type(e)(e.inputs[:8], e.targets[:8]) for e in FEDERATION.data])
    (mine, _), (plain, _) = equal.play(ours, 4), equal.play(theirs, 4)
    torch.testing.assert_close(mine.soup.models, plain.models, rtol=1e-12, atol=1e-14)


def test_the_step_by_hand():
    """Θ_j − (Σ_i A_ij g_i + noise)/(qN/d), rows of six clients, q = 1/2, d = 2: a denominator of 1.5."""
    method = DpFedMerge(num_models=2, noise_multiplier=0.0, clip=1e9, sampling_rate=0.5, server_lr=0.25)
    state = with_rows(begin(method), torch.arange(12.0, dtype=torch.float64).reshape(6, 2).sin())
    update = replies()
    after = deliver(method, state, EVERYONE, update, EQUAL)
    weights = mixing(state.soup.logits[0])
    step = weights.T @ update.delta / 1.5
    torch.testing.assert_close(after.soup.models, state.soup.models - 0.25 * step, rtol=1e-12, atol=1e-14)


def test_momentum_is_post_processing_of_the_noisy_step():
    method = DpFedMerge(num_models=2, momentum=0.5, noise_multiplier=0.7)
    still = replace(method, momentum=0.0)
    state = replace(begin(method), velocity=torch.ones_like(begin(method).velocity))
    moved = deliver(method, state, EVERYONE, replies(), EQUAL).soup.models
    plain = deliver(still, state, EVERYONE, replies(), EQUAL).soup.models
    torch.testing.assert_close(moved, plain - 0.5, rtol=1e-12, atol=1e-14)


def test_noise_on_the_sum_is_z_times_the_clip_and_does_not_depend_on_the_replies():
    method = DpFedMerge(num_models=3, noise_multiplier=4.0, clip=0.5)
    silent = replace(method, noise_multiplier=0.0)
    state = begin(method)

    def added(update):
        with_noise, without = (deliver(m, state, EVERYONE, update, EQUAL).soup.models for m in (method, silent))
        return (without - with_noise) * method.denominator(state)

    one, other = added(replies(1)), added(replies(2, size=100.0))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert float(one.std()) == pytest.approx(4.0 * 0.5, rel=5 / math.sqrt(2 * one.numel()))
    assert method.denominator(state) == N / 3


def test_every_round_has_noise_of_its_own():
    method = DpFedMerge(num_models=1, noise_multiplier=1.0)
    state = begin(method)
    first = method.silence(state)
    second = method.silence(first)
    assert int(second.rounds) == 2
    steps = [state.soup.models - first.soup.models, first.soup.models - second.soup.models]
    assert not torch.allclose(*steps)


def test_a_round_without_replies_releases_noise_as_any_other():
    method = DpFedMerge(num_models=2, noise_multiplier=1.0)
    state = begin(method)
    silent = method.silence(state)
    zero = deliver(method, state, EVERYONE, Update(torch.zeros_like(replies().delta)), EQUAL)
    assert torch.equal(silent.soup.models, zero.soup.models)
    assert torch.equal(silent.soup.logits, state.soup.logits)
    assert not torch.equal(silent.soup.models, state.soup.models)


@pytest.mark.parametrize(("method", "silent"), [(DpFedMerge(), True), (FedAvg(), False)], ids=["private", "fedavg"])
def test_a_round_of_nobody_is_abandoned_unless_that_would_tell(method, silent):
    (state, fleet), nobody = FEDERATION.begin(method), torch.zeros(0, dtype=torch.int64)
    for meeting in (everyone(nobody), Meeting(EVERYONE, nobody)):
        found = run_round(method, state, fleet, meeting, [], EQUAL[:0], FEDERATION.engine())
        assert found.abandoned is not silent
        same = {name: torch.equal(t, state_tensors(state)[name]) for name, t in state_tensors(found.state).items()}
        assert all(same.values()) is not silent
    needed = replace(meeting, quorum=2)
    assert run_round(method, state, fleet, needed, [], EQUAL[:0], FEDERATION.engine()).abandoned


def test_a_round_whose_replies_are_all_refused_releases_noise():
    state, fleet = FEDERATION.begin(DpFedMerge())
    late = Meeting(EVERYONE, EVERYONE, late=frozenset(range(N)))
    batches = FEDERATION.batches(list(range(N)), 1)
    found = run_round(DpFedMerge(), state, fleet, late, batches, FEDERATION.counts, FEDERATION.engine())
    assert torch.equal(found.state.soup.models, DpFedMerge().silence(state).soup.models)
    assert not found.abandoned


def test_each_row_moves_by_its_own_reply_and_the_models_before_the_round():
    method = DpFedMerge(num_models=3, noise_multiplier=1.0, mixing_lr=0.4, decay=0.1)
    state, update = begin(method), replies()
    after = deliver(method, state, EVERYONE, update, EQUAL)
    others = deliver(method, state, EVERYONE, Update(torch.cat([update.delta[:1], replies(9, 50.0).delta[1:]])), EQUAL)
    assert torch.equal(after.soup.logits[:, 0], others.soup.logits[:, 0])
    assert not torch.equal(after.soup.logits[:, 1], others.soup.logits[:, 1])
    q = along(state.soup.models, update.delta, torch.full((N, 3), 1 / 3, dtype=torch.float64))
    by_hand = mirror_step(torch.zeros(N, 3, dtype=torch.float64), q, torch.zeros(N), lr=0.4, decay=0.1)
    torch.testing.assert_close(after.soup.logits[0], by_hand, rtol=1e-12, atol=1e-14)


def test_rows_of_absent_clients_stand_still():
    method = DpFedMerge(num_models=2, sampling_rate=0.5)
    state = begin(method)
    after = deliver(method, state, torch.tensor([1, 4]), replies(count=2), EQUAL[:2])
    assert torch.equal(after.soup.logits[0, [0, 2, 3, 5]], state.soup.logits[0, [0, 2, 3, 5]])
    assert not torch.equal(after.soup.logits[0, [1, 4]], state.soup.logits[0, [1, 4]])


def test_a_row_that_hardly_feels_its_update_does_not_move():
    """An update across all differences of the models says nothing of them; what is left is rounding."""
    method = DpFedMerge(num_models=2, noise_multiplier=0.0)
    state = begin(method)
    apart = state.soup.models[0] - state.soup.models[1]
    across = replies().delta
    across -= (across @ apart)[:, None] * apart / apart.square().sum()
    after = deliver(method, state, EVERYONE, Update(across), EQUAL)
    assert torch.equal(after.soup.logits, state.soup.logits)


def test_counts_matter_only_with_a_public_cap():
    counts = torch.tensor([1, 2, 3, 4, 5, 6])
    for cap, same in ((None, True), (6, False)):
        method = DpFedMerge(num_models=1, noise_multiplier=0.0, clip=1e9, count_cap=cap)
        steps = [deliver(method, begin(method), EVERYONE, replies(), n).soup.models for n in (counts, EQUAL)]
        assert torch.equal(*steps) == same
    method = DpFedMerge(num_models=1, noise_multiplier=0.0, clip=1e9, count_cap=6)
    by_hand = begin(method).soup.models - (counts.double() / 6) @ replies().delta / N
    torch.testing.assert_close(deliver(method, begin(method), EVERYONE, replies(), counts).soup.models, by_hand)


def test_models_start_from_public_draws():
    draws = [FEDERATION.draw(j) for j in range(3)]
    assert torch.equal(begin(DpFedMerge(num_models=1)).soup.models, draws[0][None])
    noisy = begin(DpFedMerge(num_models=2, noise=0.3)).soup.models
    assert torch.equal(noisy, torch.stack([draws[0] + 0.3 * draws[1], draws[0] + 0.3 * draws[2]]))
    assert torch.equal(begin(DpFedMerge(num_models=2, initial="independent")).soup.models, torch.stack(draws[:2]))
    assert not begin(DpFedMerge()).soup.logits.any()


def test_training_is_pulled_towards_what_was_received():
    """Twice proximal, the slope of proximal · ‖θ − start‖²."""
    method, task = DpFedMerge(proximal=0.7), ModuleTask(FEDERATION.network(), FEDERATION.layout, FEDERATION.descent)
    steps, start = FEDERATION.batches([0], 1)[0], FEDERATION.draw(0)
    found, _ = method.train(start, (), steps, task)
    assert torch.equal(found.delta, start - task.train(start, steps, pull=1.4))


def test_with_noise_vectorised_equals_sequential():
    method = DpFedMerge(num_models=3)
    (one, _), (other, _) = (FEDERATION.play(method, 3, *kind) for kind in ((), (Vectorised,)))
    for name, tensor in state_tensors(one).items():
        torch.testing.assert_close(tensor, state_tensors(other)[name], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ the key


def test_the_public_key_is_the_seed_and_says_so():
    state = begin(DpFedMerge(), seed=2**40 + 3)
    assert number_of(state.key) == 2**40 + 3
    said = DpFedMerge().describe(state)["privacy_noise"]
    assert said == "from the run's seed: a simulation, whoever knows the seed can take it away"


def test_a_secret_key_is_long_fresh_and_says_so():
    method = DpFedMerge(secret_noise=True)
    one, other = begin(method), begin(method)
    assert number_of(one.key) != number_of(other.key)
    assert number_of(one.key).bit_length() > 128
    assert method.describe(one)["privacy_noise"] == "from a secret key"
    assert not torch.equal(method.silence(one).soup.models, method.silence(other).soup.models)


def test_the_key_stays_for_the_whole_run():
    method = DpFedMerge(secret_noise=True)
    state = begin(method)
    assert torch.equal(deliver(method, state, EVERYONE, replies(), EQUAL).key, state.key)


# ------------------------------------------------------------------------------------------------ what it says


def test_what_it_says_does_not_depend_on_the_clients():
    method = DpFedMerge(num_models=2, noise_multiplier=1.5, clip=0.2, sampling_rate=0.5, server_lr=2.0)
    state = begin(method)
    moved = deliver(method, state, EVERYONE, replies(), EQUAL)
    assert method.describe(state) == method.describe(moved)
    assert method.describe(state)["num_models"] == 2
    assert method.describe(state)["noise_std"] == pytest.approx(2.0 * 1.5 * 0.2 / (0.5 * N / 2))


def test_the_server_keeps_models_momentum_and_logits():
    method, P = DpFedMerge(num_models=3), FEDERATION.layout.num_params
    cost = method.cost(begin(method))
    assert (cost.bytes_down, cost.bytes_up, cost.server_floats) == (8 * P, 8 * P, 2 * 3 * P + N * 3)


def test_more_models_than_clients_are_refused():
    with pytest.raises(UsageError, match=r"dp-fedmerge.num_models: got 7 models for 6 clients"):
        begin(DpFedMerge(num_models=7))


def test_networks_with_buffers_are_refused_word_by_word():
    normed = replace(FEDERATION, build=lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    with pytest.raises(UsageError) as refused:
        DpFedMerge().init(normed.draw, normed.facts(), 0)
    assert str(refused.value) == (
        "dp-fedmerge: got a network with 13 numbers in buffers (BatchNorm statistics), which would be averaged without "
        "protection; use a network without them, for example with GroupNorm"
    )


def test_an_option_without_effect_is_refused():
    with pytest.raises(UsageError) as refused:
        DpFedMerge(initial="independent", noise=0.2)
    assert str(refused.value) == (
        "DpFedMerge.noise: got 0.2, which has no effect with initial='independent'; leave it out"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.inf),
        ("clip", 0.0),
        ("clip", math.nan),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.5),
        ("delta", 1.0),
        ("count_cap", 0),
        ("num_models", 0),
        ("momentum", 1.0),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(UsageError, match=f"DpFedMerge.{name}: got"):
        DpFedMerge(**{name: value})
