"""Small networks leave as ONNX and as plain tensors, and give the same outputs elsewhere."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from federations import inside, snippet_of
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file
from test_export_restored import SMALL, make_normed, tables
from torch import Tensor, nn

import fedmerge
from fedmerge.data import from_arrays
from fedmerge.exporting import small
from fedmerge.models import NETWORKS

NETWORK_OPTIONS: dict[str, dict[str, Any]] = {"mlp": {"hidden": [6]}, "cnn": {}, "resnet9": {"channels": [4, 6, 6, 8]}}


def pictures(shape: tuple[int, int, int]) -> Any:
    """Three clients with images of bytes."""
    clients = {}
    for i in range(3):
        rng = np.random.default_rng([15, i])
        labels = rng.integers(3, size=16)
        clients[f"camera {i}"] = (rng.integers(256, size=(16, *shape)).astype(np.uint8), labels)
    return from_arrays(clients, validation=0.0)


def trained(network: str) -> fedmerge.Run:
    shape = (3, 32, 32) if network == "resnet9" else (1, 28, 28)
    model = {"name": network, **NETWORK_OPTIONS[network]}
    return fedmerge.run(pictures(shape), model=model, method="fedper", rounds=1, training={"lr": 0.05})


def raw_inputs(run: fedmerge.Run, count: int = 5) -> tuple[np.ndarray[Any, Any], Tensor]:
    """Unseen raw inputs, and as the run scales them."""
    form = run.outcome.setup.data.form
    assert form is not None
    rng = np.random.default_rng(16)
    raw = rng.integers(256, size=(count, *form.shape)).astype(np.uint8) if form.dtype == "uint8" else None
    raw = rng.normal(size=(count, *form.shape)).astype(np.float32) if raw is None else raw
    return raw, form.scaled(raw)


@torch.no_grad()
def outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    found: Tensor = module(inputs)
    return found


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("network", NETWORK_OPTIONS)
def test_onnx_gives_the_clients_outputs_for_any_batch(network: str, count: int, tmp_path: Path) -> None:
    run = trained(network)
    found = fedmerge.export(run, 1, tmp_path / "export", kind="onnx")
    assert found.files == ("README.md", "inputs.json", "model.onnx")
    _, inputs = raw_inputs(run, count)
    (made,) = ReferenceEvaluator(str(found.folder / "model.onnx")).run(None, {"inputs": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(made), outputs(run.client_model(1), inputs), rtol=1e-5, atol=1e-5)
    assert found.difference is not None
    assert found.difference <= 1e-5 * max(1.0, float(torch.from_numpy(made).abs().max()))


def test_raw_inputs_are_scaled_as_the_card_says(tmp_path: Path) -> None:
    run = trained("mlp")
    folder = fedmerge.export(run, 1, tmp_path / "export", kind="onnx").folder
    raw, inputs = raw_inputs(run)
    plain = json.loads((folder / "inputs.json").read_text())
    scaled = (raw.astype(np.float32) - np.array(plain["mean"], np.float32)) / np.array(plain["std"], np.float32)
    np.testing.assert_allclose(scaled, inputs.numpy(), rtol=0, atol=1e-6)
    assert plain["dtype"] == "uint8"
    assert "`(x - mean) / std` with `mean` and `std` of `inputs.json`" in (folder / "README.md").read_text()


@pytest.mark.parametrize("network", NETWORK_OPTIONS)
def test_the_cards_code_runs_the_onnx_file(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ONNX's reference in place of onnxruntime, which has the same interface."""
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=ReferenceEvaluator))  # type: ignore[arg-type]
    run = trained(network)
    folder = fedmerge.export(run, 1, tmp_path / "export", kind="onnx").folder
    raw, inputs = raw_inputs(run)
    with inside(folder):
        made = torch.from_numpy(snippet_of(folder)["outputs"](raw))
    torch.testing.assert_close(made, outputs(run.client_model(1), inputs), rtol=1e-5, atol=1e-5)


