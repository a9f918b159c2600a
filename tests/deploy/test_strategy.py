"""Methods as a Flower strategy: every node has a model of its own, and the server's bits are those of one process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flwr")

from flower_stub import HereGrid, inside_a_run
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.protocol import server_models, state_tensors
from fedmerge.core.vector import layout_of
from fedmerge.data import ClientData, Examples, FederatedData
from fedmerge.deploy.flower.nodes import tell_client_key
from fedmerge.deploy.flower.strategy import FedMergeStrategy
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.simulation import advance, prepare
from fedmerge.runtime import Sequential
from fedmerge.training import LocalTraining, Planned

N, ROUNDS, SEED = 6, 5, 3
TRAINING = LocalTraining(batch_size=10, epochs=1, lr=0.1)


def network(norm: bool = True) -> nn.Module:
    """A network whose weights are always the same; with BatchNorm, whose counter is a whole number."""
    parts = [nn.Linear(6, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), nn.Linear(8, 3)]
    module = nn.Sequential(*parts)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return module


@pytest.fixture(scope="module")
def data() -> FederatedData:
    """Two groups of clients with opposite rules, of unequal size."""
    rng, clients = np.random.default_rng(7), []
    rule = rng.normal(size=(6, 3))
    for i in range(N):
        x = rng.normal(size=(30 + 4 * i, 6)).astype(np.float32)
        y = np.argmax(x @ (rule if i % 2 else -rule), axis=1)
        part = Examples(torch.from_numpy(x), torch.from_numpy(y))
        clients.append(ClientData(f"{i}", part, part, part))
    return FederatedData(tuple(clients), ("a", "b", "c"))


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    with inside_a_run():
        yield


def client_app(data: FederatedData, module: nn.Module) -> Callable[[Message, Context], Message]:
    """A user's ClientApp: loads what it is sent, trains it, returns it. The training itself is fedmerge's."""
    layout = layout_of(module)
    engine = Sequential(module, layout, TRAINING.descent())

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.QUERY:
            return tell_client_key(message, context)
        client = int(context.node_config["partition-id"])
        config = message.content.config_records["config"]
        module.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        before, number = layout.read(module), int(config["server-round"])
        examples = data.clients[client].train
        metrics: dict[str, Any] = {"num-examples": len(examples.targets), "client": client}
        if message.metadata.message_type == MessageType.EVALUATE:
            return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
        plan = Planned(examples, TRAINING, TRAINING.lr, SEED, number, client)

        def train(task: Any, params: Tensor, batches: Any) -> Tensor:
            return task.train(params, batches, pull=float(config["proximal-mu"]))

        layout.write(engine.map(train, [(before, plan)])[0], module)
        arrays = ArrayRecord(module.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)

    return answer


def grid_of(data: FederatedData, module: nn.Module, **options: Any) -> HereGrid:
    """Nodes whose numbers and order say nothing about who they are."""
    configs = {1000 + 37 * ((5 * i) % N): {"partition-id": i} for i in range(N)}
    return HereGrid(client_app(data, module), dict(sorted(configs.items())), **options)


def strategy_of(method: Any = "fedmerge", **options: Any) -> FedMergeStrategy:
    return FedMergeStrategy(method, **{"model": network(), "num_clients": N, "seed": SEED, **options})


def in_process(method: str, data: FederatedData, rounds: int, module: nn.Module) -> Any:
    options = RunOptions(rounds=rounds, seed=SEED, runtime="sequential", kernels="torch")
    setup, progress = prepare(ALGORITHMS[method].cls(), data, module, TRAINING, options)
    for _ in range(rounds):
        progress, _ = advance(setup, progress)
    return progress.state


def assert_same_bits(found: Any, wanted: Any) -> None:
    found, wanted = state_tensors(found), state_tensors(wanted)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num()), name


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("method", ["fedmerge", "fedprox", "cfl"])
def test_the_servers_state_has_the_bits_of_the_run_in_one_process(data: FederatedData, method: str, norm: bool) -> None:
    strategy = strategy_of(method, model=network(norm))
    result = strategy.start(grid_of(data, network(norm)), strategy.arrays(), num_rounds=ROUNDS)
    wanted = in_process(method, data, ROUNDS, network(norm))
    assert_same_bits(strategy._progress.state, wanted)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4, 5]
    if method == "fedmerge":
        assert len(server_models(wanted)) > 1, "else the test says nothing about merging"


def test_every_node_is_sent_its_own_model_and_they_differ(data: FederatedData) -> None:
    strategy, grid = strategy_of(), grid_of(data, network())
    strategy.start(grid, strategy.arrays(), num_rounds=ROUNDS)
    last = [m for m in grid.sent if m.metadata.message_type == MessageType.EVALUATE][-N:]
    for message in last:
        key = str(grid.configs[message.metadata.dst_node_id]["partition-id"])
        assert message.content.array_records["arrays"] == strategy.arrays_of(key)
    assert len({message.content.array_records["arrays"]["0.weight"].data for message in last}) > 1
    assert strategy.mixing is not None
    assert strategy.mixing.sum(dim=1).tolist() == pytest.approx([1.0] * N)


def test_metrics_are_kept_by_client_and_averaged_by_examples(data: FederatedData) -> None:
    strategy = strategy_of()
    result = strategy.start(grid_of(data, network()), strategy.arrays(), num_rounds=1)
    assert strategy.history.evaluate[1] == {str(i): {"client": float(i)} for i in range(N)}
    sizes = [30 + 4 * i for i in range(N)]
    mean = sum(i * size for i, size in enumerate(sizes)) / sum(sizes)
    assert result.evaluate_metrics_clientapp[1]["client"] == pytest.approx(mean)
    assert result.train_metrics_clientapp[1]["num-models"] == 1


def test_methods_whose_clients_do_more_than_train_are_refused() -> None:
    refused = ["ditto", "fedper", "scaffold", "ifca", "fedem", "apfl", "fedavg-ft", "per-fedavg", "pfedme", "local"]
    for method in refused:
        with pytest.raises(UsageError, match=rf"method '{method}'.*fedmerge deploy"):
            strategy_of(method)
    with pytest.raises(UsageError, match=r"dp-fedmerge.*fedmerge deploy"):
        strategy_of("dp-fedmerge")
    for method in ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedprox", "cfl", "flhc", {"name": "one-shot"}):
        strategy_of(method if isinstance(method, str) else {**method, "num_models": 2})


def reply_with(message: Message, arrays: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None) -> None:
    """Changes a reply on its way."""
    content = message.content
    if arrays is not None:
        record = content.array_records["arrays"]
        record.update({name: Array(value) for name, value in arrays.items()})
    if metrics is not None:
        content.metric_records["metrics"].update(metrics)


def spoiled(how: str) -> Callable[[Message], list[Message]]:
    """One client's replies are not what they should be."""

    def tamper(message: Message) -> list[Message]:
        content = message.content
        if message.metadata.message_type != MessageType.TRAIN or content.metric_records["metrics"]["client"] != 2:
            return [message]
        record = content.array_records["arrays"]
        if how == "values":
            reply_with(message, {"0.bias": np.full(8, np.nan, np.float32)})
        elif how == "shape":
            reply_with(message, {"0.bias": np.zeros(9, np.float32)})
        elif how == "dtype":
            reply_with(message, {"0.bias": np.zeros(8)})
        elif how == "names":
            del record["0.bias"]
        elif how == "count":
            reply_with(message, metrics={"num-examples": -1})
        elif how == "duplicate":
            return [message, message]
        elif how == "round":
            message.metadata.__dict__["_group_id"] = "9"
        elif how == "run":
            message.metadata.__dict__["_run_id"] = 5
        elif how == "client":
            message.metadata.__dict__["_src_node_id"] = 5
        elif how == "malformed":
            record["0.bias"] = Array("float32", (8,), "numpy.ndarray", record["0.bias"].data[:-1])
        elif how == "second record":
            content["more"] = ArrayRecord()
        return [message]

    return tamper


