"""Saved runs as hostile input: every value has to fit the others, and every fault is told with its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmerge.core.errors import FedmergeError
from fedmerge.experiment.config import build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.record import read_run, rounds_from, run_from
from fedmerge.experiment.serving import read_serving, serving_from
from small import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five clients."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    execute_config(build_config(small("fedmerge", finetune_epochs=1)), folder=folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"client_names": []}, "client_names: got none; expected at least one"),
        ({"client_names": ["a"] * 5}, "client_names: got ('a', 'a', 'a', 'a', 'a'); expected each name once"),
        ({"num_train": [1, 2]}, "num_train: got 2 entries; expected 5, one for each client"),
        ({"num_test": [1, 2, 3, 4, -5]}, "num_test: got (1, 2, 3, 4, -5); expected whole numbers >= 0"),
        ({"groups": [0, 0, 0, 0, -1]}, "groups: got (0, 0, 0, 0, -1)"),
        ({"tasks": ["a"]}, "tasks: got 1 entries"),
        ({"class_counts": [[1]] * 5}, "class_counts: got (1,); expected 10 whole numbers >= 0 for each client"),
        ({"seed": -1}, "seed: got -1; expected a number >= 0"),
        ({"num_params": 2**63}, "num_params: got 9223372036854775808; expected a whole number"),
        ({"seconds": -0.5}, "seconds: got -0.5"),
        ({"status": "done"}, "status: got 'done'; expected one of"),
        ({"options": {"gate": "x"}}, "options.gate: got 'x'; expected a number"),
        ({"options": {"training": 5}}, "options.training: got 5; expected a table"),
        ({"samples": [{"client": 5}]}, "samples: got {'client': 5}; expected texts"),
        ({"finetuned": {"accuracy": [2, 0, 0, 0, 0], "loss": [0] * 5}}, "finetuned.accuracy: got (2.0, 0.0"),
        ({"finetuned": {"accuracy": [1], "loss": [0] * 5}}, "finetuned.accuracy: got 1 entries"),
        ({"finetuned": {"accuracy": [1] * 5}}, "finetuned.loss: missing"),
        ({"labl": "x"}, "unknown option 'labl'; did you mean 'label'?"),
    ],
)
def test_a_value_of_a_run_that_no_run_writes_is_told_by_its_key(folder: Path, changes: Any, told: str) -> None:
    plain = json.loads((folder / "run.json").read_text())
    run_from(json.dumps(plain).encode(), "run.json")
    with pytest.raises(FedmergeError) as caught:
        run_from(json.dumps({**plain, **changes}).encode(), "run.json")
    assert str(caught.value).startswith("run.json")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cohort": [0, 5]}, "cohort: got (0, 5); expected clients 0..4"),
        ({"round": -1}, "round: got -1"),
        ({"bytes_up": -8}, "bytes_up: got -8"),
        ({"mixing": []}, "mixing: got (); expected 5 rows"),
        ({"mixing": [[1.0], [0.5, 0.5], [1.0], [1.0], [1.0]]}, "expected 5 rows with one number for each model"),
        ({"mixing": [[-0.5, 1.5]] * 5}, "expected numbers 0..1e+06"),
        ({"test": {"accuracy": [0.5] * 4, "loss": [1.0] * 4}}, "test.accuracy: got 4 entries; expected 5"),
        ({"validation": {"accuracy": [-0.1] * 5, "loss": [1.0] * 5}}, "expected shares 0..1, or null"),
        ({"state": {"gate": "high"}}, "state.gate: got 'high'; expected a number"),
    ],
)
def test_a_value_of_a_round_that_no_run_writes_is_told_by_its_key(folder: Path, changes: Any, told: str) -> None:
    plain = json.loads((folder / "rounds.jsonl").read_bytes().splitlines()[1])
    line = json.dumps({**plain, **changes}).encode() + b"\n"
    with pytest.raises(FedmergeError) as caught:
        tuple(rounds_from([b"\n", line], 5, "rounds.jsonl"))
    assert str(caught.value).startswith("rounds.jsonl, line 2")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        b'{"round": 1, "round": 2}\n',
        b'{"round": NaN}\n',
        b'{"round": 1e999}\n',
        b'["\\ud800"]\n',
        b'{"state": {"num_models": 1' + b"0" * 400 + b"}}\n",
        b"[" * 10**5 + b"\n",
    ],
)
def test_a_line_with_no_meaning_or_two_is_damaged(line: bytes) -> None:
    with pytest.raises(FedmergeError, match="line 1 is damaged"):
        tuple(rounds_from([line], 5, "rounds.jsonl"))


def test_a_run_file_larger_than_any_is_not_read(folder: Path, tmp_path: Path) -> None:
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(10**12)  # a sparse file
    with pytest.raises(FedmergeError, match=r"run\.json is damaged: it has 1,000,000,000,000 bytes"):
        read_run(tmp_path)
    (tmp_path / "serving.json").write_bytes(b"")
    with pytest.raises(FedmergeError, match=r"serving\.json is damaged"):
        read_serving(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"lr": -1}}, "training.lr: got -1; expected a number > 0"),
        ({"run": {"rounds": "x"}}, "run.rounds: got 'x'"),
        ({"run": []}, "run: got []; expected a table"),
        ({"model": {"name": "mpl"}}, "unknown model 'mpl'; did you mean 'mlp'?"),
        ({"model": "mlp"}, "model: got 'mlp'; expected a table"),
        ({"inputs": {"shape": [10**9, 10**9]}}, "got shape [1000000000, 1000000000]"),
        ({"frozen_draw": 5}, "frozen_draw: got 5; expected a text"),
        ({"frozn_draw": "00"}, "unknown key 'frozn_draw'; did you mean 'frozen_draw'?"),
    ],
)
def test_a_value_of_serving_that_no_run_writes_is_told_by_its_key(folder: Path, changes: Any, told: str) -> None:
    plain = json.loads((folder / "serving.json").read_text())
    assert serving_from(json.dumps(plain).encode()).model == plain["model"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what it says is compared below
        serving_from(json.dumps({**plain, **changes}).encode())
    assert told in str(caught.value)


@pytest.mark.parametrize("key", ["model", "training", "run", "inputs"])
def test_a_missing_part_of_serving_is_named(folder: Path, key: str) -> None:
    plain = json.loads((folder / "serving.json").read_text())
    del plain[key]
    with pytest.raises(ValueError, match=f"it has no {key}"):
        serving_from(json.dumps(plain).encode())
