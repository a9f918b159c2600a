"""Pretrained models leave as PEFT adapters and as merged weights, and give the client's own logits elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from federations import CASES, CLIENT, UNSEEN, Federations, images, inside, own_classes, snippet_of, with_plain_peft
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import fedmerge
from fedmerge.models.hf import Hf

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SMALL_RUN: dict[str, Any] = {"rounds": 1, "training": {"lr": 0.05, "batch_size": 8}}


def loaded(federations: Federations, name: str, path: str, **wanted: Any) -> Any:
    """A plain transformers model."""
    with inside(federations.place):
        return getattr(transformers, CASES[name].loader).from_pretrained(path, **wanted).eval()


def asked_for(federations: Federations, name: str) -> dict[str, Any]:
    """What the base's own configuration does not say of the client's output layer."""
    case = CASES[name]
    if case.loader in ("AutoModel", "AutoModelForCausalLM"):
        return {}
    pad = {"pad_token_id": 0} if case.maker == "tiny_gpt2" else {}
    return {"num_labels": len(own_classes(federations.run(name))), **pad}


@torch.no_grad()
def outputs_of(model: Any, inputs: Tensor, folder: Path) -> Tensor:
    """Of a plain model on tokens padded with −1 or on pixels; on the mean if there is a head beside it."""
    if inputs.is_floating_point():
        pixels = torch.nn.functional.interpolate(inputs.expand(-1, 3, -1, -1), size=(16, 16), mode="bilinear")
        found: Tensor = model(pixel_values=pixels).logits
        return found
    inputs = inputs[:, : int((inputs >= 0).sum(dim=1).max())]
    mask = inputs >= 0
    output = model(input_ids=inputs.clamp_min(0), attention_mask=mask.long())
    if not (folder / "head.safetensors").exists():
        logits: Tensor = output.logits
        return logits
    head = load_file(folder / "head.safetensors")
    real = mask[..., None].float()
    mean = (output.last_hidden_state * real).sum(dim=1) / real.sum(dim=1)
    return torch.nn.functional.linear(mean, head["weight"], head["bias"])


@pytest.fixture(scope="module")
def folders(federations: Federations, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The export of one case as one kind, made once, from the run folder."""
    place, made = tmp_path_factory.mktemp("exports"), dict[tuple[str, str], Path]()

    def folder(name: str, kind: Any) -> Path:
        if (name, kind) not in made:
            made[name, kind] = fedmerge.export(
                federations.folder(name), CLIENT, place / f"{name} {kind}", kind=kind
            ).folder
        return made[name, kind]

    return folder


@pytest.mark.parametrize("name", CASES)
def test_plain_peft_gives_the_clients_logits(federations: Federations, folders: Any, name: str) -> None:
    folder = folders(name, "peft")
    base = loaded(federations, name, federations.checkpoint(CASES[name].maker), **asked_for(federations, name))
    found = outputs_of(with_plain_peft(base, folder), federations.unseen(name), folder)
    wanted = federations.outputs(name)
    assert found.shape == wanted.shape
    real = (federations.unseen(name)[:, : wanted.shape[1]] >= 0) if wanted.dim() == 3 else slice(None)
    torch.testing.assert_close(found[real], wanted[real], **CLOSE)


