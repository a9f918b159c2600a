"""New clients of a federation whose clients keep their output layer: known tasks, new labels, other parts kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import fedmerge
import tiny_models
from fedmerge import UsageError, from_arrays
from fedmerge.data import from_texts
from fedmerge.models.hf import Hf
from fedmerge.onboarding.own_head import fitted_head

DIRECTIONS = np.random.default_rng(3).normal(size=(2, 8))
"""What decides the class: one direction for one half of the sites, another for the other half."""


def rows(count: int, kind: int, seed: int, names: tuple[str, str] = ("no", "yes")) -> tuple[Any, list[str]]:
    x = np.random.default_rng([7, seed]).normal(size=(count, 8)).astype(np.float32)
    return x, [names[int(value > 0)] for value in np.tanh(x @ DIRECTIONS[kind]) * np.sign(x[:, kind])]


def network(num_classes: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, num_classes))


@pytest.fixture(scope="module")
def run() -> fedmerge.Run:
    data = from_arrays({f"site-{i:02d}": rows(120, i % 2, i) for i in range(8)})
    return fedmerge.run(
        data, model=network, keep=["head"], method={"name": "fedmerge", "num_models": 2}, rounds=30, evaluate_every=10,
        training={"lr": 0.2},
    )  # fmt: skip


def accuracy(found: Any, inputs: Any, labels: list[str]) -> float:
    names = found.server.record.class_names
    with torch.no_grad():
        answers = found.module()(torch.from_numpy(inputs)).argmax(dim=1).tolist()
    return float(np.mean([names[k] == label for k, label in zip(answers, labels, strict=True)]))


@pytest.mark.parametrize("kind", [0, 1])
def test_a_new_client_gets_its_group_s_body_and_an_output_layer_of_its_own(run: fedmerge.Run, kind: int) -> None:
    found = fedmerge.onboard(run, rows(60, kind, 50 + kind))
    known = run.mixing()[[i for i in range(8) if i % 2 == kind]].mean(dim=0)
    assert int(found.row.argmax()) == int(known.argmax())
    assert float(found.row.sum()) == pytest.approx(1)
    assert accuracy(found, *rows(400, kind, 60 + kind)) > 0.75


def test_its_labels_may_be_new_to_the_run(run: fedmerge.Run) -> None:
    found = fedmerge.onboard(run, rows(60, 0, 51, ("left", "right")))
    assert found.server.record.class_names == ("left", "right")
    assert accuracy(found, *rows(400, 0, 61, ("left", "right"))) > 0.75


@pytest.mark.parametrize("way", ["weights", "uniform", "mean", "single", "nearest", "fine-tune"])
def test_every_way_gives_a_whole_model(run: fedmerge.Run, way: str) -> None:
    found = fedmerge.onboard(run, rows(30, 1, 52), way=way)
    assert found.way == way
    assert len(found.params) == run.record.num_params
    assert found.params.isfinite().all()


def test_a_way_that_is_not_offered_is_refused(run: fedmerge.Run) -> None:
    with pytest.raises(UsageError, match="'shrunk-weights' is not offered for a run whose clients keep"):
        fedmerge.onboard(run, rows(30, 1, 52), way="shrunk-weights")


def test_runs_that_keep_another_part_are_refused() -> None:
    data = from_arrays({f"site-{i}": rows(60, 0, i) for i in range(4)})
    kept = fedmerge.run(data, model=network, keep=["0"], method="fedavg", rounds=2)
    with pytest.raises(UsageError, match="only a linear output layer can be fitted anew"):
        fedmerge.onboard(kept, rows(30, 0, 9))


def test_an_output_layer_is_scikit_learn_s_logistic_regression() -> None:
    """Three classes: the same probabilities; a class without samples never wins."""
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(40, 5))), torch.from_numpy(rng.integers(3, size=40))
    head = fitted_head(x, y, 4)
    weight, bias = head[: 4 * 5].view(4, 5), head[4 * 5 :]
    outputs = x @ weight.T + bias
    expected = LogisticRegression(max_iter=300).fit(x.numpy(), y.numpy()).predict_proba(x.numpy())
    np.testing.assert_allclose(torch.softmax(outputs[:, :3], dim=1).numpy(), expected, atol=1e-6)
    assert bool((outputs.argmax(dim=1) < 3).all())


def test_two_classes_are_as_sure_as_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    x, y = torch.from_numpy(rng.normal(size=(30, 4))), torch.from_numpy(rng.integers(2, size=30))
    head = fitted_head(x, y, 2)
    outputs = x @ head[:8].view(2, 4).T + head[8:]
    expected = LogisticRegression(max_iter=300).fit(x.numpy(), y.numpy()).predict_proba(x.numpy())
    np.testing.assert_allclose(torch.softmax(outputs, dim=1).numpy(), expected, atol=1e-6)


def test_samples_of_one_class_give_that_class() -> None:
    head = fitted_head(torch.ones(3, 2).double(), torch.tensor([1, 1, 1]), 3)
    assert int((torch.ones(2).double() @ head[:6].view(3, 2).T + head[6:]).argmax()) == 1


def test_texts_of_a_new_task_are_onboarded_from_a_run_folder(tmp_path: Path) -> None:
    recipe = Hf(tiny_models.tiny_bert(tmp_path / "model"), layers=1, max_length=16)
    texts = [
        f"{a} {b}" for a in ("good food", "bad food", "good room", "bad room") for b in ("this year", "again", "now")
    ]
    labels = [text.split()[0] for text in texts]
    data = from_texts({f"site-{i}": (texts, labels) for i in range(4)}, recipe.encoder())
    training = {"optimizer": "adamw", "lr": 0.01, "batch_size": 4, "epochs": 1}
    fedmerge.run(
        data, model=recipe, keep=["head"], method={"name": "fedmerge", "num_models": 2}, rounds=5, training=training,
        out=tmp_path / "run",
    )  # fmt: skip
    (tmp_path / "new.csv").write_text("text,label\n" + "".join(f"{t},{t.split()[1]}\n" for t in texts))
    with pytest.raises(fedmerge.FedmergeError):  # the folder of a run on lists of texts does not know the column
        fedmerge.onboard(tmp_path / "run", tmp_path / "new.csv")
    found = fedmerge.onboard(tmp_path / "run", (texts, [text.split()[1] for text in texts]))
    assert found.server.record.class_names == ("food", "room")
    assert found.module()(data.clients[0].test.inputs).shape == (len(data.clients[0].test.targets), 2)


def test_frozen_factors_are_those_of_the_run_or_refused(tmp_path: Path) -> None:
    """They are drawn from the seed and in no file: other labels change nothing in them, another draw is told."""
    recipe = Hf(tiny_models.tiny_bert(tmp_path / "model"), layers=1, max_length=16, train_a=False)
    texts = [
        f"{a} {b}" for a in ("good food", "bad food", "good room", "bad room") for b in ("this year", "again", "now")
    ]
    data = from_texts({f"site-{i}": (texts, [t.split()[0] for t in texts]) for i in range(4)}, recipe.encoder())
    fedmerge.run(data, model=recipe, keep=["head"], method="fedavg", rounds=2, out=tmp_path / "run")
    found = fedmerge.onboard(tmp_path / "run", (texts, ["abc"[i % 3] for i in range(12)]), way="uniform")

    def frozen(module: nn.Module) -> list[torch.Tensor]:
        return [p for name, p in module.named_parameters() if ".lora_A." in name]

    run = fedmerge.run(data, model=recipe, keep=["head"], method="fedavg", rounds=1)
    assert all(
        torch.equal(a, b) for a, b in zip(frozen(found.module()), frozen(run.client_model("site-0")), strict=True)
    )
    path = tmp_path / "run" / "serving.json"
    path.write_text(path.read_text().replace('"frozen_draw": "', '"frozen_draw": "0'))
    with pytest.raises(fedmerge.FedmergeError, match="came out differently here"):
        fedmerge.onboard(tmp_path / "run", (texts, ["abc"[i % 3] for i in range(12)]))
