"""Laws that every registered method keeps, in float64. A new method is tested because it is registered."""

import dataclasses
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.keeping import Keeping, keeping
from fedmerge.core.options import option_fields
from fedmerge.core.protocol import Algorithm, Federation, deliver, stack, state_tensors, take, tree_bytes, with_tensors
from fedmerge.core.vector import layout_of
from fedmerge.data.federated import Examples
from fedmerge.runtime import Fleet, Folded, Sequential, Vectorised, personal_models, run_round, score
from fedmerge.training import Descent, LocalTraining, draw_batches, one_pass
from small_federation import small

N = 9
SIZES = [6, 7, 9, 6, 12, 8, 6, 10, 7]  # unequal on purpose: padding and buckets are exercised
GROUPS = tuple(i % 3 for i in range(N))

ROUNDS = 6
"""Long enough for the search, the split, and partial participation afterwards."""

VARIANTS = [
    *((name, {}) for name in ALGORITHMS),
    ("fedavg", {"server_momentum": 0.5}),
    ("fesem", {"server_momentum": 0.5}),
    ("ifca", {"server_momentum": 0.5}),
    ("fedmerge", {"num_models": 3}),
    ("fedmerge", {"num_models": 3, "initial": "noise"}),
    ("fedmerge", {"num_models": 3, "rows": "layer"}),
    ("fedmerge", {"num_models": 3, "rows": "body-head", "initial": "noise", "order": "together"}),
    ("fedmerge", {"rule": "official", "num_models": 3}),
    ("fedmerge", {"rule": "gradient", "num_models": 3}),
    ("fedmerge", {"rule": "adam", "num_models": 3}),
    ("cfl", {"warmup": 1, "min_size": 1, "stationary": 1.0}),
    ("cfl-smoothed", {"warmup": 1, "min_size": 1, "stationary": 1.0, "gap": 0.0, "server_momentum": 0.5}),
    ("femam", {"rounds_per_level": 2}),
    ("fedsoft", {"estimate_every": 3}),
    ("flhc", {"warmup": 1, "metric": "cosine", "linkage": "average"}),
    ("fedmerge", {"keep": ("head",), "num_models": 3}),
    ("ifca", {"keep": ("0", "head")}),
    ("scaffold", {"keep": ("1",)}),
    ("one-shot", {"warmup": 4, "server_momentum": 0.5}),
    ("dp-fedmerge", {"count_cap": 8, "momentum": 0.5, "initial": "independent"}),
    ("dp-fedmerge", {"num_models": 1, "keep": ("head",)}),
]
IDS = [name + ("" if not options else f"-{'-'.join(str(v) for v in options.values())}") for name, options in VARIANTS]


def make(name, options):
    options = dict(options)
    kept = options.pop("keep", ())
    return keeping(_made(name, options), LAYOUT, kept)


def _made(name, options):
    if name not in ("fedmerge", "oracle") and "num_models" in option_fields(ALGORITHMS[name].cls):
        options = {"num_models": 3, **options}
    if name == "dp-fedmerge":  # laws of what it does with replies; tests/privacy has those of its noise
        options = {"noise_multiplier": 0.0, **options}
    return ALGORITHMS[name].cls(**options)


@pytest.fixture(params=VARIANTS, ids=IDS)
def algorithm(request):
    return make(*request.param)


def examples(client):
    rng = np.random.default_rng([7, client])
    x = rng.normal(size=(SIZES[client], 5))
    y = (x[:, 0] + (x[:, 1] > 0) + GROUPS[client]).astype(int) % 3
    return Examples(torch.from_numpy(x), torch.from_numpy(y))


def network(draw):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(13 + draw)
        return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).double()


MODULE = network(0)
LAYOUT = layout_of(MODULE)
FACTS = Federation(
    N,
    LAYOUT.num_trainable,
    LAYOUT.head,
    LAYOUT.layers,
    norms=LAYOUT.norms,
    head_bias=LAYOUT.head_bias,
    groups=GROUPS,
)
DATA = [examples(i) for i in range(N)]
TRAINING = LocalTraining(lr=0.2, batch_size=4, epochs=2)


