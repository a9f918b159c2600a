"""Pretrained models with adapters, on checkpoints of a few thousand parameters made here."""

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
import tiny_models
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.api import run_config
from fedmerge.core.adapters import pairs_of
from fedmerge.core.errors import DataError, UsageError
from fedmerge.core.randomness import fresh_module_randomness
from fedmerge.core.spaces import in_space
from fedmerge.core.vector import layout_of
from fedmerge.data import from_texts
from fedmerge.data.encoding import NO_TARGET
from fedmerge.experiment.config import build_config, override
from fedmerge.models.hf import Hf
from fedmerge.training import Descent, ModuleTask

TRAINING = {"optimizer": "adamw", "lr": 0.02, "batch_size": 8, "epochs": 1}
GOOD = ("the food was good", "a good game", "the room was clean", "our team won the match", "great good food")
BAD = ("a bad day", "a terrible film", "a weak plot and bad food", "cold wind and rain", "the film was terrible")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_models.tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return tiny_models.tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny_models.tiny_vit(tmp_path_factory.mktemp("models") / "vit")


def built(recipe, num_classes=2, draw=0):
    shape = (3, 16, 16) if recipe.task == "images" else (recipe.max_length,)
    with fresh_module_randomness(0, "test weights", draw):
        return recipe.build(shape, num_classes)


def tokens(recipe, *texts):
    return torch.from_numpy(recipe.encoder().encode(texts, None, ()).inputs)


def trained_somewhat(module):
    """The module with every trained number moved, so that B is not 0."""
    layout = layout_of(module)
    vector = layout.read(module)
    layout.write(vector + 0.1 * torch.from_numpy(np.random.default_rng(1).normal(size=len(vector))).float(), module)
    return module.eval()


def sites(copies=2):
    """Clients of two kinds of texts that say opposite things about them."""
    texts = [*GOOD, *BAD] * 2
    texts = [f"{text} {word}" for text, word in zip(texts, ("this year", "in the market") * 10, strict=True)]
    labels = ["good"] * 5 + ["bad"] * 5
    return {f"site-{i}": (texts, labels * 2) for i in range(copies)}


# ---------------------------------------------------------------- what travels, what is shared


def test_only_the_adapter_and_the_output_layer_travel(bert):
    """Query and value of three blocks of width 32 at rank 4, and a linear layer from 32 to 2."""
    layout = layout_of(built(Hf(bert, rank=4)))
    assert layout.num_params == 3 * 2 * (4 * 32 + 32 * 4) + (32 * 2 + 2)
    assert layout.has_adapters
    assert layout.head_module == "head"
    assert layout.dtype == torch.float32


def test_the_last_blocks_alone_can_be_adapted(bert):
    names = {slot.name for slot in layout_of(built(Hf(bert, rank=4, layers=1))).slots if "lora" in slot.name}
    assert len(names) == 2 * 2
    assert all(".layer.2." in name for name in names)


def test_the_base_is_there_once_for_all_networks_and_tasks(bert):
    one, other = built(Hf(bert)), built(Hf(bert), draw=1)
    task = ModuleTask(one, layout_of(one), Descent())
    places = [
        {p.data_ptr() for p in module.parameters() if not p.requires_grad} for module in (one, other, task._module)
    ]
    assert places[0] == places[1] == places[2]
    assert len(places[0]) > 10


def test_a_fresh_adapter_changes_nothing_and_a_draw_decides_it(bert):
    layout = layout_of(built(Hf(bert)))
    vectors = [layout.read(built(Hf(bert), draw=draw)) for draw in (0, 0, 1)]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    for slot in layout.slots:
        if "lora_B" in slot.name:
            assert not vectors[0][slot.start : slot.stop].any()


