"""``fedmerge explain``: from its words to its exit code and what it prints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedmerge.cli import main
from fedmerge.experiment.config import build_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import read_run
from small import WORDS, small

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain") / "cmp"
    method = "fedmerge:num_models=2,initial=independent"
    assert main(["compare", method, "local", *WORDS, "--quiet", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_groups_and_models_are_printed(runs: Path, capsys: Captured) -> None:
    assert main(["explain", str(runs)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "A client uses",
        "Groups found",
        "What each model is for",
        "Classes that stand out",
        "against training alone",
    ):
        assert words in printed
    assert "What every client uses" not in printed


def test_all_clients_are_printed_if_asked_for(runs: Path, capsys: Captured) -> None:
    assert main(["explain", str(runs / "fedmerge-seed0"), "--all-clients"]) == 0
    printed = capsys.readouterr().out
    assert "What every client uses" in printed
    assert all(name in printed for name in read_run(runs / "fedmerge-seed0").client_names)
    assert "To Local" not in printed  # there is no Local-only run in this folder


def test_named_clients_are_told_in_a_line_each(runs: Path, capsys: Captured) -> None:
    names = read_run(runs / "fedmerge-seed0").client_names[:2]
    assert main(["explain", str(runs), *names]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" uses ")[0] for line in lines] == list(names)
    assert all("points to training alone" in line for line in lines)


def test_an_unknown_client_is_refused(runs: Path, capsys: Captured) -> None:
    assert main(["explain", str(runs), "client-x"]) == 2
    assert "unknown client 'client-x'" in capsys.readouterr().err


def test_a_run_that_was_killed_is_named_as_such(runs: Path, tmp_path: Path, capsys: Captured) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(runs / "fedmerge-seed0", killed)
    facts = json.loads((killed / "run.json").read_text())
    (killed / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    assert main(["explain", str(killed)]) == 0
    assert "fedmerge, seed 0, is running after 2 rounds: its numbers are of round" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["local-seed0"], ["", "--reference", "local"]])
def test_a_method_without_merging_weights_cannot_be_explained(runs: Path, words: list[str], capsys: Captured) -> None:
    assert main(["explain", str(runs / words[0]), *words[1:]]) == 2
    assert "run 'local' (seed 0) has no merging weights" in capsys.readouterr().err


def test_a_narrow_terminal_folds_texts_and_loses_none(
    runs: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["explain", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert not any("…" in line for line in lines[1:])


def test_a_run_keeps_how_many_train_examples_of_each_class_a_client_has(runs: Path) -> None:
    config = build_config(small())
    data = load_data(config.source, config.partition, config.run.seed)
    record = read_run(runs / "fedmerge-seed0")
    assert record.class_counts is not None
    assert tuple(map(sum, record.class_counts)) == record.num_train
    for client, counts in zip(data.clients, record.class_counts, strict=True):
        assert np.array_equal(counts, [(client.train.targets == k).sum() for k in range(10)])
