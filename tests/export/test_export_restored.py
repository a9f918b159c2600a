"""A run folder gives back each client's own model, to the last bit, for every registered method."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedmerge
from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.ensemble import members
from fedmerge.data import from_arrays
from fedmerge.exporting import trained_of_folder, trained_of_outcome

NEED_EXAMPLES = {"fedala", "fedavg-ft", "fedbabu", "gated-mixture", "ifca", "per-fedavg"}
"""Whose clients make their model from what they received and their own examples."""
SMALL: dict[str, Any] = {"model": {"name": "mlp", "hidden": [6]}, "rounds": 3, "evaluate_every": 1}
CONFIGURED = {
    "source": {"name": "digits"},
    "partition": {"name": "iid", "clients": 4, "train": 20, "validation": 6, "test": 6},
    "model": {"name": "mlp", "hidden": [6]},
    "rounds": 2,
}


def tables() -> Any:
    """Five clients of two groups with five numbers per example."""
    clients = {}
    for i in range(5):
        rng = np.random.default_rng([14, i])
        inputs = rng.normal(size=(30, 5)).astype(np.float32)
        clients[f"c{i}"] = (inputs, ((inputs[:, 0] > 0).astype(int) + (inputs[:, 1] > 0) + i // 3) % 3)
    return replace(from_arrays(clients), groups=(0, 0, 0, 1, 1))


def make_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize("method", list(ALGORITHMS))
def test_run_and_run_folder_have_the_same_models(method: str, tmp_path: Path) -> None:
    table = {"name": method, **({"noise_multiplier": 0} if method == "dp-fedmerge" else {})}  # then it claims nothing
    run = fedmerge.run(tables(), method=table, out=tmp_path / "run", **SMALL)
    live, restored = trained_of_outcome(run.outcome), trained_of_folder(tmp_path / "run")
    if method in NEED_EXAMPLES:
        with pytest.raises(fedmerge.UsageError, match="makes a client's model from its examples"):
            restored.personal(3)
        return
    for client in (0, 3):
        ours, theirs = members(live.personal(client)), members(restored.personal(client))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", ["fedavg", "fedavg-ft", {"name": "ifca", "num_models": 2}])
def test_a_configured_run_finds_its_examples_again(method: Any, tmp_path: Path) -> None:
    run = fedmerge.run_config({**CONFIGURED, "method": method}, out=tmp_path / "run")
    live, restored = trained_of_outcome(run.outcome).personal(2), trained_of_folder(tmp_path / "run").personal(2)
    assert torch.equal(torch.as_tensor(live), torch.as_tensor(restored))


def test_examples_that_changed_are_refused(tmp_path: Path) -> None:
    fedmerge.run_config({**CONFIGURED, "method": "fedavg-ft"}, out=tmp_path / "run")
    text = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(text.replace("train = 20", "train = 21"))
    with pytest.raises(fedmerge.FedmergeError, match="no longer those of the run"):
        trained_of_folder(tmp_path / "run").personal(0)


@pytest.mark.parametrize("keep", [["head"], ["0"]])
def test_parts_that_clients_keep_are_found(keep: list[str], tmp_path: Path) -> None:
    run = fedmerge.run(
        tables(), method="fedmerge", keep=keep, out=tmp_path / "run", **{**SMALL, "model": make_normed()}
    )
    live = trained_of_outcome(run.outcome).personal(3)
    found = trained_of_folder(tmp_path / "run", make_normed).personal(3)
    assert torch.equal(torch.as_tensor(live), torch.as_tensor(found))


@pytest.mark.parametrize("buffers", ["merge", "local", "recalibrate"])
def test_statistics_follow_the_runs_policy(buffers: str, tmp_path: Path) -> None:
    module = make_normed()
    options = {**SMALL, "model": module, "method": "fedavg", "buffers": buffers}
    run = fedmerge.run(tables(), out=tmp_path / "run", **options)
    restored = trained_of_folder(tmp_path / "run", module)
    if buffers == "recalibrate":  # they are measured on the client's examples
        with pytest.raises(fedmerge.UsageError, match="from its examples"):
            restored.personal(3)
        return
    live = torch.as_tensor(trained_of_outcome(run.outcome).personal(3))
    assert torch.equal(live, torch.as_tensor(restored.personal(3)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    fedmerge.run(tables(), method={"name": "fedmerge", "num_models": 2, "search_rounds": 1}, out=folder, **SMALL)
    return folder


def changed_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "models.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "models.safetensors")

    return apply


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / "models.safetensors")
    del tensors["server.method.soup.logits"]
    save_file(tensors, folder / "models.safetensors")


def with_network(hidden: list[int], claimed: int | None = None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        serving = json.loads((folder / "serving.json").read_text())
        serving["model"]["hidden"] = hidden
        (folder / "serving.json").write_text(json.dumps(serving))
        if claimed is not None:
            run = json.loads((folder / "run.json").read_text())
            (folder / "run.json").write_text(json.dumps({**run, "num_params": claimed}))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_network([10**5, 10**5]), "names a network of 10,001,000,003 parameters"),
        (with_network([10**5, 10**5], claimed=2**62), "names a network of 10,001,000,003 parameters"),
        (with_network([10**12]), "names a network of "),
        (with_network([2**62, 2**62]), "could not be made"),
        (lambda folder: (folder / "models.safetensors").write_bytes(b"x"), r"models\.safetensors is damaged"),
        (lambda folder: (folder / "models.safetensors").unlink(), r"models\.safetensors is damaged"),
        (without_tensor, "the saved state has no 'soup.logits'"),
        (changed_tensor("server.method.soup.models", lambda t: t[:, 1:]), "not as long as its network"),
        (changed_tensor("server.method.soup.models", lambda t: t * float("nan")), "is damaged"),
        (changed_tensor("server.method.soup.models", lambda t: t[:1]), "is damaged"),
        (changed_tensor("server.method.soup.logits", lambda t: t[:, :2]), "is damaged"),
        (changed_tensor("server.method.soup.logits", lambda t: t.float()), "expected torch.float64"),
        (changed_tensor("server.method.blocks", lambda t: t.flatten()), "is damaged: models.safetensors"),
        (changed_tensor("server.method.blocks", lambda t: t[:, :1]), "is damaged: models.safetensors"),
        (lambda folder: (folder / "serving.json").unlink(), "has no serving.json"),
        (lambda folder: (folder / "run.json").unlink(), "is not a run"),
    ],
)
def test_damage_is_named_in_one_line(saved: Path, tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(saved, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(fedmerge.FedmergeError, match=message) as caught:
        trained_of_folder(tmp_path / "run").personal(3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:0], r"client\.2\.0 is float32 \[0\]; expected float32 \[57\]"),
        (lambda t: torch.cat([t, t]), r"client\.2\.0 is float32 \[114\]"),
        (lambda t: t[None], r"client\.2\.0 is float32 \[1, 57\]"),
        (lambda t: t.double(), r"client\.2\.0 is float64 \[57\]; expected float32"),
        (None, r"it has no client\.2\.0"),
    ],
)
def test_what_a_client_kept_must_have_the_form_of_its_own(tmp_path: Path, change: Any, message: str) -> None:
    fedmerge.run(tables(), method="ditto", out=tmp_path / "run", **SMALL)
    path = tmp_path / "run" / "models.safetensors"
    tensors = load_file(path)
    if change is None:
        del tensors["client.2.0"]
    else:
        tensors["client.2.0"] = change(tensors["client.2.0"]).contiguous()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(fedmerge.FedmergeError, match=message):
        trained_of_folder(tmp_path / "run").personal(2)


def test_a_run_that_was_interrupted_is_refused(tmp_path: Path) -> None:
    def stop(record: Any) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedmerge.run(tables(), out=tmp_path / "run", watch=stop, **SMALL)
    with pytest.raises(fedmerge.FedmergeError, match="this run is interrupted; give a finished one"):
        trained_of_folder(tmp_path / "run")


def test_another_network_is_refused(saved: Path) -> None:
    with pytest.raises(fedmerge.UsageError, match="got a Sequential of 82 parameters; the run's network has 57"):
        trained_of_folder(saved, make_normed)