def test_a_frozen_a_halves_what_travels_and_leaves_nothing_to_correct(bert):
    both, half = (layout_of(built(Hf(bert, rank=4, train_a=train_a))) for train_a in (True, False))
    head = 32 * 2 + 2
    assert half.num_params - head == (both.num_params - head) / 2
    assert len(pairs_of(both)) == 6
    assert pairs_of(half) == ()
    algorithm = FedAvg()
    assert in_space(algorithm, half, "auto") is algorithm
    with pytest.raises(UsageError, match="no LoRA factors A and B to merge"):
        in_space(algorithm, half, "product")


@pytest.mark.parametrize("train_a", [False, True])
def test_the_merged_adapter_is_the_model_that_merges_the_products_where_it_should(bert, train_a):
    """With a frozen A, always; with factors for one-hot rows. Outputs are compared, not numbers in a vector."""
    recipe = Hf(bert, rank=4, train_a=train_a)
    module = built(recipe)
    layout = layout_of(module)
    rng = np.random.default_rng(0)
    start = layout.read(module)
    models = torch.stack([start + torch.from_numpy(rng.normal(size=len(start))).float() for _ in range(2)])
    row = torch.tensor([0.3, 0.7]) if not train_a else torch.tensor([0.0, 1.0])
    layout.write(row @ models, module)
    merged = module.eval()(tokens(recipe, "the food was good")).detach()

    weights = []
    for vector in models:
        layout.write(vector, module)
        weights.append({name: layer.get_delta_weight("default") for name, layer in _lora_layers(module)})
    plain = built(recipe)
    for name, layer in _lora_layers(plain):
        delta = sum(a * own[name] for a, own in zip(row, weights, strict=True))
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight + delta, requires_grad=False)
    heads = [layout.views(vector)["head.weight"] for vector in models], [layout.views(v)["head.bias"] for v in models]
    plain.head.weight.data, plain.head.bias.data = (
        sum(a * part for a, part in zip(row, h, strict=True)) for h in heads
    )
    torch.testing.assert_close(merged, plain.eval()(tokens(recipe, "the food was good")).detach(), rtol=1e-4, atol=1e-5)


def _lora_layers(module):
    return [(name, part) for name, part in module.named_modules() if hasattr(part, "lora_A") and len(part.lora_A)]


# ---------------------------------------------------------------- forward


def test_a_text_gets_the_same_outputs_alone_and_beside_a_longer_one(bert):
    recipe = Hf(bert)
    module = trained_somewhat(built(recipe))
    both = tokens(recipe, "a bad day", "the bank lowers its rate again this year")
    torch.testing.assert_close(module(both)[:1], module(both[:1]), rtol=1e-4, atol=1e-5)


