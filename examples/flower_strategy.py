"""An app of Flower's with a strategy of fedmerge: half of the clients call the digits by other names.

Needs ``pip install "fedmerge[flower]"`` and, for a simulation, ``pip install "flwr[simulation]>=1.41,<1.43"``. Put this
file beside a ``pyproject.toml`` and say ``flwr run . --stream --federation-config "num-supernodes=10"``::

    [project]
    name = "digits"
    version = "1.0"
    requires-python = ">=3.11"

    [tool.flwr.app]
    publisher = "you"

    [tool.flwr.app.components]
    serverapp = "flower_strategy:server"
    clientapp = "flower_strategy:client"

    [tool.flwr.app.config]
    rounds = 20

All but `FedMergeStrategy` and `tell_client_key` is plain Flower. On machines of their own, clients are told apart by
``flower-supernode ... --node-config 'client-key="clinic-a" partition-id=0 num-partitions=10'``.
"""

from __future__ import annotations

from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmerge.deploy.flower.nodes import tell_client_key
from fedmerge.deploy.flower.strategy import FedMergeStrategy

CLIENTS = 10
server = ServerApp()
client = ClientApp()
client.query()(tell_client_key)


def network() -> nn.Module:
    """Any module will do."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All of them: images [1797, 64] and their names."""
    images, names = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(names)


def examples(context: Context) -> tuple[Tensor, Tensor]:
    """This client's digits; every second client calls digit k by the name 9 − k."""
    place, places = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    x, y = (part[place::places] for part in digits())
    return x, 9 - y if place % 2 else y


@client.train()
def train(message: Message, context: Context) -> Message:
    """Trains what it is sent on the first three quarters of its examples."""
    x, y = examples(context)
    x, y = x[: 3 * len(x) // 4], y[: 3 * len(y) // 4]
    module, config = network(), message.content.config_records["config"]
    module.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    received = [parameter.detach().clone() for parameter in module.parameters()]
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(int(config["server-round"]))  # type: ignore[arg-type]
    order = torch.randperm(len(x), generator=generator)
    for batch in (order[start : start + 16] for start in range(0, len(x), 16)):
        optimiser.zero_grad()
        pulled = sum((own - at).square().sum() for own, at in zip(module.parameters(), received, strict=True))
        loss = cross_entropy(module(x[batch]), y[batch]) + float(config["proximal-mu"]) / 2 * pulled  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    metrics = MetricRecord({"num-examples": len(x), "loss": float(loss.detach())})
    return Message(RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Scores its own model on the last quarter."""
    x, y = examples(context)
    x, y = x[3 * len(x) // 4 :], y[3 * len(y) // 4 :]
    module = network()
    module.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    right = (module(x).argmax(dim=1) == y).float().mean()
    metrics = MetricRecord({"num-examples": len(x), "accuracy": float(right)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation and says how good every client's own model is."""
    strategy = FedMergeStrategy("fedmerge", model=network, num_clients=CLIENTS, seed=1)
    rounds = int(context.run_config["rounds"])
    strategy.start(grid, strategy.arrays(), num_rounds=rounds)
    for key, metrics in sorted(strategy.history.evaluate[rounds].items()):
        print(f"client {key}: accuracy {100 * metrics['accuracy']:.0f} %")