@pytest.mark.parametrize("name", ["completions", "llama"])
def test_where_nothing_is_cut_logits_are_equal_to_the_last_bit(
    federations: Federations, folders: Any, name: str
) -> None:
    folder = folders(name, "peft")
    base = loaded(federations, name, federations.checkpoint(CASES[name].maker))
    found = outputs_of(with_plain_peft(base, folder), federations.unseen(name)[2:], folder)
    with torch.no_grad():
        assert torch.equal(found, federations.run(name).client_model(CLIENT)(federations.unseen(name)[2:]))


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_give_the_clients_logits_without_peft(federations: Federations, folders: Any, name: str) -> None:
    folder = folders(name, "merged")
    model = loaded(federations, name, str(folder))
    assert not any("lora" in key or "ia3" in key or "block" in key for key in model.state_dict())
    found, wanted = outputs_of(model, federations.unseen(name), folder), federations.outputs(name)
    real = (federations.unseen(name)[:, : wanted.shape[1]] >= 0) if wanted.dim() == 3 else slice(None)
    largest = float(wanted.abs().max())  # folding in rounds weights, and the deeper the model the more it shows
    torch.testing.assert_close(found[real], wanted[real], rtol=0.0, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize("kind", ["peft", "merged"])
@pytest.mark.parametrize("name", CASES)
def test_the_cards_code_gives_the_clients_logits(federations: Federations, folders: Any, name: str, kind: str) -> None:
    folder = folders(name, kind)
    defined, wanted, recipe = snippet_of(folder), federations.outputs(name), federations.recipe(name)
    with inside(folder):
        if recipe.task == "complete":
            network: Any = federations.run(name).client_model(CLIENT)
            encoder = recipe.encoder()
            assert encoder is not None
            tokens = network.complete(encoder.prompt(UNSEEN[0]), 8, encoder.end)
            assert defined["complete"](UNSEEN[0], most=8) == encoder.decode(tokens)
            return
        if recipe.task == "tag":
            first = 1 + torch.arange(len(UNSEEN[0].split()))  # one piece for each word of the first text, after [CLS]
            torch.testing.assert_close(defined["logits"](UNSEEN[0]), wanted[0, first], **CLOSE)
            return
        found = defined["logits"](images() if recipe.task == "images" else UNSEEN)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_both_halves_differ_so_that_equal_logits_mean_something(federations: Federations) -> None:
    """The client's model is neither the base nor another client's."""
    run, inputs = federations.run("mean"), federations.unseen("mean")
    with torch.no_grad():
        first, own, fresh = (m(inputs) for m in (run.client_model(0), run.client_model(2), run.outcome.setup.module))
    assert (own - first).abs().max() > 1e-2
    assert (own - fresh).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mean", "own head", "tags", "images"])
def test_run_and_run_folder_give_the_same_files(
    federations: Federations, folders: Any, tmp_path: Path, name: str
) -> None:
    from_memory = fedmerge.export(federations.run(name), f"site-{CLIENT}", tmp_path / "export")
    from_disk = folders(name, "peft")
    assert from_memory.kind == "peft"
    for file in from_memory.files:
        assert (from_memory.folder / file).read_bytes() == (from_disk / file).read_bytes(), file


@pytest.mark.parametrize("name", ["own head", "tags", "images"])
def test_a_models_own_output_layer_has_the_clients_classes_only(
    federations: Federations, folders: Any, name: str
) -> None:
    run, own = federations.run(name), own_classes(federations.run(name))
    names = [run.record.class_names[k] for k in own]
    adapter = load_file(folders(name, "peft") / "adapter_model.safetensors")
    weights = [tensor for key, tensor in adapter.items() if key.endswith("classifier.weight")]
    assert [len(weight) for weight in weights] == [len(own)]
    config = json.loads((folders(name, "merged") / "config.json").read_text())
    assert list(config["id2label"].values()) == names
    assert config["label2id"] == {label: k for k, label in enumerate(names)}
    assert f"| classes | {', '.join(names)} |" in (folders(name, "peft") / "README.md").read_text()


def test_classes_that_only_others_have_are_cut_off(federations: Federations, folders: Any) -> None:
    run = federations.run("mean")
    assert run.record.class_names == ("a0", "a1", "b0", "b1", "b2")
    assert own_classes(run) == [2, 3, 4]
    head = load_file(folders("mean", "peft") / "head.safetensors")
    own: Any = run.client_model(CLIENT)
    assert torch.equal(head["weight"], own.head.weight[2:])
    assert torch.equal(head["bias"], own.head.bias[2:])


def test_merging_leaves_the_runs_own_base_alone(federations: Federations, tmp_path: Path) -> None:
    run, inputs = federations.run("own head"), federations.unseen("own head")
    with torch.no_grad():
        before = run.client_model(0)(inputs)
        fedmerge.export(run, CLIENT, tmp_path / "export", kind="merged")
        assert torch.equal(run.client_model(0)(inputs), before)


def test_configuration_of_the_merged_model_is_the_bases_own(federations: Federations, folders: Any) -> None:
    """Dropout, which a run sets to its own, comes back; architecture and tokenizer are there."""
    original = json.loads((Path(federations.checkpoint("tiny_bert")) / "config.json").read_text())
    merged = json.loads((folders("own head", "merged") / "config.json").read_text())
    assert merged["hidden_dropout_prob"] == original["hidden_dropout_prob"] == 0.1
    assert merged["architectures"] == ["BertForSequenceClassification"]
    assert (folders("own head", "merged") / "tokenizer.json").is_file()


def test_an_output_layer_that_the_checkpoint_brings_is_cut_too(federations: Federations, tmp_path: Path) -> None:
    """A base that is a classifier with as many classes already: its layer is frozen in the run, and must be saved."""
    with inside(tmp_path):
        classifier = loaded(federations, "own head", federations.checkpoint("tiny_bert"), num_labels=3)
        classifier.save_pretrained(tmp_path / "classifier")
        transformers.AutoTokenizer.from_pretrained(federations.checkpoint("tiny_bert")).save_pretrained("classifier")
    recipe = Hf(str(tmp_path / "classifier"), pooling="model", max_length=16)
    encoder = recipe.encoder()
    assert encoder is not None
    some = {
        "first": (["a b", "b c", "c d", "d e"] * 3, ["x", "y"] * 6),
        "second": (["e f", "f g", "g h"] * 3, ["y", "z", "y"] * 3),
    }
    data = fedmerge.data.from_texts(some, encoder, validation=0.0, test=0.0)
    run = fedmerge.run(data, model=recipe, **SMALL_RUN)
    wanted_names = [data.class_names[k] for k in own_classes(run, 0)]
    assert wanted_names == ["x", "y"]
    folder = fedmerge.export(run, "first", tmp_path / "export").folder
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    inputs = torch.from_numpy(encoder.encode(UNSEEN, None, ()).inputs)
    with torch.no_grad():
        wanted = run.client_model("first")(inputs)[:, :2]
    with inside(folder):
        torch.testing.assert_close(snippet_of_cut(folder, num_labels=2)(UNSEEN), wanted, **CLOSE)
    merged = fedmerge.export(run, "first", tmp_path / "merged", kind="merged").folder
    torch.testing.assert_close(snippet_of(merged)["logits"](UNSEEN), wanted, **CLOSE)


def snippet_of_cut(folder: Path, num_labels: int) -> Any:
    assert f"num_labels={num_labels}" in (folder / "README.md").read_text()
    return snippet_of(folder)["logits"]


@pytest.mark.parametrize("name", ["mean", "completions"])
def test_a_base_in_bfloat16_stays_in_bfloat16(federations: Federations, tmp_path: Path, name: str) -> None:
    """The adapter is float32 and gives equal logits; folding it in rounds to the base's three digits."""
    case = CASES[name]
    recipe = Hf(federations.checkpoint(case.maker), max_length=16, dtype="bfloat16", **case.options)
    data = federations.run(name).outcome.setup.data
    run = fedmerge.run(data, model=recipe, **SMALL_RUN)
    inputs = federations.unseen(name)[2:]
    with torch.no_grad():
        wanted = run.client_model(CLIENT)(inputs)
    wanted = wanted if name == "completions" else wanted[:, own_classes(run)]
    for kind, away in (("peft", 1e-6), ("merged", 0.1)):
        folder = fedmerge.export(run, CLIENT, tmp_path / kind, kind=kind).folder
        defined = snippet_of(folder)
        found = (
            outputs_of(defined["model"], inputs, folder).float()
            if name == "completions"
            else defined["logits"](UNSEEN[2:])
        )
        assert (found - wanted).abs().max() <= away * wanted.abs().max()
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in list(file.keys())} == {torch.bfloat16}


def test_nothing_in_the_folders_can_execute_code(folders: Any) -> None:
    for name, kind in (("mean", "peft"), ("own head", "merged"), ("completions", "merged")):
        endings = {path.suffix for path in folders(name, kind).rglob("*") if path.is_file()}
        assert endings <= {".safetensors", ".json", ".md", ".jinja"}
