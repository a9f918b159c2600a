"""A site that comes later: what it is given says nothing of any single site, and what it makes of it is its own."""

from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from small_deployment import HereLink, SlowClock, write_federation

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.data import Examples
from fedmerge.deploy.forget import forget_site
from fedmerge.deploy.joining import join
from fedmerge.deploy.offer import Offer, make_offer, read_offer
from fedmerge.deploy.server import serve
from fedmerge.deploy.site import SiteConfig, read_site
from fedmerge.deploy.site_data import site_client
from fedmerge.deploy.site_use import read_site_model
from fedmerge.experiment.record import read_run
from fedmerge.onboarding import WAYS, onboard_server, server_of_folder

NAMES = ("clinic-ant", "clinic-bee", "clinic-cat")
ROWS = (211, 223, 239)
METHOD = {"name": "fedmerge", "num_models": 2, "initial": "independent", "rule": "gradient"}


def rows_of(count: int, rule: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(count)
    x = rng.normal(size=(count, 6)).astype(np.float32)
    return x, np.argmax(x @ np.random.default_rng(rule).normal(size=(6, 3)), axis=1)


def finished(folder: Path, names: tuple[str, ...] = NAMES, **options: Any) -> Path:
    """The run folder of a federation whose sites have different numbers of rows that occur nowhere else."""
    federation = write_federation(folder, names, **{"method": METHOD, **options})
    for number, name in enumerate(names):
        x, y = rows_of(ROWS[number], number % 2)
        np.savez(folder / "sites" / name / "data.npz", x=x, y=y)
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    return federation.run_folder


def newcomer(folder: Path, count: int = 60) -> SiteConfig:
    folder.mkdir()
    x, y = rows_of(count, 1)
    np.savez(folder / "data.npz", x=x, y=y)
    toml = {"name": "newcomer", "server": "127.0.0.1:9092", "data": {"path": "data.npz"}}
    (folder / "site.toml").write_text(tomli_w.dumps(toml))
    return read_site(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("federation") / "f")


@pytest.fixture(scope="module")
def offered(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_offer(run, tmp_path_factory.mktemp("offer") / "offer").folder


def own_examples(site: SiteConfig, offer: Offer) -> dict[str, Examples]:
    client = site_client(site, offer.terms.schema, seed=offer.terms.options.seed)
    return {split: getattr(client, split) for split in ("train", "validation", "test")}


# ---------------------------------------------------------------- what is told


def test_no_name_row_count_or_score_of_a_known_site_is_in_any_byte(run: Path, offered: Path) -> None:
    record, server = read_run(run), server_of_folder(run)
    assert server.rows is not None
    logits = next(t for n, t in load_file(run / "models.safetensors").items() if n.endswith("soup.logits"))
    content = {path.name: path.read_bytes() for path in offered.iterdir()}
    assert sorted(content) == ["README.md", "models.safetensors", "offer.json"]
    scores = [s for line in record.evaluated() for s in (line.validation, line.test) if s is not None]
    told = {
        repr(value) for score in scores for value in (*score.accuracy, *score.loss) if value not in (None, 0.0, 1.0)
    }
    assert len(told) > 10
    counts = {*record.num_train, *record.num_validation, *record.num_test}
    deployment = json.loads((run / "deployment.json").read_text())
    for name, data in content.items():
        assert not [site for site in NAMES if site.encode() in data], name
        assert record.data_sha256.encode() not in data
        for client in range(len(NAMES)):
            for row in (server.rows[0, client], logits[0, client]):
                assert row.double().numpy().tobytes() not in data
                assert row.float().numpy().tobytes() not in data
                assert not [value for value in row.tolist() if f"{abs(value):.4f}".encode() in data]
        if name != "models.safetensors":
            text = data.decode().replace(deployment["run"], "")
            assert not [value for value in told if value in text], name
            assert not [count for count in counts if re.search(rf"(?<![\w.]){count}(?![\w.])", text)], name


def test_the_mean_row_is_told_from_three_sites_on_and_without_forgotten_ones(tmp_path: Path, run: Path) -> None:
    rows = server_of_folder(run).rows
    assert rows is not None
    found = read_offer(make_offer(run, tmp_path / "three").folder).server.mean_row
    assert found is not None
    assert torch.equal(found, rows.mean(dim=1))
    shutil.copytree(run.parent, tmp_path / "f")
    shutil.rmtree(tmp_path / "f" / "sites" / "clinic-bee")
    forget_site(tmp_path / "f", "clinic-bee")
    two = make_offer(tmp_path / "f" / "run", tmp_path / "two")
    assert not two.has_mean_row
    assert "nothing of the known sites' merging weights" in (tmp_path / "two" / "README.md").read_text()
    assert set(load_file(tmp_path / "two" / "models.safetensors")) == {"models", "blocks"}


def test_only_its_owner_may_read_an_offer_and_nothing_is_overwritten(run: Path, offered: Path) -> None:
    assert {stat.S_IMODE(path.stat().st_mode) for path in offered.iterdir()} == {0o600}
    with pytest.raises(UsageError, match="not empty"):
        make_offer(run, offered)


def test_only_deployed_runs_are_offered(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "deployment.json").unlink()
    with pytest.raises(UsageError, match="no deployed run"):
        make_offer(tmp_path / "run", tmp_path / "out")


# ---------------------------------------------------------------- what a newcomer makes of it


@pytest.mark.parametrize("way", ["uniform", "mean", "single", "weights", "fine-tune"])
def test_ways_that_need_no_known_row_give_the_bits_of_onboarding_on_the_run(
    run: Path, offered: Path, tmp_path: Path, way: str
) -> None:
    site, offer = newcomer(tmp_path / "site"), read_offer(offered)
    own = own_examples(site, offer)
    wanted = onboard_server(server_of_folder(run), own["train"], validation=own["validation"], way=way, seed=5)
    found = join(offer, site, way=way, seed=5)
    assert torch.equal(found.onboarded.params, wanted.params)
    assert torch.equal(found.onboarded.row, wanted.row)
    assert found.onboarded.estimate == wanted.estimate
    assert [c for c in wanted.candidates if c.way not in UNTOLD] == list(found.onboarded.candidates)


UNTOLD = ("nearest", "shrunk-weights")


def test_what_differs_is_what_needs_rows_of_single_sites(run: Path, offered: Path, tmp_path: Path) -> None:
    site, offer = newcomer(tmp_path / "site"), read_offer(offered)
    own = own_examples(site, offer)
    whole = onboard_server(server_of_folder(run), own["train"], validation=own["validation"])
    found = join(offer, site).onboarded
    offered_ways, all_ways = ({tried.way for tried in done.candidates} for done in (found, whole))
    assert all_ways - offered_ways == set(UNTOLD)
    assert found.fit.verdict == "not known"
    assert "not told" in found.fit.reason
    assert found.fit.nearest == ()
    for way in UNTOLD:
        assert way in WAYS
        with pytest.raises(UsageError, match=way):
            join(offer, site, way=way)


def test_a_newcomer_has_its_model_as_other_sites_have_theirs(offered: Path, tmp_path: Path) -> None:
    site = newcomer(tmp_path / "site")
    done = join(offered, site)
    model = read_site_model(tmp_path / "site")
    assert isinstance(model.client.personal, torch.Tensor)
    assert torch.equal(model.client.personal, done.onboarded.params)
    test = own_examples(site, read_offer(offered))["test"]
    assert model.score(test).accuracy == done.test.accuracy == model.note.test.accuracy
    assert model.note.way == done.onboarded.way
    assert model.note.run == read_offer(offered).note.run
    assert json.loads((done.folder / "onboard.json").read_text())["way"] == done.onboarded.way
    assert {stat.S_IMODE(path.stat().st_mode) for path in done.folder.iterdir()} == {0o600}
    assert "without taking part" in (done.folder / "README.md").read_text()


def test_the_others_are_not_disturbed(run: Path, offered: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.parent.rglob("*") if path.is_file()}
    join(offered, newcomer(tmp_path / "site"))
    assert {path: path.read_bytes() for path in run.parent.rglob("*") if path.is_file()} == before


def test_a_newcomer_brings_its_own_output_layer_where_the_sites_keep_theirs(tmp_path: Path) -> None:
    run = finished(tmp_path / "f", keep=["head"])
    site = newcomer(tmp_path / "site")
    arrays = np.load(site.folder / "data.npz")
    np.savez(site.folder / "data.npz", x=arrays["x"], y=np.where(arrays["y"] == 1, 2, arrays["y"]))
    done = join(make_offer(run, tmp_path / "offer").folder, site)
    model = read_site_model(site.folder)
    assert model.class_names == ("0", "2")
    assert set(model.predict(arrays["x"]).names) <= {"0", "2"}
    assert done.test.accuracy == model.note.test.accuracy
    assert done.test.accuracy is not None


def test_a_newcomer_with_fewer_classes_keeps_the_frozen_factors_of_the_run(tmp_path: Path) -> None:
    """With another output layer the network would draw others: they are in the model's own file."""
    pytest.importorskip("peft")
    import tiny_models  # noqa: PLC0415 - needs the extra

    base, names = str(tiny_models.tiny_bert(tmp_path / "base")), ("bad", "good", "odd")
    model = {"name": "hf", "path": base, "max_length": 16, "rank": 4, "train_a": False}
    data = {"class_names": names, "shape": [16], "dtype": "tokens", "text_column": "text"}
    federation = write_federation(tmp_path / "f", NAMES, model=model, data=data, keep=["head"], rounds=1)
    words, rng = tiny_models.SENTENCES, np.random.default_rng(5)
    texts = [" ".join(rng.permutation(words[k % len(words)].split())) for k in range(30)]

    def give(folder: Path, classes: tuple[str, ...]) -> SiteConfig:
        lines = [f"{text},{classes[ord(text[0]) % len(classes)]}" for text in texts]
        (folder / "data.csv").write_text("\n".join(["text,label", *lines]))
        toml = {"name": folder.name, "server": "127.0.0.1:9092", "data": {"path": "data.csv"}}
        (folder / "site.toml").write_text(tomli_w.dumps(toml))
        return read_site(folder)

    for name in NAMES:
        give(federation.folder / "sites" / name, names)
    serve(federation, HereLink(federation), clock=SlowClock().clock())
    (tmp_path / "new").mkdir()
    done = join(make_offer(federation.run_folder, tmp_path / "o").folder, give(tmp_path / "new", ("bad", "odd")))
    found = read_site_model(tmp_path / "new")
    assert found.class_names == ("bad", "odd")
    with torch.no_grad():
        inputs = torch.from_numpy(found.terms.model.encoder().encode(texts, None, ()).inputs)
        assert torch.equal(found.predict(texts).probabilities, done.onboarded.module()(inputs).softmax(dim=1))


# ---------------------------------------------------------------- offers are not believed


def spoiled(offered: Path, out: Path, **change: Any) -> Path:
    shutil.copytree(offered, out)
    plain = json.loads((out / "offer.json").read_text())
    (out / "offer.json").write_text(json.dumps({**plain, **change}))
    return out


def test_a_damaged_note_is_refused(offered: Path, tmp_path: Path) -> None:
    plain = json.loads((offered / "offer.json").read_text())
    for number, (change, match) in enumerate(
        [
            ({"format": "other"}, "format"),
            ({"surplus": 1}, "surplus"),
            ({"num_params": -1}, "out of range"),
            ({"terms": {**plain["terms"], "source": {"name": "x"}}}, "source"),
            ({"terms": {**plain["terms"], "model": {"name": "mlp", "hidden": [10_000_000]}}}, "network of"),
            ({"num_params": plain["num_params"] + 1}, "parameters"),
        ]
    ):
        with pytest.raises(FedmergeError, match=match):
            read_offer(spoiled(offered, tmp_path / f"{number}", **change))


def test_an_offer_cannot_make_a_newcomer_load_code(offered: Path, tmp_path: Path) -> None:
    terms = json.loads((offered / "offer.json").read_text())["terms"]
    (tmp_path / "net.py").write_text("raise SystemExit('run')\n")
    evil = {**terms, "model": {"name": "import", "path": f"{tmp_path / 'net.py'}:Net"}}
    with pytest.raises(UsageError, match="network is of your own"):
        read_offer(spoiled(offered, tmp_path / "o", terms=evil))


def test_damaged_tensors_are_refused(offered: Path, tmp_path: Path) -> None:
    own = load_file(offered / "models.safetensors")
    nan = own["models"].clone()
    nan[0, 0] = torch.nan
    for number, (change, match) in enumerate(
        [
            ({"models": nan}, "finite"),
            ({"models": own["models"][:, :-1].contiguous()}, "expected floats"),
            ({"models": own["models"].double()}, "expected torch.float32"),
            ({"blocks": own["blocks"] + 1}, "blocks"),
            ({"mean_row": own["mean_row"] * 2}, "add up to 1"),
            ({"rows": torch.zeros(1)}, "expected models and blocks"),
        ]
    ):
        shutil.copytree(offered, tmp_path / f"{number}")
        save_file({**own, **change}, tmp_path / f"{number}" / "models.safetensors")
        with pytest.raises(FedmergeError, match=match):
            read_offer(tmp_path / f"{number}")


def test_another_folder_is_no_offer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no offer"):
        read_offer(tmp_path)
