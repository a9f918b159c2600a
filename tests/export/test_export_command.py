"""``fedmerge export`` on real run folders: what it writes, what its cards say, and its faults."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import CLIENT, Federations, own_classes
from safetensors.torch import load_file
from test_export_restored import SMALL, tables

import fedmerge
from fedmerge.cli import main
from fedmerge.exporting import KINDS
from fedmerge.models.hf import weights_sha256

Captured = pytest.CaptureFixture[str]


def command(folder: Path, client: str, out: Path, *more: str) -> int:
    return main(["export", str(folder), client, "--out", str(out), *more])


def row_of_card(folder: Path, name: str) -> str:
    """The value of one row of the card's table."""
    lines = (folder / "README.md").read_text().splitlines()
    return (
        next(line for line in lines if line.startswith(f"| {name} | ")).removeprefix(f"| {name} | ").removesuffix(" |")
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a perceptron, with validation examples."""
    folder = tmp_path_factory.mktemp("command") / "run"
    fedmerge.run(tables(), method={"name": "fedmerge", "num_models": 2, "search_rounds": 1}, out=folder, **SMALL)
    return folder


def test_the_command_names_every_file_that_it_writes(
    federations: Federations, tmp_path: Path, capsys: Captured
) -> None:
    assert command(federations.folder("mean"), "site-2", tmp_path / "export", "--as", "peft") == 0
    printed = capsys.readouterr().out.split()
    assert printed == sorted(str(path) for path in (tmp_path / "export").iterdir())
    assert {Path(line).name for line in printed} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
    }


def test_a_difference_is_printed_where_there_is_one(
    federations: Federations, run: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert command(federations.folder("frozen A"), "site-2", tmp_path / "recipe", "--as", "mergekit") == 0
    assert "(of the client's adapters from the recipe's, relative)" in capsys.readouterr().out
    assert command(run, "c3", tmp_path / "onnx", "--as", "onnx") == 0
    assert "(of outputs, at most)" in capsys.readouterr().out


def test_a_client_is_named_or_counted(run: Path, tmp_path: Path) -> None:
    assert command(run, "c3", tmp_path / "named") == 0
    assert command(run, "3", tmp_path / "counted") == 0
    named, counted = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("named", "counted"))
    assert named == counted
    assert row_of_card(tmp_path / "counted", "client") == "c3"


def test_files_are_as_readable_as_others(run: Path, tmp_path: Path) -> None:
    assert command(run, "c3", tmp_path / "export") == 0
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("")
    for made, plain in (("export", "plain"), ("export/model.safetensors", "plain/file")):
        assert os.stat(tmp_path / made).st_mode == os.stat(tmp_path / plain).st_mode


def test_an_empty_current_folder_is_filled(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(run, "c3", Path()) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["README.md", "inputs.json", "model.safetensors"]


def test_the_card_says_where_the_model_comes_from(federations: Federations, tmp_path: Path) -> None:
    record = federations.run("mean").record
    base = federations.checkpoint("tiny_bert")
    fedmerge.export(federations.folder("mean"), CLIENT, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()

    def row(name: str) -> str:
        return row_of_card(tmp_path / "export", name)

    assert row("base") == f"`{base}`, weights sha256 `{weights_sha256(base)}`"
    assert row("adapter") == "lora, rank 4"
    assert row("client") == "site-2"
    assert row("task") == "b0 / b1"
    assert row("classes") == "b0, b1, b2"
    assert row("data sha256") == f"`{record.data_sha256}`"
    assert row("seed") == "0"
    assert row("round") == "3, the last: nobody has validation examples"
    assert row("run made by") == f"fedmerge {fedmerge.__version__}"
    name, _, options = row("method").partition(" ")
    assert name == "fedmerge"
    assert json.loads(options.strip("`")) == json.loads(json.dumps(dict(record.options)))
    scores = record.selected().test
    assert scores is not None
    assert (
        row("accuracy, test") == f"{100 * (scores.accuracy[CLIENT] or 0):.1f} % of {record.num_test[CLIENT]} examples"
    )
    assert row("accuracy, validation") == "not known"  # nobody has validation examples here
    assert f"The licence of the base `{base}` holds for this model too" in card
    assert "before the output layer was cut" in card


def test_accuracies_of_tags_and_completions_are_called_what_they_are(federations: Federations, tmp_path: Path) -> None:
    for name, words in (("tags", "of the words of"), ("completions", "of the tokens of")):
        fedmerge.export(federations.folder(name), CLIENT, tmp_path / name)
        assert words in row_of_card(tmp_path / name, "accuracy, test")
    assert "| classes |" not in (tmp_path / "completions" / "README.md").read_text()


def test_merging_weights_are_told_on_request_only(run: Path, tmp_path: Path) -> None:
    assert command(run, "c3", tmp_path / "silent") == 0
    assert command(run, "c3", tmp_path / "telling", "--row") == 0
    silent, telling = ((tmp_path / name / "README.md").read_text() for name in ("silent", "telling"))
    assert "merging weights" not in silent
    mixing = fedmerge.load_run(run).selected().mixing
    assert mixing is not None
    told = [float(word) for word in row_of_card(tmp_path / "telling", "merging weights").split(", ")]
    np.testing.assert_allclose(told, mixing[3], atol=1e-4)
    row = f"| merging weights | {row_of_card(tmp_path / 'telling', 'merging weights')} |\n"
    warning = "- The merging weights above say whom this client is like: this file is not for publication.\n"
    assert telling.count(row) == telling.count(warning) == 1
    assert telling.replace(row, "").replace(warning, "") == silent


def test_signs_in_names_do_not_break_the_cards_table(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32), np.arange(12) % 3
    data = fedmerge.from_arrays({"a|b": (x, y), "plain": (x, y)}, validation=0.0, test=0.0)
    run = fedmerge.run(data, method="fedavg", **SMALL)
    fedmerge.export(run, "a|b", tmp_path / "export")
    assert row_of_card(tmp_path / "export", "client") == "a\\|b"


def test_kinds_that_do_not_fit_the_network_are_refused(
    federations: Federations, run: Path, tmp_path: Path, capsys: Captured
) -> None:
    for kind in ("peft", "merged", "mergekit"):
        assert command(run, "c3", tmp_path / "export", "--as", kind) == 2
        assert "is a Sequential without an adapter of the recipe 'hf'" in capsys.readouterr().err
    for kind in ("onnx", "torch"):
        assert command(federations.folder("mean"), "0", tmp_path / "export", "--as", kind) == 2
        assert "this run's network is a pretrained model; take kind 'peft'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_ensemble_has_no_single_adapter(federations: Federations, tmp_path: Path) -> None:
    recipe = federations.recipe("mean")
    data = federations.run("mean").outcome.setup.data
    method = {"name": "fedem", "num_models": 2}
    run = fedmerge.run(data, model=recipe, method=method, rounds=1, training={"lr": 0.05})
    with pytest.raises(fedmerge.UsageError, match="use several networks at once, which one adapter cannot hold"):
        fedmerge.export(run, 0, tmp_path / "export")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["cc3"], 2, "unknown client 'cc3'; did you mean 'c3'?"),
        (["5"], 2, "or 0..4"),
        (["-1"], 2, "unknown client '-1'"),
        (["c3", "--as", "pft"], 2, "unknown kind 'pft'; did you mean 'peft'?"),
        (["c3", "--model", "nonsense"], 2, "unknown model 'nonsense'"),
        (["c3", "--model", "no/such/file.py:Net"], 2, "no such file"),
    ],
)
def test_faults_of_the_request_are_one_message(
    run: Path, tmp_path: Path, capsys: Captured, words: list[str], code: int, message: str
) -> None:
    assert main(["export", str(run), *words, "--out", str(tmp_path / "export")]) == code
    printed = capsys.readouterr()
    assert message in printed.err.replace("\n", " ")
    assert "Traceback" not in printed.err
    assert not (tmp_path / "export").exists()


def test_places_that_cannot_be_written_are_refused(run: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "own.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, message in (
        ("full", "exists and is not empty"),
        ("file", "exists and is not empty"),
        ("file/in", "cannot write"),
    ):
        assert command(run, "c3", tmp_path / out) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "own.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_run_that_is_none_is_refused(tmp_path: Path, capsys: Captured) -> None:
    assert command(tmp_path, "0", tmp_path / "export") == 1
    assert "is not a run" in capsys.readouterr().err
    with pytest.raises(fedmerge.UsageError, match="run: got a int; expected a Run or the path of a run folder"):
        fedmerge.export(3, 0, tmp_path / "export")  # type: ignore[arg-type]


def test_a_run_in_memory_has_its_network(tmp_path: Path) -> None:
    run = fedmerge.run(tables(), method="fedavg", **SMALL)
    with pytest.raises(fedmerge.UsageError, match="a Run object, which has its network already"):
        fedmerge.export(run, 0, tmp_path / "export", model="mlp")
    assert len(load_file(fedmerge.export(run, 0, tmp_path / "export").folder / "model.safetensors")) == 4


def test_help_names_every_kind(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(kind in printed for kind in KINDS)


def test_classes_without_training_examples_are_not_the_clients_own(federations: Federations) -> None:
    """What the other tests compare with is told by the record."""
    counts: Any = federations.run("mean").record.class_counts
    assert [k for k, count in enumerate(counts[CLIENT]) if count] == own_classes(federations.run("mean")) == [2, 3, 4]
