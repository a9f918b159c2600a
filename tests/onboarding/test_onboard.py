"""New clients of a federation whose groups are known: recovery, choice, judgement, refusals, what is saved."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedmerge
from fedmerge import DataError, Examples, FedmergeError, UsageError, from_arrays
from fedmerge.core.vector import layout_of
from fedmerge.onboarding import server_of_folder, server_of_outcome
from fedmerge.onboarding.plan import make_plan
from fedmerge.onboarding.ways import Fitting
from fedmerge.onboarding.weights import learned_rows, predictor

NAMES = ("ant", "bee", "cat", "dog")
GROUPS = ((0, 1, 2, 3), (1, 2, 3, 0), (3, 2, 1, 0))
UNSEEN = (2, 0, 3, 1)
CENTRES = np.random.default_rng(1).normal(size=(4, 6)) * 2.2


def rows(count: int, labels: tuple[int, ...], seed: int) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Raw points around four centres, 40 + 10 times what a network likes, called by their group's names."""
    rng = np.random.default_rng([5, seed])
    kind = rng.integers(4, size=count)
    return 40 + 10 * (CENTRES[kind] + rng.normal(size=(count, 6))), [NAMES[labels[k]] for k in kind]


def accuracy(module: nn.Module, inputs: np.ndarray[Any, Any], labels: list[str], form: Any) -> float:
    with torch.no_grad():
        found = module(form.scaled(inputs.astype(np.float32))).argmax(dim=1)
    return float(np.mean([NAMES[k] == label for k, label in zip(found.tolist(), labels, strict=True)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of twelve clients in three groups, made through the Python API."""
    place = tmp_path_factory.mktemp("runs") / "run"
    clients = {f"site-{i:02d}": rows(80, GROUPS[i % 3], i) for i in range(12)}
    data = from_arrays(clients, class_names=NAMES, standardise=True)
    fedmerge.run(
        data, model={"name": "mlp", "hidden": [16]}, rounds=25, evaluate_every=5, training={"lr": 0.3}, out=place
    )
    return place


@pytest.fixture(scope="module")
def run() -> fedmerge.Run:
    """The same run in memory."""
    clients = {f"site-{i:02d}": rows(80, GROUPS[i % 3], i) for i in range(12)}
    data = from_arrays(clients, class_names=NAMES, standardise=True)
    return fedmerge.run(data, model={"name": "mlp", "hidden": [16]}, rounds=25, evaluate_every=5, training={"lr": 0.3})


# ------------------------------------------------------------------------------------------------ recovery and choice


@pytest.mark.parametrize("group", range(3))
def test_a_client_of_a_known_group_gets_the_groups_models_and_is_recognised(run: fedmerge.Run, group: int) -> None:
    found = fedmerge.onboard(run, rows(40, GROUPS[group], 100 + group), way="weights")
    own = run.mixing()
    assert own is not None
    assert int(found.row.argmax()) == int(own[group].argmax())
    assert found.fit.verdict == "like known clients"
    assert {name[-2:] for name in found.fit.nearest} <= {f"{i:02d}" for i in range(group, 12, 3)}
    test = rows(300, GROUPS[group], 200 + group)
    scores = run.record.selected().test
    assert scores is not None
    assert accuracy(found.module(), *test, run.outcome.setup.data.form) > scores.mean_accuracy() - 0.05


def test_the_estimate_covers_what_further_samples_show(run: fedmerge.Run) -> None:
    form = run.outcome.setup.data.form
    hits = 0
    for seed in range(8):
        found = fedmerge.onboard(run, rows(40, GROUPS[seed % 3], 300 + seed))
        assert found.estimate is not None
        truth = accuracy(found.module(), *rows(400, GROUPS[seed % 3], 400 + seed), form)
        hits += found.estimate.low <= truth <= found.estimate.high
    assert hits >= 5  # of eight intervals of 95 %, four or fewer would hold in 1 of 2,700 such tests


def test_personal_labels_are_fine_tuned_and_found_unlike_any_known_client(run: fedmerge.Run) -> None:
    found = fedmerge.onboard(run, rows(60, UNSEEN, 7))
    assert found.way in ("fine-tune", "weights-then-fine-tune")
    assert found.fit.verdict == "unlike any known client"
    form = run.outcome.setup.data.form
    merged = fedmerge.onboard(run, rows(60, UNSEEN, 7), way="weights")
    test = rows(300, UNSEEN, 8)
    assert accuracy(found.module(), *test, form) > accuracy(merged.module(), *test, form) + 0.2


def test_random_labels_are_found_unlike_any_known_client_and_promised_nothing(run: fedmerge.Run) -> None:
    inputs, _ = rows(60, GROUPS[0], 9)
    found = fedmerge.onboard(run, (inputs, np.random.default_rng(0).choice(NAMES, 60)))
    assert found.fit.verdict == "unlike any known client"
    assert found.estimate is not None
    assert found.estimate.low < 0.25 + 0.12  # chance is a quarter


def test_a_client_between_two_groups_is_called_that(run: fedmerge.Run) -> None:
    """Its labels are those of a model halfway between the models of two groups."""
    server = server_of_outcome(run.outcome)
    assert server.rows is not None
    first, second = server.rows[:, 0], server.rows[:, 1]
    between = server.merged(((first + second) / 2)[None])[0]
    inputs, _ = rows(300, GROUPS[0], 11)
    scaled = server.serving.form.scaled(inputs.astype(np.float32))  # type: ignore[union-attr]
    targets = server.module_of(between)(scaled).argmax(dim=1)
    found = fedmerge.onboard(run, Examples(scaled, targets), way="weights")
    assert found.fit.distance is not None
    assert found.fit.distance > 0.25
    assert found.fit.verdict == "between groups"


def test_fifty_samples_take_less_than_a_second(run: fedmerge.Run) -> None:
    fedmerge.onboard(run, rows(50, GROUPS[1], 12))
    began = time.process_time()  # of this process: other programs on the machine do not count
    fedmerge.onboard(run, rows(50, GROUPS[1], 12))
    assert time.process_time() - began < 1


def test_learned_weights_are_where_the_loss_is_flat(run: fedmerge.Run) -> None:
    """Labels made by a merge of the models: its row has the lowest loss, and learning comes near it."""
    server = server_of_outcome(run.outcome)
    inputs = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([[0.1, 0.8, 0.1]], dtype=torch.float64)
    assert len(server.models) == 3
    targets = server.module_of(server.merged(wanted[None])[0])(inputs).argmax(dim=1)
    examples = Examples(inputs, targets)
    row = learned_rows(server, predictor(server, inputs), examples, [torch.arange(200)], np.random.default_rng(0))[0]
    fitted = Fitting(server, predictor(server, inputs), examples, make_plan(examples, 0, np.random.default_rng(0)))
    learned, true = fitted.scored_rows(torch.stack([row, wanted])).losses.mean(dim=1).tolist()
    assert learned <= true + 0.01
    assert int(row.argmax()) == 1


def test_the_same_samples_give_the_same_model_from_run_and_folder(run: fedmerge.Run, folder: Path) -> None:
    samples = rows(30, GROUPS[2], 13)
    first, second = fedmerge.onboard(run, samples), fedmerge.onboard(folder, samples)
    assert torch.equal(first.params, second.params)
    assert first.candidates == second.candidates


# ------------------------------------------------------------------------------------------------ what is held out


def test_no_sample_is_judged_by_a_model_that_saw_it() -> None:
    for n in (5, 23, 199, 200, 501):
        inputs = torch.arange(n, dtype=torch.float32)[:, None] // 2  # pairs of equal inputs
        plan = make_plan(Examples(inputs, torch.arange(n) % 3), 0, np.random.default_rng(0))
        for fit, held in zip(plan.fits, plan.held, strict=False):
            if n == 5:
                continue
            assert not set(inputs[fit, 0].tolist()) & set(inputs[held, 0].tolist())
            assert len(fit) + len(held) == n
        assert plan.final == len(plan.held)
        if n == 5:  # three different samples
            assert plan.held == ()
        if 5 < n < 200:
            assert sorted(plan.held_samples.tolist()) == list(range(n))
            assert len(plan.held) == 5


def test_few_samples_or_one_class_get_learned_weights_and_no_estimate(run: fedmerge.Run) -> None:
    inputs, labels = rows(60, GROUPS[0], 14)
    few = fedmerge.onboard(run, (inputs[:4], labels[:4]))
    assert (few.way, few.estimate, few.fit.verdict) == ("shrunk-weights", None, "not known")
    assert "fewer than 5" in few.missing
    chosen = [k for k, label in enumerate(labels) if label == "ant"]
    one = fedmerge.onboard(run, (inputs[chosen], [labels[k] for k in chosen]))
    assert one.estimate is None
    assert "one class" in one.missing


def test_given_validation_samples_are_what_ways_are_compared_on(run: fedmerge.Run) -> None:
    found = fedmerge.onboard(run, rows(20, GROUPS[0], 15), validation=rows(70, GROUPS[0], 16))
    assert found.estimate is not None
    assert (found.estimate.count, found.num_samples) == (70, 20)
    assert "70 validation samples" in found.estimate.how


def test_validation_samples_that_are_fitted_too_are_warned_of(
    run: fedmerge.Run, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, labels = rows(20, GROUPS[0], 15)
    fedmerge.onboard(run, (inputs[:12], labels[:12]), validation=(inputs[12:], labels[12:]), way="uniform")
    assert not caplog.records
    fedmerge.onboard(run, (inputs[:15], labels[:15]), validation=(inputs[12:], labels[12:]), way="uniform")
    assert "3 of 8 validation samples are among those that the model is fitted on" in caplog.text


def test_every_way_can_be_asked_for(run: fedmerge.Run) -> None:
    samples = rows(20, GROUPS[0], 17)
    for way in (
        "shrunk-weights",
        "weights",
        "uniform",
        "mean",
        "single",
        "nearest",
        "fine-tune",
        "weights-then-fine-tune",
    ):
        found = fedmerge.onboard(run, samples, way=way)
        assert found.way == way
        assert found.estimate is not None
        assert bool(found.epochs) == ("fine-tune" in way)
    assert torch.equal(fedmerge.onboard(run, samples, way="uniform").row, torch.full((3,), 1 / 3, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ other methods


SMALL: dict[str, Any] = {"partition": {"name": "permuted", "clients": 6, "groups": 2, "test": 20}, "rounds": 3}


@pytest.mark.parametrize("method", ["fedavg", "ifca", "fesem", "oracle", "fedprox"])
def test_any_method_with_server_models_can_take_a_client_in(method: str) -> None:
    table = {"name": method, "num_models": 2} if method in ("ifca", "fesem") else method
    made = fedmerge.run("digits", method=table, **SMALL)
    found = fedmerge.onboard(made, made.outcome.setup.data.clients[0].test)
    assert found.estimate is not None
    assert len(found.row) == (2 if method in ("ifca", "fesem", "oracle") else 1)


def test_a_method_without_server_models_is_refused(tmp_path: Path) -> None:
    made = fedmerge.run("digits", method="local", out=tmp_path / "run", **SMALL)
    for place in (made, tmp_path / "run"):
        with pytest.raises(UsageError, match="method 'local' keeps no whole models on the server"):
            fedmerge.onboard(place, made.outcome.setup.data.clients[0].test)


def test_one_model_has_no_weights_to_choose(run: fedmerge.Run) -> None:
    made = fedmerge.run("digits", method="fedavg", **SMALL)
    with pytest.raises(UsageError, match="way 'single' needs several server models"):
        fedmerge.onboard(made, made.outcome.setup.data.clients[0].test, way="single")


@pytest.mark.parametrize("buffers", ["merge", "local", "recalibrate"])
def test_batch_statistics_follow_the_runs_policy(buffers: str) -> None:
    made = fedmerge.run(
        "digits",
        model={"name": "cnn", "norm": "batch"},
        buffers=buffers,
        method={"name": "ifca", "num_models": 2},
        **SMALL,
    )
    client = made.outcome.setup.data.clients[0]
    found = fedmerge.onboard(made, client.test, way="single")
    means = [buffer for name, buffer in found.module().named_buffers() if name.endswith("running_mean")]
    if buffers == "merge":
        T = made.outcome.setup.layout.num_trainable
        assert torch.equal(found.params[T:], made.outcome.selected.state.averages.models[int(found.row.argmax()), T:])
    else:  # the statistics of the first convolution on the client's own inputs
        first = next(part for part in found.module().modules() if isinstance(part, nn.Conv2d))
        assert torch.allclose(means[0], first(client.test.inputs).mean(dim=(0, 2, 3)), atol=1e-5)


def test_rows_by_layer_stay_rows_by_layer() -> None:
    method = {"name": "fedmerge", "rows": "layer", "num_models": 2}
    made = fedmerge.run("digits", method=method, **{**SMALL, "rounds": 6})
    found = fedmerge.onboard(made, made.outcome.setup.data.clients[0].test, way="weights")
    assert found.row.shape == (2, 2)  # two layers, two models
    blocks = made.outcome.selected.state.method.blocks.tolist()
    models = made.outcome.selected.state.method.soup.models
    for row, (a, b) in zip(found.row, blocks, strict=True):
        assert torch.allclose(found.params[a:b], (row.to(models.dtype) @ models)[a:b])


# ------------------------------------------------------------------------------------------------ refusals


def bad(inputs: Any = None, labels: Any = None) -> Any:
    x, y = rows(10, GROUPS[0], 18)
    return (x if inputs is None else inputs, y if labels is None else labels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bad(labels=["ant"] * 9 + ["cow"]), "new client, row 9 from 0: unknown class 'cow'"),
        (bad(labels=[0] * 9 + [4]), "row 9 from 0: label 4; expected 0..3"),
        (bad(labels=[0.5] * 10), "label 0.5; expected 0..3"),
        (bad(labels=[0] * 9), "labels of shape [9] for 10 inputs"),
        (bad(inputs=np.zeros((10, 5))), "inputs are float32 [5]; expected float32 [6] as in the run's clients"),
        (bad(inputs=np.full((10, 6), np.nan)), "got nan; expected a finite number"),
        ((np.zeros((0, 6)), []), "new client: no samples at all"),
        (([], []), "new client: no samples at all"),
        (bad(inputs="words"), "inputs"),
        (Examples(torch.zeros(10, 5), torch.zeros(10, dtype=torch.int64)), "inputs are [5]; expected [6]"),
        (Examples(torch.full((10, 6), torch.inf), torch.zeros(10, dtype=torch.int64)), "got inf"),
    ],
)
def test_samples_that_cannot_be_used_are_refused_with_the_place(run: fedmerge.Run, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        fedmerge.onboard(run, data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"way": "fine-tuen"}, "unknown way 'fine-tuen'; did you mean 'fine-tune'?"),
        ({"data": "nowhere.csv"}, "no such file or folder: nowhere.csv"),
        ({"data": 3}, "new client: got a int; expected the path"),
        ({"model": "mlp"}, "model: got one for a Run object"),
        ({"seed": -1}, "seed: got -1; expected a whole number >= 0"),
        ({"seed": "a"}, "seed: got 'a'; expected a whole number >= 0"),
        ({"run": 3}, "run: got a int; expected a Run or the path of a run folder"),
    ],
)
def test_requests_that_make_no_sense_are_refused(run: fedmerge.Run, arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        fedmerge.onboard(**{"run": run, "data": rows(10, GROUPS[0], 19), **arguments})


def test_a_folder_that_is_no_run_or_damaged_is_refused(folder: Path, tmp_path: Path) -> None:
    samples = rows(10, GROUPS[0], 20)
    with pytest.raises(FedmergeError, match="is not a run"):
        fedmerge.onboard(tmp_path, samples)
    for name, content, message in (
        ("models.safetensors", "nothing", r"models\.safetensors is damaged"),
        ("serving.json", "{}", r"serving\.json is damaged"),
        ("serving.json", None, "neither serving.json nor config.toml"),
        ("models.safetensors", None, r"has no models\.safetensors"),
    ):
        copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / name).unlink() if content is None else (copy / name).write_text(content)
        with pytest.raises(FedmergeError, match=message):
            fedmerge.onboard(copy, samples)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("server.method.soup.models", lambda models: models[:, :10], "expected floats [models, "),
        ("server.method.soup.models", lambda models: models[0], "expected floats [models, "),
        ("server.method.soup.models", lambda models: models[:0], "expected floats [models, "),
        ("server.method.soup.models", lambda models: models.int(), "soup.models is int32"),
        ("server.method.soup.models", lambda models: models * torch.nan, "expected finite numbers only"),
        ("server.method.soup.models", lambda models: models[:1], "soup.logits is float64 [1, 12, "),
        ("server.method.soup.logits", lambda logits: logits[:, :3], "soup.logits is float64 [1, 3, "),
        ("server.method.soup.logits", lambda logits: logits * torch.nan, "expected numbers only"),
        (
            "server.method.soup.logits",
            lambda logits: torch.cat([logits, logits]),
            "blocks is int64 [1, 2]; expected 2 ",
        ),
        ("server.method.blocks", lambda blocks: blocks.flatten(), "blocks is int64 [2]; expected 1 ranges"),
        (
            "server.method.blocks",
            lambda blocks: torch.cat([blocks, blocks]),
            "blocks is int64 [2, 2]; expected 1 ranges",
        ),
        ("server.method.blocks", lambda blocks: blocks + 1, "ranges one after another, from 0 to "),
        ("server.method.blocks", lambda blocks: blocks.double(), "blocks is float64 [1, 2]"),
    ],
)
def test_a_whole_file_of_wrong_tensors_is_refused(
    folder: Path, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "models.safetensors")
    save_file({**tensors, name: change(tensors[name]).contiguous()}, tmp_path / "models.safetensors")
    with pytest.raises(FedmergeError, match=re.escape(message)):
        fedmerge.onboard(tmp_path, rows(10, GROUPS[0], 20))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def test_a_network_of_ones_own_is_given_again(tmp_path: Path) -> None:
    data = from_arrays([rows(30, GROUPS[i % 2], i) for i in range(4)], class_names=NAMES, standardise=True)
    made = fedmerge.run(data, model=network, rounds=2, out=tmp_path / "run")
    samples = rows(12, GROUPS[0], 21)
    with pytest.raises(UsageError, match="give it again: model=YOUR_MODULE"):
        fedmerge.onboard(tmp_path / "run", samples)
    with pytest.raises(UsageError, match="the run's network has"):
        fedmerge.onboard(tmp_path / "run", samples, model=nn.Linear(6, 4))
    again = fedmerge.onboard(tmp_path / "run", samples, model=network())
    assert torch.equal(again.params, fedmerge.onboard(made, samples).params)


# ------------------------------------------------------------------------------------------------ what is saved


def test_a_saved_model_gives_the_same_outputs_by_its_own_readme(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fedmerge.onboard(folder, rows(40, GROUPS[1], 22))
    place = found.save(tmp_path / "client")
    monkeypatch.chdir(place)
    code = re.search(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
    assert code is not None
    namespace: dict[str, Any] = {}
    exec(code[1], namespace)  # noqa: S102
    plain = json.loads((place / "onboard.json").read_text())
    mean, std = (torch.tensor(plain["inputs"][name]) for name in ("mean", "std"))
    raw, _ = rows(25, GROUPS[1], 23)
    inputs = (torch.from_numpy(raw).float() - mean) / std
    assert torch.equal(namespace["module"](inputs), found.module()(inputs))
    assert plain["way"] == found.way
    assert plain["row"] == found.row.tolist()
    assert set(load_file("model.safetensors")) == set(found.module().state_dict())
    assert found.fit.verdict in (place / "README.md").read_text()
    with pytest.raises(UsageError, match="nothing was overwritten"):
        found.save(place)


def test_an_older_folder_finds_the_scaling_in_its_configuration(tmp_path: Path) -> None:
    """Folders without serving.json: the data that config.toml names say how inputs are scaled."""
    table = {"source": "digits", "method": "fedavg", **SMALL}
    made = fedmerge.run_config(table, out=tmp_path / "run")
    new = server_of_folder(tmp_path / "run")
    (tmp_path / "run" / "serving.json").unlink()
    old = server_of_folder(tmp_path / "run")
    assert new.serving.form is not None
    assert old.serving.form is not None
    assert new.serving.form.plain() == old.serving.form.plain()
    assert new.serving.training == old.serving.training
    assert layout_of(old.module) == made.outcome.setup.layout