def test_a_text_is_classified_by_the_mean_of_its_last_hidden_states(bert):
    recipe = Hf(bert)
    module = trained_somewhat(built(recipe))
    inputs = tokens(recipe, "a bad day", "the food was good and the room was clean")
    mask = inputs >= 0
    hidden = module.body(input_ids=inputs.clamp_min(0), attention_mask=mask.long()).last_hidden_state
    means = torch.stack([states[own].mean(dim=0) for states, own in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(module(inputs), module.head(means), rtol=1e-4, atol=1e-5)


def test_what_frozen_blocks_give_is_remembered_and_makes_no_difference(bert):
    recipe = Hf(bert, layers=1)
    module = trained_somewhat(built(recipe))
    inputs = tokens(recipe, *GOOD, *BAD)
    computed = module(inputs)
    module.remember(inputs)
    assert module.memory.num_bytes == 4 * 32 * int((inputs >= 0).sum())
    torch.testing.assert_close(module(inputs), computed, rtol=1e-4, atol=1e-5)
    module.memory.outputs = {key: torch.zeros_like(value) for key, value in module.memory.outputs.items()}
    assert not torch.allclose(module(inputs), computed)  # it is what is used
    module.remember(inputs[:2])
    assert len(module.memory.outputs) == 2  # the rest is forgotten


def test_what_is_remembered_does_not_depend_on_what_was_before(bert):
    """In bfloat16, where another batch would round in another way."""
    recipe = Hf(bert, layers=1, dtype="bfloat16")
    inputs, module = tokens(recipe, *GOOD, *BAD), built(recipe)
    module.remember(inputs)
    fresh = dict(module.memory.outputs)
    module.remember(tokens(recipe, *GOOD[:2], "the bank lowers its rate again this year"))
    module.remember(inputs)
    assert module.memory.outputs.keys() == fresh.keys()
    assert all(torch.equal(module.memory.outputs[key], value) for key, value in fresh.items())


def test_a_batch_with_an_unknown_text_is_computed(bert):
    recipe = Hf(bert, layers=1)
    module = trained_somewhat(built(recipe))
    inputs = tokens(recipe, *GOOD)
    module.memory.outputs.clear()
    computed = module(inputs)
    module.remember(inputs[:3])
    torch.testing.assert_close(module(inputs), computed, rtol=1e-4, atol=1e-5)


def test_a_base_in_bfloat16_has_an_adapter_in_float32(bert):
    wide, narrow = (trained_somewhat(built(Hf(bert, dtype=dtype))) for dtype in ("float32", "bfloat16"))
    assert {p.dtype for p in narrow.parameters() if p.requires_grad} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in narrow.parameters() if not p.requires_grad}
    inputs = tokens(Hf(bert), *GOOD)
    assert narrow(inputs).dtype == torch.float32
    torch.testing.assert_close(narrow(inputs), wide(inputs), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("maker", ["gpt2", "llama"])
def test_a_decoder_classifies_with_its_own_output_layer(maker, request):
    recipe = Hf(request.getfixturevalue(maker), max_length=40)
    module = trained_somewhat(built(recipe, num_classes=3))
    both = tokens(recipe, "a bad day", "the bank lowers its rate again this year")
    assert module.head is None
    assert module(both).shape == (2, 3)
    torch.testing.assert_close(module(both)[:1], module(both[:1]), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- texts to tokens


def test_tokens_of_a_text_are_those_of_its_tokenizer(bert):
    recipe = Hf(bert, max_length=12)
    row = tokens(recipe, "the food was good")[0].tolist()
    assert len(row) == 12
    assert recipe.encoder().decode(row) == "the food was good"
    assert row[-1] == -1
    assert -1 not in row[: row.index(-1)]


def test_a_word_s_tag_is_the_target_of_its_first_piece(bert):
    recipe = Hf(bert, task="tag", max_length=16)
    made = recipe.encoder().encode(["the zzgood food"], ["O B O"], ("B", "O"))
    real = [t for t in made.targets[0].tolist() if t != NO_TARGET]
    assert real == [1, 0, 1]
    assert int((made.inputs[0] >= 0).sum()) > 3 + 2 - 1  # pieces of the made-up word, [CLS] and [SEP]


def test_only_the_completion_counts_and_each_token_gives_the_next(gpt2):
    recipe = Hf(gpt2, task="complete", max_length=30, separator=" ")
    encoder = recipe.encoder()
    made = encoder.encode(["a good"], ["game"], ())
    inputs, targets = made.inputs[0], made.targets[0]
    prompt, start = encoder.prompt("a good"), int(np.flatnonzero(targets != NO_TARGET)[0])
    assert start == len(prompt) - 1
    assert inputs[: len(prompt)].tolist() == prompt
    counted = targets[targets != NO_TARGET].tolist()
    assert counted[-1] == encoder.end
    assert inputs[start + 1 : start + len(counted)].tolist() == counted[:-1]
    assert encoder.decode(counted) == "game"


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_is_refused_by_its_row(gpt2):
    recipe = Hf(gpt2, task="complete", max_length=12)
    encoder = recipe.encoder()
    made = encoder.encode(["the bank lowers its rate again this year " * 3], ["good"], ())
    assert (made.inputs[0] >= 0).all()
    with pytest.raises(
        DataError, match=r"client 'a', train, row 1 from 0: the completion has \d+ tokens; expected 1 to 11"
    ):
        from_texts({"a": (["a", "b"], ["good", "the bank lowers its rate " * 5])}, encoder)


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [("a good day", "O B", "3 words and 2 tags"), ("a", "O O", "1 words and 2 tags")],
)
def test_tags_that_do_not_fit_are_refused_by_their_row(bert, words, tags, message):
    with pytest.raises(DataError, match=rf"client 'a', train, row 1 from 0: {message}"):
        from_texts({"a": (["the food", words], ["O B", tags])}, Hf(bert, task="tag").encoder())


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("options", [{}, {"adapter": "dora"}, {"adapter": "ia3"}, {"train_a": False}, {"layers": 1}])
def test_clients_learn_their_texts(bert, options):
    recipe = Hf(bert, **options)
    data = from_texts(sites(), recipe.encoder(), validation=0.0)  # the last round counts
    run = fedmerge.run(data, model=recipe, method="fedavg", training=TRAINING, rounds=8, evaluate_every=8)
    inputs, targets = data.clients[0].train
    before, after = run.outcome.setup.module.eval(), run.client_model("site-0")
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(module(inputs), targets)) for module in (before, after)]
    assert losses[1] < 0.8 * losses[0]
    assert run.record.rounds[1].bytes_down == 2 * 4 * run.record.num_params


