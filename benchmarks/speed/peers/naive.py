"""The loop that one writes first: a copy of the network for each client, torch.optim.SGD, an average at the end.

Variants, joined by ``+``: ``channels_last`` lays images and weights out so; ``loader`` takes a shuffling DataLoader in
place of indices; ``reused`` gives each client the server's weights in one module in place of a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from talk import Peer, marked_network, options, own_channel, serve
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from workloads import Examples, Workload, federation, order


@dataclass(frozen=True)
class Naive:
    """The loop.

    Attributes:
        workload: What is trained.
        data: Of each client.
        server: The network that is averaged; changed by each round.
        variants: Of the loop.
    """

    workload: Workload
    data: Sequence[Examples]
    server: nn.Module
    variants: frozenset[str] = frozenset()

    def play(self, round_number: int) -> None:
        """One round of FedAvg; clients are alike in size."""
        sums = {name: torch.zeros_like(value) for name, value in trained(self.server).items()}
        spare = copy.deepcopy(self.server) if "reused" in self.variants else None
        for client in range(len(self.data)):
            module = self.given(spare)
            self.train(module, round_number, client)
            for name, value in trained(module).items():
                sums[name] += value
        for name, value in trained(self.server).items():
            value.copy_(sums[name] / len(self.data))

    def given(self, spare: nn.Module | None) -> nn.Module:
        """A client's network at its start."""
        if spare is None:
            return copy.deepcopy(self.server)
        for name, value in trained(self.server).items():
            trained(spare)[name].copy_(value)
        return spare

    def train(self, module: nn.Module, round_number: int, client: int) -> None:
        """One client's steps."""
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), lr=self.workload.lr)
        for inputs, targets in self.batches(round_number, client):
            loss = functional.cross_entropy(module(inputs), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def batches(self, round_number: int, client: int) -> Iterator[Sequence[Tensor]]:
        """One client's batches in the order of the workload, or in the loader's own."""
        inputs, targets = self.data[client]
        if "loader" in self.variants:
            loader = DataLoader(TensorDataset(inputs, targets), self.workload.batch, shuffle=True)
            for _ in range(self.workload.epochs):
                yield from loader
            return
        for index in order(self.workload, round_number, client):
            where = torch.from_numpy(index)
            yield inputs[where], targets[where]


def trained(module: nn.Module) -> dict[str, Tensor]:
    """What is averaged: trainable parameters and buffers."""
    found = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return found | dict(module.named_buffers())


def naive(workload: Workload, variants: frozenset[str] = frozenset()) -> Naive:
    """The loop on a workload."""
    server, data = marked_network(workload), federation(workload)
    if "channels_last" in variants:
        server = server.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        data = [Examples(x.contiguous(memory_format=torch.channels_last), y) for x, y in data]
    return Naive(workload, data, server, variants)


def main() -> None:
    """Serves."""
    channel, asked = own_channel(), options()
    loop = naive(asked.workload, frozenset(filter(None, asked.variant.split("+"))))
    numbers = iter(range(1, 1 << 30))
    watched = ((Naive, "given", "copies"),)
    serve(Peer(lambda: loop.play(next(numbers)), watched=watched), channel)


if __name__ == "__main__":
    main()