@pytest.mark.parametrize(
    "how",
    ["values", "shape", "dtype", "names", "count", "round", "run", "client", "malformed", "second record", "duplicate"],
)
def test_a_reply_that_is_not_sound_changes_nothing(
    data: FederatedData, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = strategy_of("fedavg")
    strategy.start(grid_of(data, network(), tamper=spoiled(how)), strategy.arrays(), num_rounds=1)
    assert f"1 {'malformed' if how == 'second record' else how}" in caplog.text
    left_out = grid_of(data, network())
    left_out.silent = {
        node for node, own in left_out.configs.items() if own["partition-id"] == 2 and how != "duplicate"
    }
    other = FedMergeStrategy("fedavg", model=network(), num_clients=N, seed=SEED, min_nodes=1, query_seconds=1)
    left_out.silent, silent = set(), left_out.silent
    other._nodes.present(left_out)
    left_out.silent = silent
    other.start(left_out, other.arrays(), num_rounds=1)
    assert_same_bits(strategy._progress.state, other._progress.state)


def test_a_header_that_claims_more_than_the_bytes_hold_is_refused(data: FederatedData) -> None:
    huge = Array(np.zeros(8, np.float32))
    header = huge.data.replace(b"(8,), }    ", b"(8" + b"0" * 4 + b",), }")
    assert len(header) == len(huge.data)

    def tamper(message: Message) -> list[Message]:
        if message.metadata.message_type == MessageType.TRAIN:
            array = Array("float32", (8,), "numpy.ndarray", header)
            message.content.array_records["arrays"]["0.bias"] = array
        return [message]

    strategy = strategy_of("fedavg")
    before = strategy.arrays()
    strategy.start(grid_of(data, network(), tamper=tamper), before, num_rounds=1)
    assert strategy.arrays() == before
    assert strategy.rounds == 1


def test_where_most_clients_diverge_the_run_stops(data: FederatedData) -> None:
    def tamper(message: Message) -> list[Message]:
        if message.metadata.message_type == MessageType.TRAIN:
            reply_with(message, {"0.bias": np.full(8, np.inf, np.float32)})
        return [message]

    strategy = strategy_of()
    with pytest.raises(FedmergeError, match="diverged"):
        strategy.start(grid_of(data, network(), tamper=tamper), strategy.arrays(), num_rounds=1)


def test_a_strategy_made_again_with_its_folder_goes_on_with_the_same_bits(data: FederatedData, tmp_path: Path) -> None:
    first = strategy_of(folder=tmp_path)
    first.start(grid_of(data, network()), first.arrays(), num_rounds=2)
    with pytest.raises(UsageError, match="in use"):
        strategy_of(folder=tmp_path)
    first.close()
    second, grid = strategy_of(folder=tmp_path), grid_of(data, network())
    assert second.rounds == 2
    assert second.clients == {i: str(i) for i in range(N)}
    second.start(grid, second.arrays(), num_rounds=ROUNDS)
    second.close()
    assert_same_bits(second._progress.state, in_process("fedmerge", data, ROUNDS, network()))
    assert {m.metadata.group_id for m in grid.sent if m.metadata.message_type == MessageType.TRAIN} == {"3", "4", "5"}
    with pytest.raises(UsageError, match="another configuration"):
        strategy_of("fedavg", folder=tmp_path)


def test_clients_keep_their_rows_when_their_nodes_have_new_numbers(data: FederatedData, tmp_path: Path) -> None:
    first = strategy_of(folder=tmp_path)
    first.start(grid_of(data, network()), first.arrays(), num_rounds=2)
    first.close()
    grid = grid_of(data, network())
    grid.configs = {9000 - node: own for node, own in grid.configs.items()}
    second = strategy_of(folder=tmp_path)
    second.start(grid, second.arrays(), num_rounds=ROUNDS)
    second.close()
    assert_same_bits(second._progress.state, in_process("fedmerge", data, ROUNDS, network()))


def test_of_two_nodes_with_one_key_the_later_one_is_asked(data: FederatedData) -> None:
    grid = grid_of(data, network())
    old = next(node for node, own in grid.configs.items() if own["partition-id"] == 4)
    grid.configs[5] = dict(grid.configs[old])
    grid.since = {old: "2026-01-01", 5: "2026-01-02"}
    strategy = strategy_of()
    messages = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)
    assert [m.metadata.dst_node_id for m in messages].count(5) == 1
    assert old not in [m.metadata.dst_node_id for m in messages]