def test_the_same_seed_gives_the_same_bits(bert):
    recipe = Hf(bert, layers=1)
    data = from_texts(sites(), recipe.encoder())
    scores = [
        fedmerge.run(data, model=recipe, method="fedmerge", keep=["head"], training=TRAINING, rounds=3).record
        for _ in range(2)
    ]
    assert scores[0].last().test == scores[1].last().test


def test_words_can_be_tagged(bert):
    recipe = Hf(bert, task="tag", max_length=24)
    texts = list(sites(1)["site-0"][0])
    tags = [" ".join("B" if word in ("good", "bad", "terrible") else "O" for word in text.split()) for text in texts]
    data = from_texts({"a": (texts, tags), "b": (texts, tags)}, recipe.encoder())
    assert data.class_names == ("B", "O")
    run = fedmerge.run(data, model=recipe, method="fedmerge", training=TRAINING, rounds=8, evaluate_every=8)
    first, last = run.record.evaluated()[0], run.record.evaluated()[-1]
    assert last.test.loss[0] < first.test.loss[0]
    trained = data.clients[0].train.targets
    assert run.record.class_counts[0] == (int((trained == 0).sum()), int((trained == 1).sum()))


@pytest.mark.parametrize("maker", ["gpt2", "llama"])
def test_texts_can_be_completed_and_samples_are_written(maker, request):
    recipe = Hf(request.getfixturevalue(maker), task="complete", max_length=40, separator=" ")
    prompts, rest = zip(*((t.rsplit(" ", 1)[0], t.rsplit(" ", 1)[1]) for t in sites(1)["site-0"][0]), strict=True)
    clients = {"a": (list(prompts), list(rest)), "b": (list(prompts), list(rest))}
    data = from_texts(clients, recipe.encoder())
    run = fedmerge.run(data, model=recipe, method="fedavg", training=TRAINING, rounds=8, evaluate_every=8)
    first, last = run.record.evaluated()[0], run.record.evaluated()[-1]
    assert last.test.loss[0] < first.test.loss[0]
    assert run.record.samples
    assert set(run.record.samples[0]) == {"client", "task", "prompt", "completion", "wanted"}
    assert run.record.samples[0]["wanted"] in rest


def test_images_can_be_classified(vit):
    run = fedmerge.run(
        "digits",
        model=Hf(vit, task="images"),
        method="fedavg",
        partition={"name": "iid", "clients": 2, "train": 60, "validation": 10, "test": 20},
        training={"optimizer": "adamw", "lr": 0.02, "batch_size": 20, "epochs": 2},
        rounds=4,
        evaluate_every=4,
    )
    first, last = run.record.evaluated()[0], run.record.evaluated()[-1]
    assert last.validation.loss[0] < first.validation.loss[0]


