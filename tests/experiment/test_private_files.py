"""What tells of single clients stands in files that only their owner may read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmerge.cli import main
from fedmerge.experiment.config import build_config
from fedmerge.experiment.execute import execute_config
from small import WORDS, small

PRIVATE = {
    "run.json",
    "rounds.jsonl",
    "models.safetensors",
    "last.safetensors",
    "partition.json",
    "partition.svg",
}


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """Nothing is kept from others but by the program itself."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_files_that_tell_of_clients_are_their_owners(tmp_path: Path) -> None:
    execute_config(build_config(small()), folder=tmp_path / "run")
    found = modes(tmp_path / "run")
    assert {name for name, mode in found.items() if mode == 0o600} == PRIVATE
    assert {name for name, mode in found.items() if mode == 0o666} == {"config.toml", "serving.json"}


def test_they_are_so_while_the_run_goes(tmp_path: Path) -> None:
    seen: list[dict[str, int]] = []
    config = build_config(small(rounds=3))
    execute_config(config, folder=tmp_path / "run", watch=lambda _: seen.append(modes(tmp_path / "run")))
    assert len(seen) == 4
    for found in seen:
        there = PRIVATE & set(found)
        assert {"run.json", "rounds.jsonl"} <= there
        assert {found[name] for name in there} == {0o600}


def test_the_page_of_a_run_is_its_owners_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "fedavg", *WORDS, "--quiet", "--out", str(tmp_path / "run")]) == 0
    assert modes(tmp_path / "run")["report.html"] == 0o600
