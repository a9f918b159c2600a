"""The recipe for mergekit, followed by hand: Σ_j w_j (W + s B_j A_j) with normalised weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from federations import CLIENT, TRAINING, UNSEEN, Federations, classified, inside, snippet_of, with_plain_peft
from safetensors.torch import load_file
from torch import Tensor

import fedmerge
from fedmerge.core.adapters import averaging_error, pairs_of
from fedmerge.core.protocol import server_models
from fedmerge.models.hf import Hf

LOADERS = {
    "BertModel": "AutoModel",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
}
"""What mergekit loads an architecture with (`get_auto_cls` in its common.py)."""


def followed(folder: Path) -> Any:
    """What ``mergekit-yaml recipe.yaml merged`` makes, by its documentation, as a model.

    Each ``BASE+ADAPTER`` is loaded by PEFT into the class that the base's configuration names and folded in; then
    ``linear`` takes the weighted mean with weights divided by their sum.
    """
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["merge_method"] == "linear"
    assert recipe["dtype"] == "float32"
    total, weights, model = dict[str, Tensor](), [entry["parameters"]["weight"] for entry in recipe["models"]], None
    with inside(folder):
        for entry, weight in zip(recipe["models"], weights, strict=True):
            base, _, adapter = entry["model"].partition("+")
            (architecture,) = transformers.AutoConfig.from_pretrained(base).architectures
            model = getattr(transformers, LOADERS[architecture]).from_pretrained(base, dtype=torch.float32)
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model = with_plain_peft(model, folder / adapter).merge_and_unload()
            assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
            for name, tensor in model.state_dict().items():
                total[name] = total.get(name, torch.zeros(())) + weight / sum(weights) * tensor
    assert model is not None
    model.load_state_dict(total)
    return model


def deltas(model: Any, base: Any) -> Tensor:
    """All changes of weights as one vector; names but for the base's own prefix are the same."""
    own = {name.removeprefix("bert."): tensor for name, tensor in model.state_dict().items()}
    other = {name.removeprefix("bert."): tensor for name, tensor in base.state_dict().items()}
    shared = sorted(name for name in set(own) & set(other) if "pooler" not in name)
    return torch.cat([(own[name] - other[name]).flatten().double() for name in shared])


def both(federations: Federations, name: str, place: Path, loader: str) -> tuple[fedmerge.Exported, Tensor, Tensor]:
    """Changes of the base's weights that the recipe makes, and those of the client's merged model."""
    base = federations.recipe(name).path
    recipe = fedmerge.export(federations.folder(name), CLIENT, place / "recipe", kind="mergekit")
    merged = fedmerge.export(federations.folder(name), CLIENT, place / "merged", kind="merged")
    with inside(place):
        plain = getattr(transformers, loader).from_pretrained(base)
        client = getattr(transformers, loader).from_pretrained(merged.folder)
    return recipe, deltas(followed(recipe.folder), plain), deltas(client, plain)


@pytest.mark.parametrize(
    ("name", "loader"), [("mean", "AutoModel"), ("own head", "AutoModel"), ("completions", "AutoModelForCausalLM")]
)
def test_the_reported_difference_is_that_of_the_weights(
    federations: Federations, tmp_path: Path, name: str, loader: str
) -> None:
    """‖client − recipe‖ / ‖recipe‖ on full weights is what the factors say; here factors were averaged apart."""
    found, recipe, client = both(federations, name, tmp_path, loader)
    assert found.difference is not None
    assert found.difference > 1e-3
    measured = float((client - recipe).norm() / recipe.norm())
    assert measured == pytest.approx(found.difference, rel=1e-3)
    run = federations.run(name)
    layout, models, rows = run.outcome.setup.layout, server_models(run.outcome.selected.state.method), run.mixing()
    assert models is not None
    assert rows is not None
    if name == "completions":  # nothing is kept: the server's models are whole vectors
        error = averaging_error(pairs_of(layout), models, rows[CLIENT : CLIENT + 1])
        assert found.difference == pytest.approx(float(error), rel=1e-3)
    card = " ".join((found.folder / "README.md").read_text().split())
    assert f"is {100 * found.difference:.2g} % away from the weighted mean of the server's products" in card


@pytest.mark.parametrize("name", ["frozen A", "ia3"])
def test_where_merging_is_exact_the_recipe_gives_the_clients_weights(
    federations: Federations, tmp_path: Path, name: str
) -> None:
    found, recipe, client = both(federations, name, tmp_path, "AutoModel")
    assert found.difference is not None
    assert found.difference < 1e-6
    torch.testing.assert_close(recipe, client, rtol=0.0, atol=1e-6)
    assert float(client.norm()) > 0.1
    assert "the client's model, up to rounding" in (found.folder / "README.md").read_text()
    weights = [
        entry["parameters"]["weight"] for entry in yaml.safe_load((found.folder / "recipe.yaml").read_text())["models"]
    ]
    assert len(weights) == 2
    assert min(weights) > 0.01


