"""The ClientApp of `flower.py`, in a file of its own because Ray's actor imports it.

The network is made for every message and given the arrays, as in Flower's own examples; a client's examples are kept in
the actor's process.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from talk import counting, marked_network
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from workloads import Examples, Workload, examples, workload_of


@cache
def _kept(name: str, client: int) -> Examples:
    """A client's examples, made once in the actor's process."""
    return examples(workload_of(name), client)


def client_app(workload: Workload) -> ClientApp:
    """The usual PyTorch loop behind Flower's messages."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        module, loader = _model(workload, message).train(), _loader(workload, context)
        counted = message.content.config_records["config"]["count"]
        with ExitStack() as stack:
            sizes = stack.enter_context(counting()) if counted else []
            began = time.process_time()
            _descend(workload, module, loader)
            seconds = time.process_time() - began
        metrics = MetricRecord({"num-examples": workload.examples, "steps": len(sizes), "seconds": seconds})
        content = RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        module, (inputs, targets) = _model(workload, message).eval(), _kept(workload.name, _client(context))
        few = max(1, workload.examples // 10)
        with torch.no_grad():
            loss = functional.cross_entropy(module(inputs[:few]), targets[:few]).item()
        return Message(
            content=RecordDict({"metrics": MetricRecord({"num-examples": few, "loss": loss})}), reply_to=message
        )

    return app


def _descend(workload: Workload, module: nn.Module, loader: DataLoader[Any]) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=workload.lr)
    for _ in range(workload.epochs):
        for inputs, targets in loader:
            loss = functional.cross_entropy(module(inputs), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _model(workload: Workload, message: Message) -> nn.Module:
    module = marked_network(workload)
    module.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    return module


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _loader(workload: Workload, context: Context) -> DataLoader[Any]:
    examples_of_client = _kept(workload.name, _client(context))
    return DataLoader(TensorDataset(*examples_of_client), workload.batch, shuffle=True)