def draw(j):
    return LAYOUT.read(network(j))


def engine(kind=Sequential):
    return kind(MODULE, LAYOUT, Descent(momentum=0.3, weight_decay=0.01))


def begin(algorithm):
    state, start = algorithm.init(draw, FACTS, 0), draw(0)
    return state, Fleet(
        (algorithm.start(start),) * N, (start[LAYOUT.num_trainable :],) * N, "merge", LAYOUT.num_trainable
    )


def cohort_of(r):
    return torch.arange(N) if r < 4 else torch.tensor([0, 2, 3, 7])


def batches_of(cohort, r):
    return [draw_batches(DATA[i], TRAINING, lr=0.2, seed=0, round_number=r, client=i) for i in cohort.tolist()]


def play(algorithm, kind=Sequential) -> Iterator:
    """State and clients before the first round and after each of ROUNDS."""
    state, fleet = begin(algorithm)
    runner = engine(kind)
    yield state, fleet
    for r in range(1, ROUNDS + 1):
        cohort = cohort_of(r)
        counts = torch.tensor([SIZES[i] for i in cohort.tolist()])
        result = run_round(algorithm, state, fleet, cohort, batches_of(cohort, r), counts, runner)
        state, fleet = result.state, result.fleet
        yield state, fleet


@cache
def history(algorithm):
    """`play`, one client after another, once for all laws: none changes what it looks at."""
    return list(play(algorithm))


def played(algorithm, rounds=ROUNDS):
    return history(algorithm)[rounds]


def last(rounds):
    *_, end = rounds
    return end


@cache
def on_a_perceptron(algorithm, kind):
    return small().play(algorithm, 4, kind)


def same(a, b, **tolerance):
    left, right = state_tensors(a), state_tensors(b)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], equal_nan=True, **tolerance)


EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def replies(algorithm, state, fleet, cohort, r=1):
    down = algorithm.send(state, cohort)
    steps = batches_of(cohort, r)
    return engine().map(
        lambda task, received, private, batches: algorithm.train(received, private, batches, task),
        [(take(down, k), fleet.private[i], steps[k]) for k, i in enumerate(cohort.tolist())],
    )


def passes():
    return [one_pass(e, 4, 0.2) for e in DATA]


