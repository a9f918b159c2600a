"""The model that a site is left with: whole or not at all, its owner's alone, and the same when it is read back."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_deployment import NAMES, HereLink, SlowClock, write_federation

from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.data import Examples
from fedmerge.deploy.messages import Letter, answer_from
from fedmerge.deploy.replacing import put_back, replacing
from fedmerge.deploy.server import serve
from fedmerge.deploy.site import read_site
from fedmerge.deploy.site_data import site_client
from fedmerge.deploy.site_model import read_note
from fedmerge.deploy.site_use import SiteModel, read_site_model
from fedmerge.exporting import trained_of_folder

SITE = "clinic-b"
ENSEMBLES = (
    {"name": "fedem", "num_models": 2},
    {"name": "gated-mixture"},
    {"name": "femam", "num_models": 2},
)


def trained_site(folder: Path, **options: Any) -> tuple[Path, dict[str, Letter]]:
    """A site's folder after a run, and what the sites answered to the last message."""
    federation = write_federation(folder, **options)
    last: dict[str, Letter] = {}

    def keep(name: str, kind: str, letter: Letter) -> Letter:
        if kind == "final":
            last[name] = letter
        return letter

    serve(federation, HereLink(federation, tamper=keep), clock=SlowClock().clock())
    return folder / "sites" / SITE, last


