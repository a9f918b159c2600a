"""Comparisons: all faults first, then nothing half done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedmerge.core.errors import UsageError
from fedmerge.experiment.comparison import free_folder, plan, run_jobs
from small import TABLE


def test_every_method_runs_on_every_seed() -> None:
    jobs = plan(TABLE, ["fedavg", {"name": "ifca", "num_models": 2, "label": "two"}], [0, 3])
    assert [job.name for job in jobs] == ["fedavg-seed0", "two-seed0", "fedavg-seed3", "two-seed3"]
    assert [job.config.run.seed for job in jobs] == [0, 0, 3, 3]


def test_a_methods_own_training_replaces_entry_by_entry() -> None:
    base = TABLE | {"training": {"epochs": 1, "lr": 0.5}}
    plain, own = plan(base, ["fedavg", {"name": "fedavg", "label": "slow", "training": {"lr": 0.01}}], [0])
    assert (plain.config.training.lr, plain.config.training.epochs) == (0.5, 1)
    assert (own.config.training.lr, own.config.training.epochs) == (0.01, 1)


@pytest.mark.parametrize(
    ("base", "methods", "seeds", "told"),
    [
        ({}, [], [0], "needs at least one method and one seed"),
        ({}, ["fedavg"], [], "needs at least one method and one seed"),
        ({}, 5, [0], "methods: got 5; expected a list"),
        ({}, "fedavg", [0], "methods: got 'fedavg'; expected a list"),
        ({}, [5], [0], "methods: got"),
        ({}, ["fedavg"], 3, "seeds: got 3; expected a list"),
        ({}, ["fedavg"], ["a"], "seeds: got"),
        ({}, ["fedavg"], [True], "seeds: got"),
        ({}, ["fedavg"], [0, 0], "expected each once"),
        ({}, ["fedavg"], [-1], "run.seed: got -1"),
        ({"method": "ifca"}, ["fedavg"], [0], "method: got one for a comparison"),
        ({"label": "x"}, ["fedavg"], [0], "label: got one for a comparison"),
        ({"training": 5}, [{"name": "fedavg"}], [0], "training: got 5; expected a table"),
        ({}, [{"name": "fedavg", "training": 5}], [0], "training: got 5; expected a table"),
        ({}, ["fedavg", "fedavg"], [0], "two runs are called 'fedavg-seed0'"),
        ({}, ["fedavg", "fedmrge"], [0], "did you mean 'fedmerge'"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(base: Any, methods: Any, seeds: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        plan({**TABLE, **base}, methods, seeds)


def test_faults_of_several_runs_are_told_once_each() -> None:
    with pytest.raises(UsageError) as caught:
        plan(TABLE | {"rounds": 0}, ["fedavg", {"name": "fedavg", "server_lr": -1}], [0, 1])
    assert len(str(caught.value).splitlines()) == 2


def test_a_run_that_cannot_start_stops_the_comparison_before_anything_is_written(tmp_path: Path) -> None:
    jobs = plan(TABLE, ["fedavg", {"name": "ifca", "num_models": 6}], [0])
    with pytest.raises(UsageError, match="at most one model per client"):
        run_jobs(jobs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_one_of_the_runs_is_refused_untouched(tmp_path: Path) -> None:
    jobs = plan(TABLE, ["fedavg", "local"], [0])
    (tmp_path / "local-seed0").mkdir()
    with pytest.raises(UsageError, match=r"already holds local-seed0; nothing was overwritten"):
        run_jobs(jobs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["local-seed0"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match="cannot write"):
            run_jobs(plan(TABLE, ["fedavg"], [0]), out)


def test_progress_is_told_for_every_run_and_round(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    run_jobs(plan(TABLE, ["fedavg", "local"], [0]), tmp_path, report=lambda name, done: told.append((name, done)))
    assert told == [(name, done) for name in ("fedavg-seed0", "local-seed0") for done in (0, 1, 2)]


def test_a_free_folder_is_numbered(tmp_path: Path) -> None:
    assert free_folder(tmp_path, "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert free_folder(tmp_path, "run") == tmp_path / "run-3"