def same_models(ours, theirs, **tolerance):
    for left, right in zip(ours, theirs, strict=True):
        assert type(left) is type(right)
        for a, b in zip(tree_leaves(left), tree_leaves(right), strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_implements_the_protocol(algorithm):
    assert isinstance(algorithm, Algorithm)


def test_options_are_a_frozen_dataclass(algorithm):
    with pytest.raises(dataclasses.FrozenInstanceError):
        algorithm.anything = 1


@pytest.mark.no_cover  # other laws go through the same lines, one client after another
@pytest.mark.parametrize("kind", [Vectorised, Folded])
def test_many_at_once_equal_one_by_one(algorithm, kind):
    (state, fleet), (mapped, mapped_fleet) = played(algorithm), last(play(algorithm, kind))
    same(state, mapped, **CLOSE)
    ours = personal_models(algorithm, state, fleet, passes(), engine())
    theirs = personal_models(algorithm, mapped, mapped_fleet, passes(), engine(kind))
    same_models(ours, theirs, **CLOSE)


@pytest.mark.no_cover  # other laws go through the same lines, one client after another
@pytest.mark.parametrize("kind", [Vectorised, Folded])
def test_many_at_once_equal_one_by_one_on_a_perceptron(algorithm, kind):
    """Its gradient has a closed form of its own where many clients run at once."""
    if isinstance(algorithm, Keeping):
        algorithm = keeping(algorithm.method, small().layout, ("head",))
    (state, fleet), (mapped, mapped_fleet) = (on_a_perceptron(algorithm, one) for one in (Sequential, kind))
    same(state, mapped, **CLOSE)
    for ours, theirs in zip(tree_leaves(list(fleet.private)), tree_leaves(list(mapped_fleet.private)), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_same_inputs_give_the_same_bits(algorithm):
    for (one, _), (other, _) in zip(history(algorithm), play(algorithm), strict=True):
        same(one, other, **EXACT)


def test_order_of_replies_does_not_matter_to_the_last_bit(algorithm):
    state, fleet = played(algorithm, rounds=2)
    cohort, shuffled = torch.arange(N), torch.tensor([4, 1, 8, 0, 5, 2, 7, 3, 6])
    update = stack([reply for reply, _ in replies(algorithm, state, fleet, cohort, r=3)])
    counts = torch.tensor(SIZES)
    straight = deliver(algorithm, state, cohort, update, counts)
    mixed = deliver(algorithm, state, shuffled, tree_map(lambda leaf: leaf[shuffled], update), counts[shuffled])
    same(straight, mixed, **EXACT)


def test_zero_update_changes_no_model(algorithm):
    state, fleet = begin(algorithm)
    update = stack([reply for reply, _ in replies(algorithm, state, fleet, torch.arange(N))])
    update = update._replace(delta=tree_map(torch.zeros_like, update.delta))
    after = deliver(algorithm, state, torch.arange(N), update, torch.tensor(SIZES))
    before, now = algorithm.send(state, torch.arange(N)), algorithm.send(after, torch.arange(N))
    if isinstance(before, torch.Tensor):
        torch.testing.assert_close(before, now, **EXACT)
    assert (algorithm.mixing(state) is None) == (algorithm.mixing(after) is None)


def test_state_is_never_mutated(algorithm):
    state, fleet = played(algorithm, rounds=3)
    before = {name: tensor.clone() for name, tensor in state_tensors(state).items()}
    update = stack([reply for reply, _ in replies(algorithm, state, fleet, torch.arange(N), r=4)])
    deliver(algorithm, state, torch.arange(N), update, torch.tensor(SIZES))
    for name, tensor in state_tensors(state).items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True, **EXACT)


def test_state_survives_saving(algorithm, tmp_path):
    state, _ = played(algorithm)
    save_file({k: v.clone().contiguous() for k, v in state_tensors(state).items()}, tmp_path / "state.safetensors")
    same(with_tensors(algorithm.init(draw, FACTS, 0), load_file(tmp_path / "state.safetensors")), state, **EXACT)


def test_bytes_sent_are_the_bytes_declared(algorithm):
    state, fleet = played(algorithm, rounds=4)
    cost, cohort = algorithm.cost(state), torch.tensor([0, 5])
    assert tree_bytes(take(algorithm.send(state, cohort), 0)) == cost.bytes_down
    assert all(tree_bytes(reply) == cost.bytes_up for reply, _ in replies(algorithm, state, fleet, cohort))


def test_improves_on_a_toy_task(algorithm):
    def loss(state, fleet):
        tallies = score(personal_models(algorithm, state, fleet, passes(), engine()), passes(), engine())
        return float(sum(t.loss for t in tallies) / sum(t.count for t in tallies))

    assert loss(*played(algorithm)) < loss(*begin(algorithm)) - 0.02


def test_mixing_rows_are_probabilities(algorithm):
    state, _ = played(algorithm)
    weights = algorithm.mixing(state)
    if weights is not None:
        assert weights.shape[0] == N
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(N, dtype=torch.float64), **CLOSE)


def test_describes_itself_in_plain_values(algorithm):
    facts = algorithm.describe(played(algorithm)[0])
    assert "num_models" in facts
    assert all(isinstance(value, (int, float, bool, str)) for value in facts.values())
    method = algorithm.method if isinstance(algorithm, Keeping) else algorithm
    assert ALGORITHMS[ALGORITHMS.name_of(method)].citation
