"""Real processes: what is recorded is what a run gives, and a kill loses nothing that was finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
from small_suite import PARTITION, suite, table

from fedmerge.bench.plan import Planner
from fedmerge.bench.result import is_divergence
from fedmerge.bench.runner import run_suite
from fedmerge.bench.store import RUNS, read_results
from fedmerge.bench.tuning import Trial
from fedmerge.bench.workers import _made
from fedmerge.core.errors import DataError, DivergedError, FedmergeError
from fedmerge.experiment.config import build_config
from fedmerge.experiment.execute import execute_config


def long_suite() -> dict[str, object]:
    """Twelve runs that take a while each, so that a kill meets some of them in flight."""
    settings = {"turned": {"partition": PARTITION, "groups": 2, "rounds": 60}}
    methods = {"fedavg": {"name": "fedavg"}, "local": {"name": "local"}, "oracle": {"name": "oracle"}}
    return table(settings=settings, methods=methods, goals=[], extensions=0, lr=[0.1])


def begun(folder: Path) -> subprocess.Popen[bytes]:
    words = ["bench", "suite.toml", "--out", str(folder), "--jobs", "2"]
    return subprocess.Popen([sys.executable, "-m", "fedmerge.cli", *words], cwd=folder.parent)


def test_kill_9_and_a_restart_lose_no_finished_run(tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_text(tomli_w.dumps(long_suite()))
    folder = tmp_path / "out"
    running, end = begun(folder), time.monotonic() + 120
    try:
        while not (folder / RUNS).exists() or (folder / RUNS).read_bytes().count(b"\n") < 2:
            assert time.monotonic() < end
            assert running.poll() is None
            time.sleep(0.01)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    before = (folder / RUNS).read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 2 <= before.count(b"\n") < 12
    (folder / RUNS).write_bytes(before + b'{"key": "torn')
    assert begun(folder).wait(300) == 0
    after = (folder / RUNS).read_bytes()
    assert after.startswith(before)
    keys = [json.loads(line)["key"] for line in after.splitlines()]
    assert len(keys) == len(set(keys)) == 12
    assert "All 9 reported runs are here." in (folder / "README.md").read_text()
    _is_what_a_run_gives(folder)
    tuning = [result for result in read_results(folder) if result.stage == "tuning"]
    assert [result.test + result.last_test for result in tuning] == [()] * 3  # no choice could look at them
    assert all(result.validation for result in tuning)


def _is_what_a_run_gives(folder: Path) -> None:
    """A line holds the numbers of the same configuration run here."""
    result = next(r for r in read_results(folder) if (r.label, r.seed, r.stage) == ("oracle", 2, "report"))
    planner = Planner(suite(**{k: v for k, v in long_suite().items() if k in ("settings", "methods", "goals")}))
    run = planner.run(planner.suite.settings["turned"], "oracle", 2, Trial(0.1))
    record = execute_config(build_config(run.table)).record
    chosen = record.selected()
    assert chosen.test is not None
    assert result.selected_round == chosen.round
    assert result.test == pytest.approx(chosen.test.accuracy, abs=1e-5)
    assert result.recovery == 1.0  # the oracle's groups are the true ones
    assert result.bytes_down == 4 * record.num_params  # float32
    assert result.options["training"]["lr"] == 0.1


def test_no_time_makes_no_run_and_a_failing_method_does_not_end_the_others(tmp_path: Path) -> None:
    settings = {"turned": {"partition": PARTITION, "groups": 2}}
    methods = {"fedavg": {"name": "fedavg"}, "ifca": {"name": "ifca", "num_models": 5}}  # five models, four clients
    small = suite(settings=settings, methods=methods, goals=[], seeds=[0], lr=[0.1], extensions=0)
    assert run_suite(small, tmp_path, jobs=1, minutes=0).left == 4
    told = []
    outcome = run_suite(small, tmp_path, jobs=1, tell=told.append)
    assert [(r.label, r.seed) for r in read_results(tmp_path)] == [("fedavg", 1000), ("fedavg", 0)]
    assert [failure.run.label for failure in outcome.failures] == ["ifca"]
    assert "got 5 models for 4 clients" in outcome.failures[0].message
    assert outcome.left == 2
    assert told[-1].done == 2
    assert told[-1].minutes_left > 0


def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    methods = {"fedavg": {"name": "fedavg", "training": {"momentum": 0.99}}}
    of = suite(methods=methods, goals=[], ladder=[0.1, 1e30], lr=[1e30])
    planner = Planner(of)
    run = planner.run(of.settings["turned"], "fedavg", 0, Trial(1e30))
    result = _made(run, os.getppid())
    assert result.status == "diverged"
    assert "diverged" in result.message
    assert result.tuning_score() == 0.0
    assert result.method == "fedavg"


def test_only_training_that_left_the_finite_is_divergence() -> None:
    assert is_divergence(DivergedError("their training diverged; lower the learning rate"))
    assert not is_divergence(DataError("their training diverged"))
    assert not is_divergence(FedmergeError("no such thing"))
