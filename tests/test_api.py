"""The Python API: names, tables and objects say the same, and what it returns agrees with what it recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedmerge
from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.data.partitions.rotations import Rotations
from fedmerge.data.sources.digits import Digits
from fedmerge.experiment.record import RoundRecord
from fedmerge.models.mlp import Mlp
from small import TABLE

PARTITION = TABLE["partition"]
OPTIONS = {key: value for key, value in PARTITION.items() if key != "name"}


def run(**changes: Any) -> fedmerge.Run:
    return fedmerge.run(**{"partition": PARTITION, "model": Mlp((8,)), "method": "fedavg", "rounds": 2, **changes})


def compare(**changes: Any) -> fedmerge.Comparison:
    shared = {"partition": PARTITION, "model": Mlp((8,)), "methods": ["fedavg", "local"], "rounds": 1}
    return fedmerge.compare(**{**shared, **changes})


def own_clients() -> fedmerge.FederatedData:
    """Three clients of 20 rows, whose class is the sign of the first of four features."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(3, 20, 4)).astype(np.float32)
    return fedmerge.from_arrays({f"site {i}": (x, (x[:, 0] > 0).astype(int)) for i, x in enumerate(inputs)})


class Net(nn.Module):
    """One hidden layer and dropout, which must be off when a client uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.drop(torch.relu(self.body(x.flatten(1)))))
        return y


# ------------------------------------------------------------------------------------------------ one run


def test_the_defaults_work() -> None:
    assert fedmerge.run(rounds=1).record.status == "finished"


def test_names_tables_and_objects_say_the_same() -> None:
    names = run(data="digits")
    tables = run(data={"name": "digits"}, method={"name": "fedavg"}, model={"name": "mlp", "hidden": [8]}, training={})
    objects = run(data=Digits(), partition=Rotations(**OPTIONS), method=FedAvg(), training=fedmerge.LocalTraining())
    assert names.record.last().test == tables.record.last().test == objects.record.last().test


def test_a_run_equals_that_of_the_same_configuration() -> None:
    config = {**TABLE, "method": "fedavg"}
    python = fedmerge.run(
        partition=PARTITION, model=TABLE["model"], method="fedavg", training={"epochs": 1}, rounds=2, evaluate_every=1
    )
    assert fedmerge.run_config(config).record.last().test == python.record.last().test


def test_a_partition_without_a_name_changes_the_default_one() -> None:
    assert len(run(partition={"clients": 3}).record.client_names) == 3


@pytest.mark.parametrize("model", [Net(), Net, lambda: nn.Sequential(Net())], ids=["module", "class", "function"])
def test_own_modules_are_trained(model: Any) -> None:
    record = run(model=model).record
    assert record.num_params == 64 * 16 + 16 + 16 * 10 + 10
    assert record.rounds[-1].test != record.rounds[0].test


def test_own_clients_are_trained_on() -> None:
    result = run(data=own_clients(), partition=None, training={"lr": 0.5, "epochs": 5}, rounds=10)
    assert result.record.client_names == ("site 0", "site 1", "site 2")
    # the class is the sign of one input: far better than guessing after 50 epochs
    assert result.accuracy > 0.7


def test_every_round_is_told() -> None:
    told: list[RoundRecord] = []
    result = run(watch=told.append)
    assert tuple(told) == result.record.rounds


@pytest.mark.parametrize("method", ["fedavg", "local", {"name": "ifca", "num_models": 2}, "fedmerge"])
@pytest.mark.parametrize("more", [{}, {"precision": "float64"}, {"keep": ["head"]}], ids=str)
def test_a_clients_model_predicts_as_the_record_says(method: Any, more: dict[str, Any]) -> None:
    result = run(method=method, model=Net, rounds=3, **more)
    reported = result.record.selected().test
    assert reported is not None
    for i, client in enumerate(result.outcome.setup.data.clients):
        model = result.client_model(client.name)
        with torch.no_grad():
            outputs = model(client.test.inputs)
        assert float((outputs.argmax(1) == client.test.targets).double().mean()) == reported.accuracy[i]
        loss = float(nn.functional.cross_entropy(outputs, client.test.targets))
        assert loss == pytest.approx(reported.loss[i], rel=1e-5)


def test_clients_keep_what_they_are_told_to_keep() -> None:
    """The body travels, 64 · 16 + 16 numbers in float32; the output layers differ and are written beside the server."""
    result = run(model=Net, rounds=2, keep=["head"])
    first, second = result.client_model(0), result.client_model(1)
    assert torch.equal(first.body.weight, second.body.weight)
    assert not torch.equal(first.head.weight, second.head.weight)
    assert result.record.last().bytes_down == 5 * 4 * (64 * 16 + 16)


def test_a_client_of_fewer_classes_needs_a_network_that_can_be_made_for_them() -> None:
    """`Net` has ten outputs whatever it is asked for, and these six digits are of four kinds."""
    result = run(model=Net, keep=["head"])
    own = result.outcome.setup.data.clients[0].test
    kinds = ", ".join(str(kind) for kind in own.targets.unique().tolist())
    with pytest.raises(
        fedmerge.UsageError, match=f"this client's classes are {kinds}; .* or a function of num_classes"
    ):
        fedmerge.onboard(result, own)
    assert fedmerge.onboard(run(keep=["head"]), own).num_samples == len(own.targets)


def test_a_body_that_clients_keep_cannot_be_brought_by_a_new_client() -> None:
    result = run(model=Net, keep=["body"])
    with pytest.raises(fedmerge.UsageError, match="the clients of this run keep body"):
        fedmerge.onboard(result, result.outcome.setup.data.clients[0].test)


def test_a_clients_model_is_that_of_the_reported_round_not_of_the_last() -> None:
    result = run(method="local", model=Net, rounds=20, training={"lr": 1.0})
    selected, last = result.record.selected(), result.record.last()
    assert selected.round < last.round  # otherwise this test says nothing
    assert selected.test is not None
    test = result.outcome.setup.data.clients[0].test
    with torch.no_grad():
        outputs = result.client_model(0)(test.inputs)
    assert float(nn.functional.cross_entropy(outputs, test.targets)) == pytest.approx(selected.test.loss[0], rel=1e-5)
    assert last.test is not None
    assert last.test.loss[0] != pytest.approx(selected.test.loss[0], rel=1e-3)


def test_a_class_is_given_what_it_takes() -> None:
    class Sized(nn.Sequential):
        def __init__(self, num_classes: int) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, num_classes))

    assert run(model=Sized).record.num_params == 64 * 10 + 10


def test_a_runs_table_prints_as_markdown() -> None:
    table = run(method="fedavg").table()
    assert str(table) == table.markdown()
    assert str(table).startswith("| Method |")


def test_a_clients_model_is_found_by_name_and_number_and_is_its_own() -> None:
    result = run(method="local", rounds=4, training={"lr": 0.5})
    assert result.record.selected().round > 0  # before training all clients have the same model
    first, by_number, second = (result.client_model(who) for who in ("client-0", np.int64(0), 1))
    assert torch.equal(first[1].weight, by_number[1].weight)
    assert not torch.equal(first[1].weight, second[1].weight)
    assert not first.training


@pytest.mark.parametrize("client", ["client-9", 5, -1, 1.0, True, None])
def test_an_unknown_client_is_refused(client: Any) -> None:
    with pytest.raises(UsageError, match=r"unknown client .* Known: client-0, .*, or 0\.\.4"):
        run(rounds=1).client_model(client)


def test_mixing_weights_of_every_client_sum_to_one() -> None:
    weights = run(method={"name": "fedmerge", "num_models": 3, "initial": "noise"}).mixing()
    assert weights is not None
    assert weights.shape == (5, 3)
    assert torch.allclose(weights.sum(1), torch.ones(5, dtype=weights.dtype))
    assert run().mixing() is None


def test_accuracy_is_that_of_the_selected_round() -> None:
    result = run(rounds=4, evaluate_every=1)
    selected = result.record.selected().test
    assert selected is not None
    known = [value for value in selected.accuracy if value is not None]
    assert result.accuracy == pytest.approx(sum(known) / len(known))


def test_a_written_run_is_read_back_and_not_overwritten(tmp_path: Path) -> None:
    result = run(out=tmp_path / "run")
    assert fedmerge.load_run(tmp_path / "run") == result.record
    with pytest.raises(UsageError, match="nothing was overwritten"):
        run(out=tmp_path / "run")


def test_a_run_and_a_comparison_show_themselves_in_one_line() -> None:
    assert repr(run(rounds=1)).startswith("<Run 'fedavg', seed 0: finished, test accuracy ")
    assert repr(compare()) == "<Comparison of fedavg, local: 2 runs>"


def test_a_frame_has_a_row_per_client() -> None:
    frame = run().frame()
    assert len(frame) == 5
    assert {"client", "label", "seed"} <= set(frame.columns)


def test_a_report_is_one_page(tmp_path: Path) -> None:
    page = run().report(tmp_path / "deep" / "page.html")
    assert page.read_text().startswith("<!doctype html>")


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": "digit"}, "unknown source 'digit'; did you mean 'digits'"),
        ({"data": None}, "source: got a NoneType; expected a name"),
        ({"data": np.zeros((3, 4))}, "source: got a ndarray"),
        ({"method": 5}, "method: got a int; expected a name"),
        ({"method": FedAvg}, "method: got the class FedAvg itself"),
        ({"method": {"nam": "fedavg"}}, "method.name: missing; known: apfl, cfl"),
        ({"partition": 5}, "partition: got a int"),
        ({"partition": Rotations}, "partition: got the class Rotations itself"),
        ({"model": 5}, "model: got a int"),
        ({"model": Mlp}, "model: got the class Mlp itself"),
        ({"training": 5}, "training: got a int; expected a table or a LocalTraining"),
        ({"training": {"lr": float("nan")}}, "training.lr: got nan; expected a number > 0"),
        ({"label": "a/b"}, "label: got 'a/b'"),
        ({"round": 3}, "unknown option 'round'; did you mean 'rounds'"),
        ({"data": own_clients()}, "partition: got one for your own clients"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        run(**changes)


def test_all_wrong_arguments_are_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        run(data="x", method="y", model="z", partition="w", training={"lr": 0}, rounds=0, label=3)
    assert len(str(caught.value).splitlines()) == 7


def test_clients_that_cannot_be_trained_on_are_refused() -> None:
    good = own_clients()
    broken = good.clients[0].train.inputs.clone()
    broken[3, 0] = torch.nan
    train = fedmerge.Examples(broken, good.clients[0].train.targets)
    bad = fedmerge.ClientData("a", train, good.clients[0].validation, good.clients[0].test)
    with pytest.raises(DataError, match="client 'a', train: example 3 has NaN"):
        run(data=fedmerge.FederatedData((bad,), good.class_names), partition=None)


# ------------------------------------------------------------------------------------------------ comparisons


def test_a_comparison_has_a_run_per_method_and_seed(tmp_path: Path) -> None:
    found = compare(seeds=[0, 1], out=tmp_path)
    assert [(r.label, r.seed) for r in found.records] == [("fedavg", 0), ("local", 0), ("fedavg", 1), ("local", 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fedavg-seed0",
        "fedavg-seed1",
        "local-seed0",
        "local-seed1",
    ]
    assert len(found.frame()) == 4
    assert len(found.clients_frame()) == 4 * 5
    assert {"label", "seed", "mean", "worst_tenth", "bytes_up"} <= set(found.frame().columns)


def test_compared_methods_share_their_clients() -> None:
    hashes = [record.data_sha256 for record in compare(seeds=[0, 1]).records]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def test_a_compared_run_equals_the_run_alone() -> None:
    compared = compare(rounds=2).records[0]
    assert compared.last().test == run(rounds=2).record.last().test


def test_own_clients_can_be_compared_on() -> None:
    found = compare(data=own_clients(), partition=None, seeds=[0, 1])
    assert len({record.data_sha256 for record in found.records}) == 1


def test_a_methods_own_training_replaces_entry_by_entry() -> None:
    slow = {"name": "fedavg", "label": "slow", "training": {"lr": 0.01}}
    for shared in ({"epochs": 1}, fedmerge.LocalTraining(epochs=1)):
        plain, own = (r.options["training"] for r in compare(methods=["fedavg", slow], training=shared).records)
        assert (plain["lr"], plain["epochs"]) == (0.1, 1)
        assert (own["lr"], own["epochs"]) == (0.01, 1)


def test_every_round_of_a_comparison_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    compare(seeds=[3], watch=lambda label, seed, record: told.append((label, seed, record.round)))
    assert told == [("fedavg", 3, 0), ("fedavg", 3, 1), ("local", 3, 0), ("local", 3, 1)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": "fedavg"}, "methods: got 'fedavg'; expected a list"),
        ({"methods": []}, "methods: got \\[\\]"),
        ({"methods": ["fedavg", 5]}, "method: got a int"),
        ({"methods": ["fedavg", "fedavg"]}, "two runs are called 'fedavg-seed0'; give each method a `label`"),
        ({"methods": [{"name": "fedavg", "label": "a/b"}]}, "label: got 'a/b'"),
        ({"methods": [{"name": "fedavg", "training": 5}]}, "training: got a int"),
        ({"methods": ["fedavg", "nope"]}, "unknown method 'nope'"),
        ({"methods": ["fedavg", {"name": "ifca", "num_models": 6}]}, "at most one model per client"),
        ({"seeds": 3}, "seeds: got 3; expected a list"),
        ({"seeds": []}, "seeds: got"),
        ({"seeds": [0, 0]}, "expected each once"),
        ({"seeds": [[0], [0]]}, "expected each once"),
        ({"seeds": [-1]}, "run.seed: got -1"),
        ({"seeds": ["a"]}, "run.seed: got 'a'"),
        ({"seed": 3}, "seed: got one for a comparison; give `seeds`"),
        ({"label": "x"}, "label: got one for a comparison"),
    ],
)
def test_a_wrong_comparison_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        compare(out=tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_comparisons_report_and_table_are_written(tmp_path: Path) -> None:
    found = compare(seeds=[0, 1])
    assert found.report(tmp_path / "page.html", reference="local").exists()
    assert "local" in found.table(reference="local").markdown()
    with pytest.raises(FedmergeError, match="unknown reference 'lcal'"):
        found.table(reference="lcal")


def test_the_package_offers_what_it_lists() -> None:
    assert all(getattr(fedmerge, name) is not None for name in fedmerge.__all__)
    assert set(fedmerge.__all__) <= set(dir(fedmerge))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedmerge.nothing
