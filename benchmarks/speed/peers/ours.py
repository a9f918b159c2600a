"""This package: the round loop of its simulations, without evaluation.

The variant is a runtime, as `RunOptions` names it; ``RUNTIME+authors`` plays FedMerge with five models and the authors'
published rule in place of FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from naive import naive
from talk import Peer, counting, marked_network, options, own_channel, serve
from torch import Tensor
from workloads import SEED, Workload, federation

from fedmerge.algorithms import ALGORITHMS
from fedmerge.data import ClientData, FederatedData
from fedmerge.data import Examples as OwnExamples
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.simulation import Progress, Setup, advance, evaluate, prepare
from fedmerge.training import LocalTraining

FIVE_MODELS = {"num_models": 5, "rule": "official"}
CLOSE = 1e-6
"""Of the way that the average moves: the two round apart by less (2e-8 on adapters, 4e-15 elsewhere)."""


@dataclass
class Ours:
    """A run and where it stands."""

    setup: Setup
    progress: Progress

    def play(self) -> Any:
        """One round; its record."""
        self.progress, record = advance(self.setup, self.progress)
        return record

    def evaluated(self) -> None:
        """One round and the scores of every client, as at the end of a run."""
        evaluate(self.setup, self.progress, self.play())

    def sent(self) -> Tensor:
        """[N, P] what every client would be sent now."""
        everyone = torch.arange(len(self.setup.data.clients))
        down: Tensor = self.setup.played.send(self.progress.state, everyone)
        return down

    def average(self) -> Tensor:
        """[P] the server's one model."""
        return self.sent()[0]


def ours(workload: Workload, runtime: str, *, authors: bool = False) -> Ours:
    """A run on a workload before its first round."""
    data = FederatedData(_clients(workload), tuple(str(k) for k in range(workload.classes)))
    training = LocalTraining(lr=workload.lr, batch_size=workload.batch, epochs=workload.epochs)
    run: dict[str, Any] = {"rounds": 1000, "seed": SEED, "runtime": runtime}
    run["precision"] = "float64" if workload.dtype == torch.float64 else "float32"
    method: Any = ALGORITHMS["fedmerge"].cls(**FIVE_MODELS) if authors else ALGORITHMS["fedavg"].cls()
    return Ours(*prepare(method, data, marked_network(workload), training, RunOptions(**run)))


def _clients(workload: Workload) -> tuple[ClientData, ...]:
    """Clients with test examples as many as a tenth of the train examples, which are used in the round `evaluated`."""
    few = max(1, workload.examples // 10)
    found = []
    for i, (inputs, targets) in enumerate(federation(workload)):
        test = OwnExamples(inputs[:few], targets[:few])
        found.append(ClientData(str(i), OwnExamples(inputs, targets), test, test))
    return tuple(found)


def short(workload: Workload) -> Workload:
    """The workload with a few clients and steps, in float64: what two ways of running it can be compared on.

    In float32 rounding alone grows to a third of the way within fifty steps of ResNet-9.
    """
    played, examples = min(5, workload.clients), min(workload.examples, 3 * workload.batch)
    return replace(workload, played=played, examples=examples, dtype=torch.float64)


def against_naive(workload: Workload, runtime: str) -> float:
    """How far one round here ends from one of the naive loop on the same batches, as a part of the way."""
    few = short(workload)
    run, loop = ours(few, runtime), naive(few)
    start = run.average()
    loop.play(1)
    run.play()
    wanted = run.setup.layout.read(loop.server)
    return float((run.average() - wanted).norm() / (wanted - start).norm())


def against_sequential(workload: Workload, runtime: str) -> float:
    """The same for FedMerge with the authors' rule, against the sequential runtime and for all clients' models."""
    run, other = (ours(short(workload), name, authors=True) for name in (runtime, "sequential"))
    start = run.sent()
    run.play()
    other.play()
    return float((run.sent() - other.sent()).norm() / (other.sent() - start).norm())


def counted(run: Ours, workload: Workload, runtime: str, *, authors: bool) -> dict[str, Any]:
    """The plan's steps if the reference is reached; of the authors' rule run sequentially the calls of the network."""
    with counting() as sizes:
        run.play()
    if authors and runtime == "sequential":
        return {"steps": len(sizes), "examples": sum(sizes)}
    difference = (against_sequential if authors else against_naive)(workload, runtime)
    return {"steps": workload.steps * workload.played if difference < CLOSE else -1, "difference": difference}


def main() -> None:
    """Serves."""
    channel, asked = own_channel(), options()
    runtime, _, method = asked.variant.partition("+")
    run = ours(asked.workload, runtime, authors=method == "authors")
    facts = {"engine": type(run.setup.engine).__name__}
    peer = Peer(
        run.play,
        run.evaluated,
        lambda: counted(run, asked.workload, runtime, authors=method == "authors"),
        watched=((type(run.setup.played), "receive", "server"),),
        package="fedmerge",
        facts=facts,
    )
    serve(peer, channel)


if __name__ == "__main__":
    main()
