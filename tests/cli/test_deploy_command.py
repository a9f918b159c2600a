"""``fedmerge deploy`` as its users type it, without a network."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "deploy"))
from small_deployment import HereLink, SlowClock

from fedmerge.cli import main
from fedmerge.deploy.federation import read_federation
from fedmerge.deploy.server import serve
from fedmerge.experiment.record import read_run


def told(capsys, *words, code=0):
    assert main(["deploy", *map(str, words)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo federation of three sites that has run on a network in this process."""
    folder = tmp_path_factory.mktemp("demo") / "clinics"
    assert main(["deploy", "init", str(folder), "--demo", "3", "rounds=2"]) == 0
    serve(read_federation(folder), HereLink(read_federation(folder), named=True), clock=SlowClock().clock())
    return folder


def test_without_an_action_all_are_listed(capsys):
    text = told(capsys)
    assert "fedmerge deploy init" in text
    assert "fedmerge deploy forget" in text


def test_an_unknown_action_is_told_the_nearest(capsys):
    assert "did you mean 'start'" in told(capsys, "strt", code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--demo", "3", "--sites", "a"], "--demo brings sites and data of its own"),
        (["--demo", "1"], "--demo: got 1; expected 2 to 25 sites"),
        (["--sites", "a,b"], "--like: none given"),
        (["--demo", "3", "source=digits"], "source"),
        (["--demo", "3", "rounds=0"], "rounds: got 0"),
        (["--demo", "3", "--insecure", "--address", "example.org:1"], "loopback"),
        (["--sites", "a,a", "--like", "x.csv"], "x.csv"),
    ],
)
def test_init_refuses_what_makes_no_sense_and_writes_nothing(capsys, tmp_path, words, said):
    assert said in told(capsys, "init", tmp_path / "f", *words, code=2)
    assert not (tmp_path / "f").exists()