def test_an_app_without_a_query_function_is_warned_that_rows_are_lost(
    data: FederatedData, caplog: pytest.LogCaptureFixture
) -> None:
    grid = grid_of(data, network())
    own = grid.answer

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.QUERY:
            raise ValueError("no query function registered")
        return own(message, context)

    grid.answer = answer
    strategy = strategy_of()
    strategy.start(grid, strategy.arrays(), num_rounds=1)
    assert sorted(strategy.clients.values()) == sorted(f"node {node}" for node in grid.configs)
    assert "lost if it restarts" in caplog.text
    asked = [m for m in grid.sent if m.metadata.message_type == MessageType.QUERY]
    assert len(asked) == N, "each node is asked once"


def test_more_clients_than_rows_are_not_asked(data: FederatedData, caplog: pytest.LogCaptureFixture) -> None:
    strategy = strategy_of(num_clients=4)
    messages = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid_of(data, network()))
    assert len(messages) == 4
    assert dict(strategy.clients) == {i: str(i) for i in range(4)}
    assert "5 is not asked" in caplog.text


def test_too_few_clients_end_the_waiting(data: FederatedData) -> None:
    strategy = strategy_of(patience=0.01)
    grid = grid_of(data, network())
    grid.configs.popitem()
    with pytest.raises(FedmergeError, match=r"5 of 6 clients are connected after 0\.01 s \(patience\)"):
        strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)


