"""Run folders: written whole, read back equal, and damage is named with its place."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.experiment.book import new_run_folder
from fedmerge.experiment.config import build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.record import (
    RoundRecord,
    RunRecord,
    Scores,
    append_rounds,
    read_run,
    select,
    to_plain,
    write_atomically,
    write_run,
)
from small import small

RUN = RunRecord(
    label="a",
    method="fedavg",
    options={"server_lr": 1.0, "training": {"lr": 0.1}},
    seed=0,
    status="finished",
    client_names=("x", "y"),
    groups=(0, 1),
    num_train=(3, 4),
    num_validation=(1, 0),
    num_test=(1, 1),
    class_names=("0", "1"),
    num_params=5,
    setting="toy",
    data_sha256="00",
    versions={"fedmerge": "0"},
    finetuned=Scores((1.0, 0.5), (0.1, 0.2)),
)
ROUND = RoundRecord(
    round=1,
    cohort=(0, 1),
    seconds=0.5,
    bytes_down=40,
    bytes_up=40,
    forward=7,
    backward=7,
    state={"num_models": 2},
    mixing=((0.5, 0.5), (0.25, 0.75)),
    validation=Scores((1.0, None), (0.3, None)),
    test=Scores((0.0, 1.0), (0.7, 0.1)),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path, RUN)
    for number in (0, 1, 2):
        append_rounds(tmp_path, (dataclasses.replace(ROUND, round=number),))
    return tmp_path


def test_a_run_is_read_as_it_was_written(folder: Path) -> None:
    rounds = tuple(dataclasses.replace(ROUND, round=number) for number in (0, 1, 2))
    assert read_run(folder) == dataclasses.replace(RUN, rounds=rounds)


def test_a_real_run_is_read_as_it_was_returned(tmp_path: Path) -> None:
    config = build_config(small("fedmerge", finetune_epochs=1))
    record = execute_config(config, folder=tmp_path / "run").record
    assert to_plain(read_run(tmp_path / "run")) == to_plain(record)


def test_a_run_without_rounds_can_be_read(tmp_path: Path) -> None:
    write_run(tmp_path, RUN)
    assert read_run(tmp_path) == RUN
    with pytest.raises(FedmergeError, match="has no evaluated round yet"):
        read_run(tmp_path).last()


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 400))
def test_a_line_torn_anywhere_costs_that_round_alone(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("torn")
    write_run(folder, RUN)
    append_rounds(folder, (ROUND,))
    whole = (folder / "rounds.jsonl").read_bytes()
    line = whole.rstrip(b"\n")
    (folder / "rounds.jsonl").write_bytes(whole + line[: min(cut, len(line) - 1)])
    assert read_run(folder).rounds == (ROUND,)


@pytest.mark.parametrize("damage", [b"{", b"[]", b"5", b'"text"', b"\xff", b'{"round": 1', b"[" * 5000])
def test_a_damaged_line_in_the_middle_is_named(folder: Path, damage: bytes) -> None:
    path = folder / "rounds.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(FedmergeError, match=r"rounds\.jsonl, line 2 is damaged"):
        read_run(folder)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("round", "one", r"line 2\.round: got 'one'; expected a whole number"),
        ("cohort", 5, r"line 2\.cohort: got 5"),
        ("test", {"accuracy": "high", "loss": []}, r"line 2: test\.accuracy: got 'high'"),
        ("test", 7, r"line 2\.test: got 7"),
        ("extra", 1, r"line 2: unknown option 'extra'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_file_and_line(
    folder: Path, key: str, value: object, told: str
) -> None:
    path = folder / "rounds.jsonl"
    lines = path.read_text().split("\n")
    lines[1] = json.dumps({**json.loads(lines[1]), key: value})
    path.write_text("\n".join(lines))
    with pytest.raises(FedmergeError, match=r"rounds\.jsonl, " + told):
        read_run(folder)


@pytest.mark.parametrize("damage", [b"", b"null", b"[]", b"3", b"{", b"\xff", b"[" * 5000])
def test_a_damaged_run_file_is_named(folder: Path, damage: bytes) -> None:
    (folder / "run.json").write_bytes(damage)
    with pytest.raises(FedmergeError, match=r"run\.json is damaged"):
        read_run(folder)


def test_a_run_file_with_wrong_values_names_them_all(folder: Path) -> None:
    plain = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**plain, "seed": "x", "status": "done"}))
    with pytest.raises(FedmergeError) as caught:
        read_run(folder)
    assert str(caught.value).count("run.json.") == 2


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedmergeError, match=r"is not a run: it has no run\.json"):
        read_run(tmp_path)


# ------------------------------------------------------------------------------------------------ writing


def test_writing_over_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "page", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_a_run_folder_with_anything_in_it_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty; nothing was overwritten"), new_run_folder(tmp_path):
        pass
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.txt", "mine")]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    with new_run_folder(tmp_path):
        pass
    with new_run_folder(tmp_path / "deep" / "er"):
        pass
    assert (tmp_path / "deep" / "er").is_dir()


@pytest.mark.parametrize("below", ["file/run", "file", "x" * 300, "nul\0l"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write run folder"), new_run_folder(tmp_path / below):
        pass


# ------------------------------------------------------------------------------------------------ selection


def with_scores(validation: list[float | None], test: list[float]) -> RunRecord:
    """A run of one client with an accuracy per round."""
    rounds = tuple(
        dataclasses.replace(ROUND, round=i, validation=Scores((v,), (0.0,)), test=Scores((t,), (0.0,)))
        for i, (v, t) in enumerate(zip(validation, test, strict=True))
    )
    return dataclasses.replace(RUN, rounds=rounds)


accuracies = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6)


@settings(deadline=None, derandomize=True)
@given(accuracies, st.data())
def test_the_selected_round_does_not_depend_on_test_scores(validation: list[float], data: st.DataObject) -> None:
    test = data.draw(st.lists(st.floats(0, 1), min_size=len(validation), max_size=len(validation)))
    shuffled = data.draw(st.permutations(test))
    assert with_scores(validation, test).selected().round == with_scores(validation, shuffled).selected().round


@settings(deadline=None, derandomize=True)
@given(accuracies)
def test_the_selected_round_is_the_earliest_with_the_best_validation(validation: list[float]) -> None:
    assert with_scores(validation, [0.0] * len(validation)).selected().round == validation.index(max(validation))


def test_without_validation_items_the_last_round_is_selected() -> None:
    assert with_scores([None, None], [1.0, 0.0]).selected().round == 1


def test_clients_without_items_do_not_count_in_the_mean() -> None:
    assert Scores((1.0, None, 0.5), (0.0, None, 0.0)).mean_accuracy() == (1.0 + 0.5) / 2
    assert math.isnan(Scores((None,), (None,)).mean_accuracy())


@given(st.lists(st.one_of(st.none(), st.sampled_from([0.1, 0.5, 0.9])), min_size=1, max_size=8))
def test_selecting_as_rounds_come_in_selects_the_same_round_as_looking_back(accuracies: list[float | None]) -> None:
    lines = [
        RoundRecord(n, (0,), 0.0, 0, 0, 0, 0, {}, None, Scores((value,), (value,)), Scores((0.5,), (0.5,)))
        for n, value in enumerate(accuracies)
    ]
    best = lines[0]
    for line in lines[1:]:
        best = select((best, line))
    assert best is select(lines)