def test_a_row_with_a_single_one_gives_the_clients_weights(federations: Federations, tmp_path: Path) -> None:
    """FeSEM: every client uses one of the server's models as it is."""
    recipe = federations.recipe("mean")
    method = {"name": "fesem", "num_models": 2}
    run = fedmerge.run(classified(recipe), model=recipe, method=method, training=TRAINING, rounds=2, keep=["head"])
    found = fedmerge.export(run, CLIENT, tmp_path / "recipe", kind="mergekit")
    entries = yaml.safe_load((found.folder / "recipe.yaml").read_text())["models"]
    assert sorted(entry["parameters"]["weight"] for entry in entries) == [0.0, 1.0]
    assert found.difference is not None
    assert found.difference < 1e-12
    merged = fedmerge.export(run, CLIENT, tmp_path / "merged", kind="merged")
    whole, wanted = followed(found.folder).state_dict(), load_file(merged.folder / "model.safetensors")
    assert all(torch.equal(whole[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("name", ["frozen A", "own head", "completions"])
def test_the_cards_code_runs_on_what_mergekit_writes(federations: Federations, tmp_path: Path, name: str) -> None:
    """With exact merging the logits are the client's; the output layer is the client's in any case."""
    found = fedmerge.export(federations.folder(name), CLIENT, tmp_path / "recipe", kind="mergekit")
    followed(found.folder).save_pretrained(found.folder / "merged")
    defined = snippet_of(found.folder)
    with inside(found.folder):
        if name == "completions":
            assert isinstance(defined["complete"](UNSEEN[0], most=3), str)
            return
        logits = defined["logits"](UNSEEN)
    wanted = federations.outputs(name)
    assert logits.shape == wanted.shape
    if name == "frozen A":
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    else:
        head = load_file(found.folder / "head.safetensors")
        own = defined["model"].state_dict()
        assert set(head) == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(own[key], tensor) for key, tensor in head.items())


def test_adapters_fit_the_class_that_the_base_names(federations: Federations, tmp_path: Path) -> None:
    """A base that was saved with a language model's output layer: mergekit loads that class, whose names are longer."""
    with inside(tmp_path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(federations.checkpoint("tiny_bert"))
        transformers.BertForMaskedLM.from_pretrained(federations.checkpoint("tiny_bert")).save_pretrained("masked")
        tokenizer.save_pretrained("masked")
    recipe = Hf(str(tmp_path / "masked"), max_length=16, rank=2)
    run = fedmerge.run(classified(recipe), model=recipe, method="fedmerge", training=TRAINING, rounds=1)
    found = fedmerge.export(run, CLIENT, tmp_path / "recipe", kind="mergekit")
    assert all(".bert.encoder." in key for key in load_file(found.folder / "model-0" / "adapter_model.safetensors"))
    merged = fedmerge.export(run, CLIENT, tmp_path / "merged", kind="merged")
    whole, wanted = followed(found.folder).state_dict(), load_file(merged.folder / "model.safetensors")
    shared = [key for key in wanted if f"bert.{key}" in whole]
    assert len(shared) > 20
    assert all(torch.equal(whole[f"bert.{key}"], wanted[key]) for key in shared)


def test_adapter_folders_are_the_servers_models(federations: Federations, tmp_path: Path) -> None:
    """Each is a PEFT folder of its own that names the base."""
    found = fedmerge.export(federations.folder("completions"), CLIENT, tmp_path / "recipe", kind="mergekit")
    run = federations.run("completions")
    models, layout = server_models(run.outcome.selected.state.method), run.outcome.setup.layout
    assert models is not None
    assert found.files == (
        "README.md",
        *(
            f"model-{j}/{name}"
            for j in range(len(models))
            for name in ("adapter_config.json", "adapter_model.safetensors")
        ),
        "recipe.yaml",
    )
    for j, vector in enumerate(models):
        saved = load_file(found.folder / f"model-{j}" / "adapter_model.safetensors")
        own = {k.removeprefix("body.").replace(".default", ""): tensor for k, tensor in layout.views(vector).items()}
        assert saved.keys() == own.keys()
        assert all(torch.equal(saved[key], own[key]) for key in own)
        config = json.loads((found.folder / f"model-{j}" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == federations.checkpoint("tiny_gpt2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama", "method 'local' has no merging weights"),
        ("tags", "method 'fedper' has no merging weights"),
        ("dora", "DoRA's weights are no linear function"),
        ("embeddings", "also adapts embeddings or convolutions"),
    ],
)
def test_what_has_no_recipe_is_refused_in_one_line(
    federations: Federations, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(fedmerge.UsageError, match=message) as caught:
        fedmerge.export(federations.folder(name), CLIENT, tmp_path / "recipe", kind="mergekit")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "recipe").exists()
    assert list(tmp_path.iterdir()) == []


def test_rows_for_groups_of_layers_are_refused(federations: Federations, tmp_path: Path) -> None:
    recipe = federations.recipe("completions")
    data = federations.run("completions").outcome.setup.data
    method = {"name": "fedmerge", "num_models": 2, "search_rounds": 1, "rows": "layer"}
    run = fedmerge.run(data, model=recipe, method=method, training=TRAINING, rounds=2)
    with pytest.raises(fedmerge.UsageError, match="layers have merging weights of their own"):
        fedmerge.export(run, CLIENT, tmp_path / "recipe", kind="mergekit")


def test_signs_that_mergekit_reads_in_paths_are_refused(federations: Federations, tmp_path: Path) -> None:
    with inside(tmp_path):
        transformers.AutoModel.from_pretrained(federations.checkpoint("tiny_bert")).save_pretrained("bert+more")
        transformers.AutoTokenizer.from_pretrained(federations.checkpoint("tiny_bert")).save_pretrained("bert+more")
    recipe = Hf(str(tmp_path / "bert+more"), max_length=16)
    run = fedmerge.run(classified(recipe), model=recipe, method="fedmerge", training=TRAINING, rounds=1)
    with pytest.raises(fedmerge.UsageError, match=r"mergekit reads '\+' and '@'"):
        fedmerge.export(run, CLIENT, tmp_path / "recipe", kind="mergekit")