def test_init_from_an_example_has_its_columns_and_classes(capsys, tmp_path):
    rows = [["age", "dose", "outcome"], *([str(20 + i), str(i / 2), ["ill", "well"][i % 2]] for i in range(12))]
    with (tmp_path / "example.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    words = ["--sites", "north,south", "--like", tmp_path / "example.csv", "--label-column", "outcome", "--standardise"]
    text = told(capsys, "init", tmp_path / "f", "training.lr=0.05", *words)
    assert "north, south" in text
    schema = read_federation(tmp_path / "f").terms.schema
    assert (schema.columns, schema.class_names) == (("age", "dose"), ("ill", "well"))
    assert schema.mean == (25.5, 2.75)
    assert read_federation(tmp_path / "f").terms.training.lr == 0.05


def test_a_demo_site_is_ready_and_a_spoiled_one_is_not(capsys, tmp_path, demo):
    shutil.copytree(demo / "sites/site-1", tmp_path / "site-1")
    text = told(capsys, "check", tmp_path / "site-1", "--offline")
    assert text.rstrip().endswith("ready")
    for name in ("key", "data", "classes", "round"):
        assert f"\nok  {name}" in text
    shutil.copy(demo / "sites/site-2/node.key", tmp_path / "site-1/node.key")
    np.savez(tmp_path / "site-1/digits.npz", x=np.zeros((4, 1, 9, 9), np.float32), y=np.arange(4))
    error = told(capsys, "check", tmp_path / "site-1", "--offline", code=1)
    assert "not ready: key, data" in error


def test_check_says_that_a_server_is_not_there(capsys, demo):
    assert "not ready: reachable" in told(capsys, "check", demo / "sites/site-1", code=1)


def test_the_rehearsal_has_the_scores_of_the_federation(capsys, demo):
    text = told(capsys, "rehearse", demo)
    best = read_run(demo / "run").selected()
    for name, accuracy in zip(("site-1", "site-2", "site-3"), best.test.accuracy, strict=True):
        line = next(line for line in text.splitlines() if name in line)
        assert line.split()[-1] == f"{100 * accuracy:.1f}"


def test_status_shows_every_site(capsys, demo):
    text = told(capsys, "status", demo)
    assert text.startswith("round 2 of 2: finished")
    assert [line.split()[0] for line in text.splitlines() if "site-" in line] == ["site-1", "site-2", "site-3"]
    assert text.count("yes") == 3


def test_status_before_the_first_run(capsys, tmp_path):
    main(["deploy", "init", str(tmp_path / "f"), "--demo", "2"])
    capsys.readouterr()
    assert "no run yet" in told(capsys, "status", tmp_path / "f")


def test_a_site_predicts_with_its_own_model(capsys, tmp_path, demo):
    told(capsys, "predict", demo / "sites/site-1", demo / "sites/site-1/digits.npz", "--out", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][:2] == ["class", "probability of 0"]
    assert len(rows) == 301
    assert sum(map(float, rows[1][1:])) == pytest.approx(1, abs=1e-4)


def test_a_site_exports_its_own_model(capsys, tmp_path, demo):
    assert "model.safetensors" in told(capsys, "export", demo / "sites/site-2", "--out", tmp_path / "out")


def test_a_newcomer_joins_by_an_offer(capsys, tmp_path, demo):
    told(capsys, "offer", demo, "--out", tmp_path / "offer")
    shutil.copytree(demo / "sites/site-3", tmp_path / "east", ignore=shutil.ignore_patterns("model", "state"))
    text = told(capsys, "join", tmp_path / "offer", tmp_path / "east")
    assert "made by" in text
    assert (tmp_path / "east/model/model.safetensors").is_file()


def test_a_site_that_leaves_is_told_what_remains(capsys, tmp_path, demo):
    shutil.copytree(demo, tmp_path / "f")
    text = told(capsys, "forget", tmp_path / "f", "site-2")
    assert "remains" in text
    assert "site-2" not in (tmp_path / "f/federation.toml").read_text()


def test_a_site_keeps_its_key_at_home(capsys, tmp_path, demo):
    shutil.copytree(demo, tmp_path / "f")
    shutil.copytree(tmp_path / "f/sites/site-1", tmp_path / "home")
    for name in ("node.key", "node.pub"):
        (tmp_path / "home" / name).unlink()
    line = told(capsys, "key", tmp_path / "home").strip()
    assert "site-1" in told(capsys, "add", tmp_path / "f", "site-1", "--public-key", tmp_path / "home/node.pub")
    assert read_federation(tmp_path / "f").sites["site-1"] == line
    assert not (tmp_path / "f/sites/site-1/node.key").exists()
    shutil.copy(tmp_path / "f/federation.toml", tmp_path / "home/federation.toml")
    assert "\nok  key " in told(capsys, "check", tmp_path / "home", "--offline")


def test_a_site_is_taken_out_before_the_first_run_only(capsys, tmp_path, demo):
    assert "deploy forget" in told(capsys, "remove", demo, "site-2", code=2)
    shutil.copytree(demo, tmp_path / "f", ignore=shutil.ignore_patterns("run"))
    assert f"{tmp_path}/f/removed/site-2" in told(capsys, "remove", tmp_path / "f", "site-2").replace("\n", "")
    assert read_federation(tmp_path / "f").names == ("site-1", "site-3")


def test_the_certificate_is_renewed(capsys, tmp_path, demo):
    shutil.copytree(demo, tmp_path / "f")
    text = told(capsys, "renew", tmp_path / "f", "--days", "99", "--host", "fed.example.org")
    assert "99 days, for 127.0.0.1, localhost, fed.example.org" in text.replace("\n", " ")
    assert "days" in told(capsys, "renew", tmp_path / "f", "--days", "0", code=2)


def test_a_sites_unit_is_written_at_the_site(capsys, tmp_path, demo):
    shutil.copytree(demo / "sites/site-1", tmp_path / "site")
    assert "fedmerge-site.service" in told(capsys, "start", "site", tmp_path / "site", "--unit")
    assert (tmp_path / "site/fedmerge-site.service").is_file()
    assert "its units are in" in told(capsys, "start", "server", demo, "--unit", code=2)


def test_a_site_forgets_its_own_model(capsys, tmp_path, demo):
    shutil.copytree(demo / "sites/site-2", tmp_path / "site-2")
    assert "removed" in told(capsys, "forget-own", tmp_path / "site-2", "--model")
    assert not (tmp_path / "site-2/model").exists()
    assert (tmp_path / "site-2/digits.npz").is_file()


def test_run_without_a_superlink_says_what_to_start(capsys, demo, tmp_path):
    error = told(capsys, "start", "site", tmp_path, code=2)
    assert "is no site" in error
    assert "is no federation" in told(capsys, "start", "server", tmp_path, code=2)
    assert "is no federation" in told(capsys, "run", tmp_path, code=2)