def test_a_network_of_ones_own_is_exported_from_its_folder(tmp_path: Path) -> None:
    run = fedmerge.run(tables(), method="fedmerge", out=tmp_path / "run", **{**SMALL, "model": make_normed})
    _, inputs = raw_inputs(run)
    with pytest.raises(fedmerge.UsageError, match="its network is of your own and not in the folder"):
        fedmerge.export(tmp_path / "run", "c3", tmp_path / "export")
    for kind in ("onnx", "torch"):
        fedmerge.export(tmp_path / "run", "c3", tmp_path / kind, kind=kind, model=make_normed)
    (made,) = ReferenceEvaluator(str(tmp_path / "onnx" / "model.onnx")).run(None, {"inputs": inputs.numpy()})
    wanted = outputs(run.client_model("c3"), inputs)
    torch.testing.assert_close(torch.from_numpy(made), wanted, rtol=1e-5, atol=1e-5)
    network = make_normed().eval()
    network.load_state_dict(load_file(tmp_path / "torch" / "model.safetensors"))
    assert torch.equal(outputs(network, inputs), wanted)
    assert (
        "network = ...  # the Sequential that the run was made with" in (tmp_path / "torch" / "README.md").read_text()
    )


def test_a_client_that_uses_several_networks_has_them_all_in_one_onnx_file(tmp_path: Path) -> None:
    run = fedmerge.run(tables(), method={"name": "fedem", "num_models": 2}, **SMALL)
    folder = fedmerge.export(run, 3, tmp_path / "export", kind="onnx").folder
    _, inputs = raw_inputs(run)
    (made,) = ReferenceEvaluator(str(folder / "model.onnx")).run(None, {"inputs": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(made), outputs(run.client_model(3), inputs), rtol=1e-5, atol=1e-5)
    with pytest.raises(fedmerge.UsageError, match="use several networks at once"):
        fedmerge.export(run, 3, tmp_path / "tensors", kind="torch")


@pytest.mark.parametrize("network", NETWORK_OPTIONS)
def test_the_cards_code_loads_the_tensors(network: str, tmp_path: Path) -> None:
    run = trained(network)
    found = fedmerge.export(run, "camera 2", tmp_path / "export")
    assert found.kind == "torch"
    assert found.files == ("README.md", "inputs.json", "model.safetensors")
    _, inputs = raw_inputs(run)
    assert torch.equal(outputs(snippet_of(found.folder)["network"], inputs), outputs(run.client_model(2), inputs))
    assert NETWORKS[network].name in (found.folder / "README.md").read_text()


class Branching(nn.Module):
    """Looks at the values to choose its way, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        return outputs if float(inputs.sum()) > 0 else -outputs


def test_a_network_that_cannot_be_traced_is_refused_in_one_line(tmp_path: Path) -> None:
    run = fedmerge.run(tables(), method="fedavg", **{**SMALL, "model": Branching})
    with pytest.raises(fedmerge.UsageError, match="Branching cannot be exported to ONNX: ") as caught:
        fedmerge.export(run, 0, tmp_path / "export", kind="onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


CALLS = itertools.count()


class Growing(nn.Module):
    """Adds how often it was called, which a graph keeps as it was at the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs) + float(next(CALLS))
        return outputs


def test_a_file_that_gives_other_outputs_is_refused(tmp_path: Path) -> None:
    run = fedmerge.run(tables(), method="fedavg", runtime="sequential", **{**SMALL, "model": Growing})
    with pytest.raises(fedmerge.FedmergeError, match="gives other outputs than the network"):
        fedmerge.export(run, 0, tmp_path / "export", kind="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fedmerge.run(tables(), method="fedavg", **SMALL)
    found = small.importlib.util.find_spec
    monkeypatch.setattr(small.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(fedmerge.FedmergeError) as caught:
        fedmerge.export(run, 0, tmp_path / "export", kind="onnx")
    wanted = "kind 'onnx' needs onnxscript, which is not installed: pip install \"fedmerge[onnx]\""
    assert str(caught.value) == wanted