def test_a_share_of_the_clients_is_asked_and_others_are_evaluated_too(data: FederatedData) -> None:
    strategy, grid = strategy_of("fedavg", fraction=0.5), grid_of(data, network())
    strategy.start(grid, strategy.arrays(), num_rounds=2)
    kinds = [m.metadata.message_type for m in grid.sent]
    assert (kinds.count(MessageType.TRAIN), kinds.count(MessageType.EVALUATE)) == (6, 12)


def test_arrays_that_would_be_ignored_are_refused(data: FederatedData) -> None:
    strategy, grid = strategy_of(), grid_of(data, network())
    strategy.configure_train(1, ArrayRecord(network().state_dict()), ConfigRecord(), grid)
    strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    with pytest.raises(UsageError, match="initial_arrays: other names or values"):
        strategy.configure_train(1, ArrayRecord(nn.Linear(2, 2).state_dict()), ConfigRecord(), grid)


def test_frozen_parameters_are_not_sent_and_need_not_come_back(data: FederatedData) -> None:
    module = network(norm=False)
    module[0].requires_grad_(False)
    strategy = strategy_of("fedavg", model=module)
    assert list(strategy.arrays()) == ["2.weight", "2.bias"]


def test_a_user_config_is_passed_on_and_not_changed(data: FederatedData) -> None:
    strategy, config = strategy_of("fedprox"), ConfigRecord({"lr": 0.5})
    message = strategy.configure_train(1, strategy.arrays(), config, grid_of(data, network()))[0]
    assert dict(message.content.config_records["config"]) == {"lr": 0.5, "server-round": 1, "proximal-mu": 0.01}
    assert dict(config) == {"lr": 0.5}


def test_wrong_numbers_are_one_message() -> None:
    with pytest.raises(UsageError) as caught:
        strategy_of(num_clients=3, min_nodes=4, patience=float("nan"))
    assert str(caught.value).splitlines() == [
        "min_nodes: got 4; expected 1..3, the number of clients",
        "patience: got nan; expected seconds > 0",
    ]
    with pytest.raises(UsageError, match="model: got a int"):
        strategy_of(model=3)
    with pytest.raises(UsageError, match="not known; known: none"):
        strategy_of().arrays_of("x")


def example_app() -> Any:
    path = Path(__file__).parents[2] / "examples" / "flower_strategy.py"
    spec = importlib.util.spec_from_file_location("flower_strategy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_beats_one_model_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    app, means = example_app(), {}
    for method in ("fedavg", "fedmerge"):
        configs = {100 + i: {"partition-id": i, "num-partitions": 10} for i in range(10)}
        grid = HereGrid(app.client, configs)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"rounds": 12})
        app.FedMergeStrategy = partial(lambda _, method, **rest: FedMergeStrategy(method, **rest), method=method)
        app.server(grid, context)
        said = capsys.readouterr().out
        assert said.count("accuracy") == 10
        means[method] = np.mean([float(line.split()[-2]) for line in said.splitlines()])
    assert means["fedmerge"] > means["fedavg"] + 20, means
