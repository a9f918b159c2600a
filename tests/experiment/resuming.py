"""Runs that are stopped and go on, and what they must leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmerge.data import FederatedData
from fedmerge.experiment.config import Config, build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.record import read_run
from fedmerge.experiment.resume import resume_run
from fedmerge.experiment.simulation import rounds
from small import small

ROUNDS = 3


def config_of(method: Any = "fedmerge", **changes: Any) -> Config:
    """A run of three rounds whose numbers move."""
    return build_config(small(method, rounds=ROUNDS, training={"epochs": 1, "lr": 0.3}, **changes))


def left_behind(folder: Path) -> dict[str, Any]:
    """All that a finished run says, without the time that it took."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    record = json.loads((folder / "run.json").read_text())
    for plain in (*lines, record):
        del plain["seconds"]
    tensors = {name: (folder / name).read_bytes() for name in ("models.safetensors", "last.safetensors")}
    return {"rounds": lines, "run": record, "files": sorted(path.name for path in folder.iterdir()), **tensors}


def stopping_after(at: int) -> Callable[..., Iterator[Any]]:
    """The round loop, in which somebody presses Ctrl-C while the round after `at` is computed."""

    def stopped(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for progress, line in rounds(*args, **kwargs):
            yield progress, line
            if line.round == at:
                raise KeyboardInterrupt

    return stopped


def stopped_at(
    folder: Path, config: Config, at: int, monkeypatch: pytest.MonkeyPatch, data: FederatedData | None = None
) -> None:
    """Begins a run, or goes on with it, and stops it after a round."""
    with monkeypatch.context() as patch:
        patch.setattr("fedmerge.experiment.execute.rounds", stopping_after(at))
        patch.setattr("fedmerge.experiment.book._MOST_BEHIND", 1)  # every round has a checkpoint of its own
        with pytest.raises(KeyboardInterrupt):
            _go_on(folder, config, data)
    assert read_run(folder).status == "interrupted"
    assert read_run(folder).rounds[-1].round == at


def _go_on(folder: Path, config: Config, data: FederatedData | None) -> None:
    if folder.exists():
        resume_run(folder)
    else:
        execute_config(config, data=data, folder=folder)


def stopped_everywhere(
    folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch, data: FederatedData | None = None
) -> dict[str, Any]:
    """A run that is stopped after each of its rounds and goes on each time."""
    for at in range(config.run.rounds):
        stopped_at(folder, config, at, monkeypatch, data)
    resume_run(folder)
    return left_behind(folder)
