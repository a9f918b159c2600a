"""Adapters averaged as factors or as products, whatever the method."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from fedmerge.algorithms import ALGORITHMS
from fedmerge.algorithms.cfl import Cfl
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.algorithms.oracle import Oracle
from fedmerge.core.adapters import averaging_error, pairs_of, product_means
from fedmerge.core.ensemble import members
from fedmerge.core.errors import UsageError
from fedmerge.core.keeping import keeping
from fedmerge.core.options import option_fields
from fedmerge.core.protocol import Algorithm, Federation, Update, deliver, server_models, state_tensors, with_tensors
from fedmerge.core.spaces import LIMIT, InSpace, in_space
from fedmerge.core.vector import layout_of
from fedmerge.runtime import Vectorised, personal_models
from fedmerge.training import one_pass
from small_federation import perceptron
from small_lora import adapted, small_lora

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
FEDERATION = small_lora()
LAYOUT = FEDERATION.layout
PAIRS = pairs_of(LAYOUT)
EVERYONE, COUNTS = torch.arange(6), FEDERATION.counts
WEIGHTS = COUNTS.double() / COUNTS.sum()
"""Of every client in a mean over all, by its number of examples."""
ORACLE = Oracle()
"""One model for each of the two groups: its merging weights are one-hot."""
BLENDED = FedMerge(num_models=2, initial="noise")
"""Two models that every client mixes."""


def spaced(method, space, layout=LAYOUT):
    return in_space(method, layout, space)


def made(name):
    options = {"num_models": 2} if "num_models" in option_fields(ALGORITHMS[name].cls) and name != "oracle" else {}
    return ALGORITHMS[name].cls(**options)


def replies(seed=0, size=0.5, count=6):
    """Updates long enough that averaging factors is not averaging products."""
    draw = torch.Generator().manual_seed(seed)
    return Update(size * torch.randn(count, LAYOUT.num_params, dtype=torch.float64, generator=draw))


def begin(method):
    return method.init(FEDERATION.draw, FEDERATION.facts(), 0)


def step(method, state, update, clients=EVERYONE):
    return deliver(method, state, clients, update, COUNTS[clients])


def products(pair, vectors):
    return pair.left(vectors) @ pair.right(vectors)


def truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------- factors


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_factors_are_the_method_itself(name):
    method = made(name)
    wrapped = spaced(method, "factors")
    assert isinstance(wrapped, Algorithm)
    bare, fleet = FEDERATION.play(method, 4)
    found, own = FEDERATION.play(wrapped, 4)
    same(state_tensors(found.method), state_tensors(bare))
    for left, right in zip(tree_leaves(own.private), tree_leaves(fleet.private), strict=True):
        assert torch.equal(left, right)
    steps, engine = [one_pass(examples, 4, 0.1) for examples in FEDERATION.data], FEDERATION.engine()
    used = (personal_models(*played, steps, engine) for played in ((wrapped, found, own), (method, bare, fleet)))
    for left, right in zip(*used, strict=True):
        assert all(torch.equal(*pair) for pair in zip(members(left), members(right), strict=True))
    assert wrapped.cost(found) == method.cost(bare)
    assert wrapped.trains_several == getattr(method, "trains_several", False)
    assert wrapped.describe(found).items() >= method.describe(bare).items()
    assert wrapped.describe(found)["space"] == "factors"
    assert int(found.product) == 0


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_merges_that_are_made_as_products_are_those_that_mixing_tells(name):
    """Else `product` would put other models in the place of what the method sends."""
    method = made(name)
    state, _ = FEDERATION.play(spaced(method, "factors"), 4)
    models, rows, down = server_models(state.method), method.mixing(state.method), method.send(state.method, EVERYONE)
    if (
        models is not None
        and rows is not None
        and isinstance(down, torch.Tensor)
        and down.shape[1:] == models.shape[1:]
    ):
        torch.testing.assert_close(rows.to(models.dtype) @ models, down, **CLOSE)


# ---------------------------------------------------------------------------------------- products


def test_one_model_becomes_the_truncated_mean_of_the_clients_products():
    method = spaced(FedAvg(), "product")
    state = begin(method)
    before, update = server_models(state.method)[0], replies()
    after = server_models(step(method, state, update).method)
    trained = before - update.delta
    for pair in PAIRS:
        wanted = torch.einsum("n,noi->oi", WEIGHTS, products(pair, trained))
        torch.testing.assert_close(products(pair, after)[0], truncated(wanted, pair.rank), **CLOSE)
    torch.testing.assert_close(after[0, 42:], WEIGHTS @ trained[:, 42:], **CLOSE)  # the output layer


def test_every_model_becomes_the_truncated_mean_of_those_that_use_it():
    """One model for each true group, clients 0-2 and 3-5."""
    method = spaced(ORACLE, "product")
    state = step(method, begin(method), replies(1))
    before, update = server_models(state.method), replies(2)
    after = server_models(step(method, state, update).method)
    for j, group in enumerate(([0, 1, 2], [3, 4, 5])):
        weights = COUNTS[group].double() / COUNTS[group].sum()
        for pair in PAIRS:
            wanted = torch.einsum("n,noi->oi", weights, products(pair, before[j] - update.delta[group]))
            torch.testing.assert_close(products(pair, after)[j], truncated(wanted, pair.rank), **CLOSE)


def test_a_model_that_nobody_of_the_round_uses_stays():
    method = spaced(ORACLE, "product")
    state = step(method, begin(method), replies(1))
    after = step(method, state, replies(2, count=2), torch.tensor([0, 1]))
    assert torch.equal(server_models(after.method)[1], server_models(state.method)[1])
    assert not torch.equal(server_models(after.method)[0], server_models(state.method)[0])


def test_a_cohort_of_one_moves_the_model_to_that_clients():
    method = spaced(FedAvg(), "product")
    state, update = begin(method), replies(3, count=1)
    after = server_models(step(method, state, update, torch.tensor([4])).method)
    torch.testing.assert_close(after, server_models(state.method) - update.delta, **CLOSE)
    assert float(step(method, state, update, torch.tensor([4])).averaging_error) < 1e-7


def test_merges_are_made_as_products():
    method = spaced(BLENDED, "product")
    state = step(method, begin(method), replies(1))
    models, rows, found = server_models(state.method), method.mixing(state), method.send(state, EVERYONE)
    assert rows.min() > 0  # otherwise this test says nothing
    for pair in PAIRS:
        wanted = torch.einsum("cd,doi->coi", rows, products(pair, models))
        wanted = torch.stack([truncated(each, pair.rank) for each in wanted])
        torch.testing.assert_close(products(pair, found), wanted, **CLOSE)
    torch.testing.assert_close(found[:, 42:], (rows @ models)[:, 42:], **CLOSE)
    torch.testing.assert_close(found[[2, 0]], method.send(state, torch.tensor([2, 0])), **CLOSE)


def test_what_averaging_missed_is_added_to_the_models_and_not_to_the_momentum():
    plain, found = (spaced(FedAvg(server_momentum=0.5), space) for space in ("factors", "product"))
    update = replies()
    one, other = step(plain, begin(plain), update).method, step(found, begin(found), update).method
    assert torch.equal(one.velocity, other.velocity)
    before = server_models(begin(plain).method)
    mean = WEIGHTS[None] @ (before - update.delta)
    missed = product_means(PAIRS, before - update.delta, WEIGHTS[None], mean) - mean
    torch.testing.assert_close(other.models, one.models + missed, **CLOSE)


def test_one_split_gives_each_new_model_what_its_own_missed():
    """CFL with two clusters of which the second falls in two: the new third model comes from the second."""
    apart = torch.zeros(6, LAYOUT.num_params, dtype=torch.float64)
    apart[:, 42] = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    deeper = torch.zeros(6, LAYOUT.num_params, dtype=torch.float64)
    deeper[:, 43] = torch.tensor([0.01, 0.01, 1.0, 1.0, -1.0, -1.0])
    noise = replies(5, size=0.1).delta
    noise[:2] = 0
    noise[:, 42:] = 0
    method, plain = (spaced(Cfl(warmup=0, min_size=1, stationary=1.0, activity=0.0), s) for s in ("product", "factors"))
    state = step(method, begin(method), Update(apart))
    assert state.method.assigned.tolist() in ([0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0])
    second = int(state.method.assigned[2])
    before, update = server_models(state.method)[second], Update(deeper + noise)
    after, bare = step(method, state, update).method, step(plain, state, update).method
    models, own = server_models(after), [2, 3, 4, 5]
    assert len(models) == 3
    weights, trained = COUNTS[own].double()[None] / COUNTS[own].sum(), before - update.delta[own]
    missed = product_means(PAIRS, trained, weights, weights @ trained) - weights @ trained
    assert float(missed.abs().max()) > 1e-3  # otherwise this test says nothing
    for j in set(after.assigned[own].tolist()):
        torch.testing.assert_close(models[j] - server_models(bare)[j], missed[0], **CLOSE)
    untouched = int(after.assigned[0])
    torch.testing.assert_close(models[untouched], server_models(bare)[untouched], rtol=0, atol=1e-12)


def test_the_order_of_replies_does_not_matter():
    for method in (spaced(FedAvg(), "product"), spaced(BLENDED, "product")):
        state, update, order = begin(method), replies(4), torch.tensor([3, 0, 5, 1, 4, 2])
        shuffled = Update(update.delta[order])
        same(
            state_tensors(step(method, state, update)),
            state_tensors(deliver(method, state, order, shuffled, COUNTS[order])),
        )


@pytest.mark.parametrize("method", [FedAvg(), FedMerge(num_models=2), ORACLE], ids=lambda m: type(m).__name__)
def test_engines_agree(method):
    wrapped = spaced(method, "product")
    one, other = (FEDERATION.play(wrapped, 4, kind)[0] for kind in (type(FEDERATION.engine()), Vectorised))
    left, right = state_tensors(one), state_tensors(other)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-8, atol=1e-8, equal_nan=True)


# ---------------------------------------------------------------------------------------- auto


def error_of(update):
    before = server_models(begin(spaced(FedAvg(), "factors")).method)
    return float(averaging_error(PAIRS, before - update.delta, WEIGHTS[None]))


@pytest.mark.parametrize("size", [0.01, 0.5])
def test_auto_averages_products_where_factors_are_off_by_more_than_the_limit(size):
    """Small steps beside a drawn A are nearly additive; long ones are not."""
    update = replies(6, size)
    for pair in PAIRS:
        update.delta[:, slice(*pair.b)] -= 0.3  # all move B by 0.3 on average, so that the mean product is not noise
    error = error_of(update)
    assert (error > LIMIT) == (size == 0.5)
    auto, wanted = spaced(FedAvg(), "auto"), spaced(FedAvg(), "product" if error > LIMIT else "factors")
    after = step(auto, begin(auto), update)
    assert torch.equal(server_models(after.method), server_models(step(wanted, begin(wanted), update).method))
    facts = auto.describe(after)
    assert facts["averaging_error"] == pytest.approx(error, rel=1e-9)
    assert (facts["space"], facts["merging_error"]) == ("product" if error > LIMIT else "factors", 0.0)


def test_what_a_client_is_sent_does_not_depend_on_who_else_is_asked():
    """Clients 0 to 2 mix two models that are far apart, 3 to 5 have one of them alone; the limit is for all of them."""
    method, state = spaced(BLENDED, "auto"), models_apart(8.0)
    logits = state.method.soup.logits.clone()
    logits[:, 3:, 0] = 40.0
    state = replace(state, method=replace(state.method, soup=replace(state.method.soup, logits=logits)))
    errors = averaging_error(PAIRS, server_models(state.method), method.mixing(state))
    assert float(errors[:3].min()) > LIMIT > float(errors.mean())
    for clients in ([0, 1, 2], [3, 4, 5]):
        asked = torch.tensor(clients)
        torch.testing.assert_close(method.send(state, asked), method.send(state, EVERYONE)[asked], **CLOSE)


def models_apart(distance):
    """A state of two models whose adapters lie this far from each other, every client half in each."""
    method = spaced(BLENDED, "auto")
    state = begin(method)
    first = FEDERATION.draw(0)
    away = replies(7, distance).delta[0]
    for pair in PAIRS:
        first[slice(*pair.b)] = 1.0
    models = torch.stack([first, first + away])
    soup = replace(state.method.soup, models=models, logits=torch.zeros_like(state.method.soup.logits))
    return replace(state, method=replace(state.method, soup=soup))


@pytest.mark.parametrize("distance", [0.05, 8.0])
def test_auto_merges_as_products_where_factors_are_off_by_more_than_the_limit(distance):
    state = models_apart(distance)
    models, half = server_models(state.method), torch.full((6, 2), 0.5, dtype=torch.float64)
    error = float(averaging_error(PAIRS, models, half).mean())
    assert (error > LIMIT) == (distance == 8.0)
    wanted = spaced(BLENDED, "product" if error > LIMIT else "factors")
    assert torch.equal(spaced(BLENDED, "auto").send(state, EVERYONE), wanted.send(state, EVERYONE))
    after = step(spaced(BLENDED, "auto"), state, replies(8, 0.01))
    assert float(after.merging_error) == pytest.approx(error, rel=1e-9)


def test_the_error_of_a_round_is_the_mean_over_models_by_their_use():
    method = spaced(ORACLE, "factors")
    state = step(method, begin(method), replies(1))
    before, update = server_models(state.method), replies(2)
    errors = []
    for j, group in enumerate(([0, 1, 2], [3, 4, 5])):
        weights = COUNTS[group].double()[None] / COUNTS[group].sum()
        errors.append(float(averaging_error(PAIRS, before[j] - update.delta[group], weights)))
    n = COUNTS.double()
    used = [float((n[:3] ** 2).sum() / n[:3].sum()), float((n[3:] ** 2).sum() / n[3:].sum())]  # Σ share · examples
    wanted = (errors[0] * used[0] + errors[1] * used[1]) / sum(used)
    assert float(step(method, state, update).averaging_error) == pytest.approx(wanted, rel=1e-9)


def test_nothing_is_measured_before_the_first_round():
    method = spaced(FedAvg(), "auto")
    state = begin(method)
    assert torch.isnan(state.averaging_error)
    assert torch.isnan(state.merging_error)
    assert method.describe(state)["space"] == "factors"


@pytest.mark.parametrize("rows", ["layer", "body-head"])
def test_rows_of_their_own_for_layers_are_merged_as_the_method_does(rows):
    method = FedMerge(num_models=2, initial="noise", rows=rows)
    bare, wrapped = begin(method), begin(spaced(method, "auto"))
    update = replies(9)
    for _ in range(2):
        bare, wrapped = step(method, bare, update), step(spaced(method, "auto"), wrapped, update)
    same(state_tensors(wrapped.method), state_tensors(bare))
    assert torch.equal(spaced(method, "auto").send(wrapped, EVERYONE), method.send(bare, EVERYONE))
    assert torch.isnan(wrapped.averaging_error)


# ---------------------------------------------------------------------------------------- states, kept parts, refusals


@pytest.mark.parametrize("method", [FedAvg(), FedMerge(num_models=2), Cfl()], ids=lambda m: type(m).__name__)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(method, tmp_path):
    wrapped = spaced(method, "product")
    state, _ = FEDERATION.play(wrapped, 2)
    save_file({name: tensor.contiguous() for name, tensor in state_tensors(state).items()}, tmp_path / "state")
    loaded = with_tensors(state, load_file(tmp_path / "state"))
    same(state_tensors(loaded), state_tensors(state))
    same(state_tensors(step(wrapped, loaded, replies())), state_tensors(step(wrapped, state, replies())))


def test_with_a_kept_output_layer_the_travelling_adapters_are_averaged_as_products():
    """42 of 57 numbers travel, the factors of both layers; the bare method is that of the network without a head."""
    parts = LAYOUT.without(LAYOUT.below(["head"]))
    method = keeping(spaced(FedAvg(), "product", parts), LAYOUT, ("head",))
    state, update = begin(method), Update(replies().delta[:, :42])
    before = server_models(state.method)
    after = server_models(step(method, state, update).method)
    assert after.shape == (1, 42)
    for pair in PAIRS:
        wanted = torch.einsum("n,noi->oi", WEIGHTS, products(pair, before - update.delta))
        torch.testing.assert_close(products(pair, after)[0], truncated(wanted, pair.rank), **CLOSE)
    _, fleet = FEDERATION.play(method, 2)
    assert all(private.own.shape == (15,) for private in fleet.private)


def test_a_vector_without_factors_leaves_the_method_as_it_is():
    method = FedAvg()
    assert in_space(method, layout_of(perceptron()), "auto") is method
    frozen = adapted()
    frozen[0].lora_A.requires_grad_(False)
    frozen[2].lora_A.requires_grad_(False)
    assert in_space(method, layout_of(frozen), "auto") is method


@pytest.mark.parametrize("space", ["factors", "product"])
def test_a_space_for_a_vector_without_factors_is_refused(space):
    with pytest.raises(UsageError, match=f"merging: got '{space}', but what travels has no LoRA factors A and B"):
        in_space(FedAvg(), layout_of(perceptron()), space)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_products_are_averaged_by_every_method_or_refused(name):
    method = spaced(made(name), "product")
    try:
        state, _ = FEDERATION.play(method, 1)
    except UsageError as error:
        assert f"merging: got 'product' for {type(method.algorithm).__name__}, " in str(error)  # noqa: PT017
        assert name not in ("fedavg", "fedmerge", "oracle", "cfl", "one-shot", "fesem")
    else:
        assert method.describe(state)["space"] == "product"


@pytest.mark.parametrize("rows", ["layer", "body-head"])
def test_products_are_refused_for_rows_of_their_own_for_layers(rows):
    with pytest.raises(UsageError, match="rows of merging weights that differ between layers; take rows='model'"):
        begin(spaced(FedMerge(num_models=2, rows=rows), "product"))


def test_a_method_that_sends_a_part_only_is_refused():
    with pytest.raises(UsageError, match="merging: got 'product' for FedPer, whose server keeps no whole models"):
        begin(spaced(made("fedper"), "product"))


def test_a_run_without_adapters_says_so():
    assert Federation(1, 1, (0, 1), ((0, 1),)).adapters is False
    assert isinstance(spaced(FedAvg(), "auto"), InSpace)
