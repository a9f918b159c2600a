"""Merging weights leave a run on request only, and then in files that only their owner may read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from federations import CLIENT, Federations
from safetensors.torch import load_file
from test_export_restored import SMALL, tables

import fedmerge
from fedmerge.cli import main

TWO_MODELS = {"name": "fedmerge", "num_models": 2, "search_rounds": 1}


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """Nothing is kept from others but by the program itself."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): mode(path) for path in folder.rglob("*") if path.is_file()}


def row_of(run: fedmerge.Run, client: int) -> list[float]:
    mixing = run.mixing()
    assert mixing is not None
    row: list[float] = mixing[client].tolist()
    assert min(row) > 0.01  # else its digits say nothing
    return row


def telling_files(folder: Path, row: list[float]) -> set[str]:
    """Files that hold the row: its digits as text, or its numbers in a tensor or in their binary forms."""
    digits = {f"{a:.{n}f}" for a in row for n in (3, 4, 6)} | {repr(a) for a in row}
    found = set()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        binary = any(np.array(row, dtype=kind).tobytes() in content for kind in (np.float32, np.float64))
        words = re.findall(r"\d+\.\d+", content.decode("utf-8", "ignore"))
        if binary or digits & set(words) or (path.suffix == ".safetensors" and _holds(path, row)):
            found.add(path.relative_to(folder).as_posix())
    return found


def _holds(path: Path, row: list[float]) -> bool:
    return any(t.numel() == len(row) and np.allclose(t.flatten(), row, atol=1e-4) for t in load_file(path).values())


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_networks_are_exported_without_the_row(tmp_path: Path, kind: str) -> None:
    run = fedmerge.run(tables(), method=TWO_MODELS, **SMALL)
    found = fedmerge.export(run, 3, tmp_path / "export", kind=kind)
    assert found.private == ()
    assert telling_files(tmp_path / "export", row_of(run, 3)) == set()
    assert set(modes(tmp_path / "export").values()) == {0o666}


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_pretrained_models_are_exported_without_the_row(federations: Federations, tmp_path: Path, kind: str) -> None:
    run = federations.run("mean")
    found = fedmerge.export(run, CLIENT, tmp_path / "export", kind=kind)
    assert found.private == ()
    assert telling_files(tmp_path / "export", row_of(run, CLIENT)) == set()


def test_a_card_with_the_row_is_its_owners(tmp_path: Path) -> None:
    run = fedmerge.run(tables(), method=TWO_MODELS, **SMALL)
    found = fedmerge.export(run, 3, tmp_path / "export", row=True)
    assert found.private == ("README.md",)
    assert telling_files(tmp_path / "export", row_of(run, 3)) == {"README.md"}
    assert {name for name, bits in modes(tmp_path / "export").items() if bits == 0o600} == {"README.md"}
    assert "this file is not for publication" in (tmp_path / "export" / "README.md").read_text()


def test_without_merging_weights_there_is_nothing_to_tell(tmp_path: Path) -> None:
    run = fedmerge.run(tables(), method="fedavg", **SMALL)
    found = fedmerge.export(run, 3, tmp_path / "export", row=True)
    assert found.private == ()
    assert mode(tmp_path / "export" / "README.md") == 0o666


def test_a_recipe_is_its_owners_and_card_and_command_say_so(
    federations: Federations, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "export"
    words = ["export", str(federations.folder("frozen A")), str(CLIENT), "--out", str(place), "--as", "mergekit"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "private     recipe.yaml holds the client's merging weights: only its owner may read it" in printed
    assert telling_files(place, row_of(federations.run("frozen A"), CLIENT)) == {"recipe.yaml"}
    assert {name for name, bits in modes(place).items() if bits == 0o600} == {"recipe.yaml"}
    card = (place / "README.md").read_text()
    assert "`recipe.yaml` holds this client's merging weights, which say whom it is like" in card
    assert "Only its owner may read the recipe." in card


def test_a_new_clients_weights_and_neighbours_are_its_owners(tmp_path: Path) -> None:
    run = fedmerge.run(tables(), method=TWO_MODELS, **SMALL)
    newcomer = run.outcome.setup.data.clients[0].train
    folder = fedmerge.onboard(run, newcomer, way="weights").save(tmp_path / "new")
    assert {name for name, bits in modes(folder).items() if bits == 0o600} == {"README.md", "onboard.json"}
    assert "only their owner may read them" in " ".join((folder / "README.md").read_text().split())