Trained = Callable[..., tuple[Path, dict[str, Letter]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`trained_site` that makes each run once."""
    made: dict[str, tuple[Path, dict[str, Letter]]] = {}

    def once(**options: Any) -> tuple[Path, dict[str, Letter]]:
        key = json.dumps(options)
        if key not in made:
            made[key] = trained_site(tmp_path_factory.mktemp("federation") / "f", **options)
        return made[key]

    return once


@pytest.fixture(scope="module")
def site(trained: Trained) -> Path:
    return trained(method={"name": "fedmerge"})[0]


def own_examples(site: Path, model: SiteModel, split: str) -> Examples:
    client = site_client(read_site(site), model.terms.schema, seed=model.terms.options.seed)
    examples: Examples = getattr(client, split)
    return examples


@pytest.mark.parametrize(
    "method", [{"name": "fedmerge"}, {"name": "ditto"}, *ENSEMBLES], ids=lambda method: str(method["name"])
)
def test_what_is_read_back_scores_as_the_site_told_the_server(trained: Trained, method: dict[str, Any]) -> None:
    site, last = trained(method=method)
    told = answer_from(last[SITE].text)
    model = read_site_model(site)
    for split in ("validation", "test"):
        found, score = model.score(own_examples(site, model, split)), getattr(told, split)
        assert (found.accuracy, found.loss) == (score.accuracy, score.loss)
        assert found.num_rows == getattr(told, f"num_{split}")
        assert getattr(model.note, split) == score


def test_the_model_is_that_of_the_run_of_which_it_is_a_client(site: Path) -> None:
    run = trained_of_folder(site.parent.parent / "run")
    wanted, model = run.personal(NAMES.index(SITE)), read_site_model(site)
    assert isinstance(model.client.personal, torch.Tensor)
    assert isinstance(wanted, torch.Tensor)
    assert torch.equal(model.client.personal, wanted)
    assert model.note.round == run.progress.round


@pytest.mark.parametrize("method", [{"name": "fedmerge"}, *ENSEMBLES], ids=lambda method: str(method["name"]))
def test_the_card_loads_the_model_in_plain_torch(trained: Trained, method: dict[str, Any]) -> None:
    site, _ = trained(method=method)
    text = (site / "model" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    rows = np.load(site / "data.npz")["x"][:5]
    model = read_site_model(site)
    if "def outputs" not in code:
        code += "\noutputs = network"
    code += f"\nimport json, torch\nx = torch.tensor({rows.tolist()!r}, dtype=torch.float32)"
    code += "\nwith torch.no_grad(): print(json.dumps(outputs(x).softmax(1).tolist()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=site / "model", capture_output=True, text=True, check=True)
    wanted = model.predict(rows).probabilities
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), wanted, atol=1e-6)


def test_the_card_tells_federation_classes_and_scores_and_no_other_site(site: Path) -> None:
    text = (site / "model" / "README.md").read_text()
    note = read_note(site / "model")
    assert f"{100 * (note.test.accuracy or 0):.1f} %" in text
    assert "0, 1, 2" in text
    assert note.terms_sha256 in text
    assert note.run in text
    assert not [name for name in NAMES if name != SITE and name in text]


def test_a_site_that_has_the_federations_file_tells_its_name_and_how_many_sites_there_are(tmp_path: Path) -> None:
    federation = write_federation(tmp_path / "f")
    site = federation.folder / "sites" / SITE
    shutil.copy(federation.folder / "federation.toml", site / "federation.toml")
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    assert (read_note(site / "model").federation, read_note(site / "model").num_sites) == ("clinics", 3)
    assert "clinics, 3 sites" in (site / "model" / "README.md").read_text()


def test_only_the_owner_may_read_any_of_it(site: Path) -> None:
    files = [path for path in (site / "model").rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((site / "model").stat().st_mode) == 0o700


# ---------------------------------------------------------------- use


def test_rows_are_read_from_files_with_and_without_labels_and_from_arrays(site: Path, tmp_path: Path) -> None:
    model, x = read_site_model(site), np.load(site / "data.npz")["x"]
    wanted = model.predict(x)
    header = ",".join(f"c{k}" for k in range(6))
    lines = [",".join(repr(float(value)) for value in row) for row in x]
    (tmp_path / "bare.csv").write_text("\n".join([header, *lines]))
    (tmp_path / "labelled.csv").write_text("\n".join([header + ",label", *(line + ",1" for line in lines)]))
    np.savez(tmp_path / "bare.npz", x=x)
    for file in (site / "data.npz", tmp_path / "bare.npz", tmp_path / "bare.csv", tmp_path / "labelled.csv"):
        found = model.predict(file)
        assert found.names == wanted.names
        assert torch.equal(found.probabilities, wanted.probabilities)
    assert torch.allclose(wanted.probabilities.sum(dim=1), torch.ones(len(x)))


def test_labelled_rows_are_scored_whole(site: Path) -> None:
    model, arrays = read_site_model(site), np.load(site / "data.npz")
    right = np.mean([int(name) for name in model.predict(arrays["x"]).names] == arrays["y"])
    assert model.score(site / "data.npz") == model.score((arrays["x"], arrays["y"]))
    assert model.score(site / "data.npz").accuracy == pytest.approx(right)


def test_rows_of_another_form_are_refused(site: Path, tmp_path: Path) -> None:
    model = read_site_model(site)
    with pytest.raises(DataError, match="the federation has float32"):
        model.predict(np.zeros((2, 5), dtype=np.float32))
    np.savez(tmp_path / "odd.npz", z=np.zeros(3))
    with pytest.raises(DataError, match="no array 'x'"):
        model.predict(tmp_path / "odd.npz")
    with pytest.raises(UsageError, match="no such file"):
        model.predict(tmp_path / "nowhere.csv")
    (tmp_path / "semicolons.csv").write_text("c0;c1;c2;c3;c4;c5\n1,5;2;3;4;5;6\n")
    with pytest.raises(DataError, match="columns are separated by ';'"):
        model.predict(tmp_path / "semicolons.csv")


def test_rows_in_other_units_are_told(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    scale = {"mean": [0.0] * 6, "std": [1.0] * 6}
    site, _ = trained(data={"class_names": ["0", "1", "2"], "shape": [6], **scale})
    rows, model = np.load(site / "data.npz")["x"], read_site_model(site)
    caplog.clear()
    model.predict(rows)
    assert not caplog.records
    rows[:, 4] += 1000
    model.predict(rows)
    (record,) = caplog.records
    assert record.getMessage().startswith("the mean of feature 4 is +")
    assert "in other units than those that the model learned from?" in record.getMessage()


def test_the_model_is_exported_as_a_client_of_a_run_is(site: Path, tmp_path: Path) -> None:
    model = read_site_model(site)
    done = model.export("torch", tmp_path / "out")
    assert done.files == ("README.md", "inputs.json", "model.safetensors")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (site / "model" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="server's models"):
        model.export("mergekit", tmp_path / "other")
    with pytest.raises(UsageError, match="kind"):
        model.export("pickle", tmp_path / "other")


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("at", ["writing", "between", "after"])
def test_a_killed_replacement_leaves_a_whole_model(site: Path, tmp_path: Path, at: str) -> None:
    """The steps of `replacing` are done by hand up to where the process is killed."""
    place = tmp_path / "site" / "model"
    shutil.copytree(site / "model", place)
    shutil.copytree(place, place.with_name(".model.new"))
    (place.with_name(".model.new") / "inputs.json").write_text("newer")
    if at == "writing":
        (place.with_name(".model.new") / "model.json").unlink()
    if at in ("between", "after"):
        place.rename(place.with_name(".model.old"))
    if at == "after":
        place.with_name(".model.new").rename(place)
    assert read_site_model(tmp_path / "site").note == read_note(site / "model")
    assert ((place / "inputs.json").read_text() == "newer") == (at == "after")
    with replacing(place) as new:
        (new / "only.txt").write_text("the newest")
    assert [path.name for path in place.parent.iterdir()] == ["model"]
    assert [path.name for path in place.iterdir()] == ["only.txt"]


def test_a_fault_while_writing_keeps_the_earlier_model(site: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(site / "model", place)

    def write() -> None:
        with replacing(place) as new:
            (new / "half").write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        write()
    put_back(place)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert read_site_model(place).note == read_note(site / "model")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", "other", "format"),
        ("class_names", ["0", "1"], "class names"),
        ("form", ["os:system", ["tensor"]], "no tuple of this method"),
        ("form", ["fedmerge.core.protocol:Update", ["tensor"]], "no way to combine networks"),
        ("form", ["fedmerge.core.ensemble:Mixture", ["tensor"], ["tensor"]], "parts of several networks"),
        ("extra", 1, "extra"),
    ],
)
def test_a_damaged_note_is_refused(site: Path, tmp_path: Path, key: str, value: Any, match: str) -> None:
    shutil.copytree(site / "model", tmp_path / "m")
    plain = json.loads((tmp_path / "m" / "model.json").read_text())
    (tmp_path / "m" / "model.json").write_text(json.dumps({**plain, key: value}))
    with pytest.raises(FedmergeError, match=match):
        read_site_model(tmp_path / "m")


def test_a_network_of_another_size_is_refused_before_it_is_made(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site / "model", tmp_path / "m")
    plain = json.loads((tmp_path / "m" / "model.json").read_text())
    plain["terms"]["model"]["hidden"] = [10_000_000]
    (tmp_path / "m" / "model.json").write_text(json.dumps(plain))
    with pytest.raises(FedmergeError, match="names a network of"):
        read_site_model(tmp_path / "m")


def test_a_network_of_the_users_own_must_be_given_again(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef Net(num_classes):\n    return nn.Sequential(nn.Linear(6, num_classes))\n"
    )
    federation = write_federation(tmp_path / "f", model={"name": "import", "path": f"{tmp_path / 'net.py'}:Net"})
    for name in NAMES:
        shutil.copy(federation.folder / "federation.toml", federation.folder / "sites" / name)
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    site = federation.folder / "sites" / SITE
    with pytest.raises(UsageError, match="give it again"):
        read_site_model(site)
    model = read_site_model(site, model=federation.terms.model)
    assert model.score(own_examples(site, model, "test")).accuracy == model.note.test.accuracy


# ---------------------------------------------------------------- pretrained models


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_an_adapted_language_model_is_kept_as_adapters(tmp_path: Path, pooling: str) -> None:
    """Factors A are frozen: they are drawn from the seed again, and no file holds them but PEFT's."""
    pytest.importorskip("peft")
    import tiny_models  # noqa: PLC0415 - needs the extra

    base = str(tiny_models.tiny_bert(tmp_path / "base"))
    model = {"name": "hf", "path": base, "max_length": 16, "rank": 4, "train_a": False, "pooling": pooling}
    data = {"class_names": ["bad", "good"], "shape": [16], "dtype": "tokens", "text_column": "text"}
    federation = write_federation(tmp_path / "f", model=model, data=data, rounds=1)
    words, rng = tiny_models.SENTENCES, np.random.default_rng(5)
    texts = [" ".join(rng.permutation(words[k % len(words)].split())) for k in range(24)]
    for name in NAMES:
        lines = [f"{text},{('bad', 'good')[ord(text[0]) % 2]}" for text in texts]
        (federation.folder / "sites" / name / "data.csv").write_text("\n".join(["text,label", *lines]))
        toml = (federation.folder / "sites" / name / "site.toml").read_text()
        (federation.folder / "sites" / name / "site.toml").write_text(toml.replace("data.npz", "data.csv"))
    last: dict[str, Letter] = {}
    link = HereLink(federation, tamper=lambda name, kind, letter: last.update({name: letter}) or letter)
    serve(federation, link, clock=SlowClock().clock())
    site = federation.folder / "sites" / SITE
    files = {path.name for path in (site / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= files
    assert (site / "model" / "model.safetensors").stat().st_size < sum(
        path.stat().st_size for path in Path(base).glob("*.safetensors")
    )
    assert {stat.S_IMODE(path.stat().st_mode) for path in (site / "model").iterdir()} == {0o600}
    own, told = read_site_model(site), answer_from(last[SITE].text)
    found = own.score(own_examples_of_texts(site, own))
    assert (found.accuracy, found.loss) == (told.test.accuracy, told.test.loss)
    assert set(own.predict(texts).names) <= {"good", "bad"}
    assert torch.equal(own.predict(site / "data.csv").probabilities, own.predict(texts).probabilities)
    code = (site / "model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code += f"\nimport json\nprint(json.dumps(logits({texts[:3]!r}).softmax(1).tolist()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=site / "model", capture_output=True, text=True, check=True)
    assert torch.allclose(
        torch.tensor(json.loads(done.stdout.splitlines()[-1])), own.predict(texts[:3]).probabilities, atol=1e-5
    )
    assert "adapter_model.safetensors" in own.export(None, tmp_path / "out").files


def own_examples_of_texts(site: Path, model: SiteModel) -> Examples:
    encoder = model.terms.model.encoder()
    return site_client(read_site(site), model.terms.schema, seed=model.terms.options.seed, encoder=encoder).test
