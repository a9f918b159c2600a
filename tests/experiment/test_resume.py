"""A run that was stopped goes on and ends with the bits of one that was not."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from resuming import ROUNDS, config_of, left_behind, stopped_at, stopped_everywhere
from torch import nn

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import UsageError
from fedmerge.data import FederatedData
from fedmerge.experiment.book import Book
from fedmerge.experiment.checkpoint import tensor_bytes
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.execute import execute, execute_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import RoundRecord, read_run
from fedmerge.experiment.resume import resume_run
from fedmerge.experiment.simulation import prepare, rounds
from fedmerge.training import LocalTraining

CNN = {"name": "cnn", "channels": [4], "norm": "batch"}


@pytest.fixture(scope="module", autouse=True)
def _one_forecast_for_equal_runs() -> Iterator[None]:
    """Epsilon takes seconds, and a run that goes on asks for that of the same run again."""
    forecasts = importlib.import_module("fedmerge.privacy.forecast")  # the name is that of a function too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecasts, "epsilon", cache(forecasts.epsilon))
        yield


@pytest.fixture(scope="module")
def data() -> FederatedData:
    config = config_of()
    return load_data(config.source, config.partition, 0, config.model)


METHODS: dict[str, Any] = {name: {"name": name} for name in ALGORITHMS} | {
    "fesem": {"name": "fesem", "num_models": 2},
    "ifca": {"name": "ifca", "num_models": 2},
    "fedmerge": {"name": "fedmerge", "num_models": 2, "initial": "noise"},
    "cfl": {"name": "cfl", "warmup": 1, "min_size": 1, "stationary": 1.0},
    "flhc": {"name": "flhc", "warmup": 1},
    "dp-fedmerge": {"name": "dp-fedmerge", "num_models": 2, "sampling_rate": 0.8, "force": True},
}
NEEDED = {
    "dp-fedmerge": {
        "fraction": 0.8,
        "participation": {"sampling": "poisson", "dropout": 0.3, "quorum": 0.0},
        "defences": {"clip": 0.0, "max_count": 0.0},
        "select": "last",
    }
}
"""Without which a method refuses a run."""
SOME_STAY_AWAY = {"fraction": 0.8, "participation": {"dropout": 0.3, "quorum": 0.0}}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_stopped_after_every_round_is_never_stopped(
    method: dict[str, Any], tmp_path: Path, data: FederatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(method, **{**SOME_STAY_AWAY, **NEEDED.get(method["name"], {})})
    execute_config(config, data=data, folder=tmp_path / "whole")
    assert stopped_everywhere(tmp_path / "cut", config, monkeypatch, data) == left_behind(tmp_path / "whole")


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "every third round": ("fedmerge", {"checkpoint_every": 3}),
    "heads stay at home": ("fedmerge", {"keep": ["head"]}),
    "heads stay at home, some clients too": ("scaffold", {"keep": ["head"], **SOME_STAY_AWAY}),
    "statistics stay at home": ("fedavg", {"model": CNN, "buffers": "local", **SOME_STAY_AWAY}),
    "statistics are averaged": ("fedmerge", {"model": CNN, "buffers": "merge"}),
    "statistics are taken anew": ("fedavg", {"model": CNN, "buffers": "recalibrate"}),
    "evaluated rarely": ("fedavg", {"evaluate_every": 3}),
    "the last round counts": ("fedavg", {"select": "last"}),
    "fine-tuned at the end": ("fedavg", {"finetune_epochs": 2}),
    "float64": ("fedmerge", {"precision": "float64"}),
    "all defences": ("fedmerge", {"attack": {"kind": "push", "share": 0.2}}),
    "honest before": ("fedmerge", {"attack": {"kind": "turncoat", "share": 0.2, "turn": 2}}),
    "late clients": ("fedavg", {"participation": {"deadline": 0.12, "spread": 1.0, "jitter": 0.5, "quorum": 0.0}}),
    "one after another": ("fedmerge", {"runtime": "sequential"}),
}


@pytest.mark.parametrize(("method", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_whatever_the_options(
    method: Any, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(method, **changes)
    execute_config(config, folder=tmp_path / "whole")
    assert stopped_everywhere(tmp_path / "cut", config, monkeypatch) == left_behind(tmp_path / "whole")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_round_touches_the_state_before_it(method: dict[str, Any], data: FederatedData) -> None:
    """The states are written down while the next round is computed."""
    config = config_of(method, **NEEDED.get(method["name"], {}))
    setup, start = prepare(config.method, data, config.model, config.training, config.run)
    seen = [(progress, tensor_bytes(progress)) for progress, _ in rounds(setup, start)]
    assert len(seen) == ROUNDS + 1
    assert all(tensor_bytes(progress) == content for progress, content in seen)


def test_only_what_is_left_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(tmp_path / "run", config_of(), 2, monkeypatch)
    announced: list[int] = []
    result = resume_run(tmp_path / "run", watch=lambda line: announced.append(line.round))
    assert announced == [3]
    assert result.record.status == "finished"
    assert [line.round for line in result.record.rounds] == [0, 1, 2, 3]


def test_a_watcher_that_fails_loses_nothing_that_was_announced(tmp_path: Path) -> None:
    announced: list[int] = []

    def watch(line: RoundRecord) -> None:
        announced.append(line.round)
        if line.round == 1 and len(announced) == 2:
            raise RuntimeError("the screen is gone")

    with pytest.raises(RuntimeError, match="the screen is gone"):
        execute_config(config_of(), folder=tmp_path / "run", watch=watch)
    assert read_run(tmp_path / "run").status == "failed"
    resume_run(tmp_path / "run", watch=watch)
    assert announced[:2] == [0, 1]
    assert announced[2:] == list(range(announced[2], ROUNDS + 1))
    assert announced[2] >= 2
    execute_config(config_of(), folder=tmp_path / "whole")
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")


def test_a_round_that_never_reached_the_book_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the end of a round and its handing in."""
    note = Book.note

    def interrupted(book: Book, line: RoundRecord, *rest: Any) -> None:
        if line.round == 2:
            raise KeyboardInterrupt
        note(book, line, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Book, "note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            execute_config(config_of(), folder=tmp_path / "run")
    resume_run(tmp_path / "run")
    execute_config(config_of(), folder=tmp_path / "whole")
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")


# ---------------------------------------------------------------- a user's own clients and networks


def own_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))


def test_own_clients_and_networks_are_given_again(
    tmp_path: Path, data: FederatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, options = ALGORITHMS["fedmerge"].cls(num_models=2), RunOptions(rounds=3, evaluate_every=1)
    asked: Any = (method, data, own_network, LocalTraining(epochs=1), options)
    execute(*asked, label="own", folder=tmp_path / "whole")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Book, "note", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            execute(*asked, label="own", folder=folder)
    with pytest.raises(UsageError, match="clients of your own; give them again"):
        resume_run(folder)
    with pytest.raises(UsageError, match="network of your own; give it again"):
        resume_run(folder, data=data)
    resume_run(folder, data=data, model=own_network)
    assert left_behind(folder) == left_behind(tmp_path / "whole")


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_network_with_other_weights_is_refused(tmp_path: Path, data: FederatedData) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(
            ALGORITHMS["fedavg"].cls(), data, own_network, LocalTraining(epochs=1), RunOptions(rounds=9),
            label="own", folder=tmp_path / "run", watch=_interrupted,
        )  # fmt: skip

    def other() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 10))

    with pytest.raises(UsageError, match="another configuration than is asked for now"):
        resume_run(tmp_path / "run", data=data, model=other)