def test_the_error_of_averaging_factors_is_told_every_round(bert):
    recipe = Hf(bert)
    data = from_texts(sites(3), recipe.encoder())
    run = fedmerge.run(data, model=recipe, method="fedmerge", keep=["head"], training=TRAINING, rounds=3)
    told = [record.state for record in run.record.rounds[1:]]
    assert all(state["averaging_error"] >= 0 for state in told)
    assert {state["space"] for state in told} <= {"factors", "product"}
    always = fedmerge.run(data, model=recipe, method="fedavg", merging="product", training=TRAINING, rounds=2)
    assert [record.state["space"] for record in always.record.rounds[1:]] == ["product"] * 2


# ---------------------------------------------------------------- what is refused


def test_a_short_name_stands_for_a_pretrained_model():
    table = override({}, ["model=hf:some/where", "model.rank=4", "source=text-tasks"])
    assert build_config(table).model == Hf("some/where", rank=4)


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        ("mlp", None, "holds texts, which this network cannot read; use a language model"),
        ({"name": "hf", "path": "no/such/folder"}, None, "'no/such/folder' has no tokenizer that can be loaded"),
        ({"name": "hf", "path": "BERT", "layers": 9}, None, r"model.layers: got 9; .* has a stack of 3 blocks"),
        ({"name": "hf", "path": "BERT", "targets": ["nothing"]}, None, "lora does not fit"),
        ({"name": "hf", "path": "BERT"}, "digits", "reads texts; got inputs"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(bert, model, source, message, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{t},{i % 2}\n" for i, t in enumerate([*GOOD, *BAD] * 2)))
    table = {
        "rounds": 1,
        "model": model if isinstance(model, str) else {**model, "path": model["path"].replace("BERT", bert)},
    }
    table["source"] = source or {"name": "folder", "path": str(tmp_path), "text_column": "text"}
    with pytest.raises((UsageError, DataError), match=message):
        run_config(table)


@pytest.mark.parametrize(
    "options",
    [{"task": "tag", "pooling": "mean"}, {"adapter": "ia3", "alpha": 4.0}, {"adapter": "ia3", "train_a": False}],
)
def test_options_that_would_have_no_effect_are_refused(options):
    with pytest.raises(UsageError, match="got"):
        Hf("somewhere", **options)


def test_a_model_that_completes_texts_has_no_output_layer_to_keep(gpt2):
    recipe = Hf(gpt2, task="complete", max_length=24)
    data = from_texts({name: (list(GOOD), list(BAD)) for name in "ab"}, recipe.encoder())
    with pytest.raises(UsageError, match="no output layer that is trained"):
        fedmerge.run(data, model=recipe, method="fedavg", keep=["head"], rounds=1)


def test_completions_are_counted_by_example_and_not_by_token(gpt2):
    recipe = Hf(gpt2, task="complete", max_length=24)
    texts = [f"the food {word}" for word in ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j")]
    data = from_texts({"a": (texts, ["good"] * 10), "b": (texts, ["bad"] * 10)}, recipe.encoder())
    assert data.class_counts() == tuple((client.num_train,) for client in data.clients)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16", "pooling": "model"}, {"dtype": "bfloat16", "task": "tag"}])
def test_an_output_layer_in_float32_stands_on_a_narrower_base(bert, options):
    module = built(Hf(bert, **options))
    outputs = module(tokens(Hf(bert), "the food was good"))
    assert outputs.dtype == torch.float32
    outputs.sum().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if p.requires_grad and "lora_A" not in n)


def test_everything_can_be_in_float64(bert):
    recipe = Hf(bert, layers=1)
    data = from_texts(sites(), recipe.encoder())
    run = fedmerge.run(data, model=recipe, method="fedavg", training=TRAINING, rounds=1, precision="float64")
    assert run.outcome.setup.layout.dtype == torch.float64
