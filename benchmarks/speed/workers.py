"""Two worker processes against one process: seconds of a round and of its clients, interleaved.

Run from the repository's root on an otherwise idle machine of at least two processors::

    OMP_NUM_THREADS=1 python benchmarks/speed/workers.py

Writes ``benchmarks/results/speed/workers.md``. The workloads are those of `workloads`; FedMerge with five models,
everyone in every round, the engine that the rule of ``runtime=auto`` takes. Both sides must end with the same bits.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from workloads import Workload, examples, workload_of

from fedmerge import __version__
from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.core.protocol import state_tensors
from fedmerge.data import ClientData, Examples, FederatedData
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.simulation import Progress, Setup, advance, one_thread, prepare
from fedmerge.experiment.spread import dismiss
from fedmerge.models import NETWORKS
from fedmerge.runtime.workers import Workers
from fedmerge.training import LocalTraining

PLAYED = {"logistic": 1000, "mlp": 1000, "cnn": 100, "resnet9": 12}
WARM_UP = 1
METHOD = FedMerge(num_models=5, initial="noise")
WANTED = 1.6


def federation(workload: Workload) -> FederatedData:
    """The workload's clients; what they are tested on is not looked at."""
    made = [Examples(*examples(workload, client)) for client in range(workload.played)]
    few = Examples(made[0].inputs[:1], made[0].targets[:1])
    clients = tuple(ClientData(str(number), own, few, few) for number, own in enumerate(made))
    return FederatedData(clients, tuple(str(label) for label in range(workload.classes)))


@dataclass
class Side:
    """One of the two, as it goes.

    Attributes:
        setup: Of its run.
        progress: Where it stands.
        rounds: Seconds of each round.
        clients: Seconds of each round's clients: all but the server.
        processor: Processor seconds of each round's clients, of all processes together.
    """

    setup: Setup
    progress: Progress
    rounds: list[float] = field(default_factory=list)
    clients: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def play(self) -> None:
        """One round, measured."""
        engine = self.setup.engine
        inner: Callable[..., Any] = type(engine).map

        def watched(*arguments: Any) -> list[Any]:
            began, busy = time.perf_counter(), _processor_seconds(engine)
            results: list[Any] = inner(engine, *arguments)
            self.clients.append(time.perf_counter() - began)
            self.processor.append(_processor_seconds(engine) - busy)
            return results

        vars(engine)["map"] = watched
        began = time.perf_counter()
        self.progress, _ = advance(self.setup, self.progress)
        self.rounds.append(time.perf_counter() - began)
        del vars(engine)["map"]


def _processor_seconds(engine: Any) -> float:
    """Of this process and of the workers, as far as the system tells it."""
    workers = engine.processes() if isinstance(engine, Workers) else []
    return time.process_time() + sum(_of_process(pid) for pid in workers)


def _of_process(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(workload: Workload, repeats: int) -> dict[int, Side]:
    """Both sides by their number of workers."""
    data, model = federation(workload), NETWORKS[workload.model].cls(**workload.options)
    training = LocalTraining(lr=workload.lr, batch_size=workload.batch, epochs=workload.epochs)
    sides: dict[int, Side] = {}
    choice = None
    for workers in (1, 2):
        options = RunOptions(rounds=1, workers=workers)
        sides[workers] = Side(*prepare(METHOD, data, model, training, options, choice=choice))
        choice = sides[workers].setup.choice
    for _ in range(WARM_UP + repeats):
        for side in sides.values():
            side.play()
    one, two = (state_tensors(side.progress.state) for side in sides.values())
    same = all(one[name].numpy().tobytes() == two[name].numpy().tobytes() for name in one)  # NaN included
    assert same, f"{workload.name}: other bits"
    for side in sides.values():
        dismiss(side.setup.engine)
    return sides


def row(workload: Workload, sides: dict[int, Side]) -> str:
    """A line of the table."""
    one, two = sides[1], sides[2]

    def seconds(values: list[float]) -> float:
        return median(values[WARM_UP:])

    pairs = [a / b for a, b in zip(one.clients[WARM_UP:], two.clients[WARM_UP:], strict=True)]
    cells = [
        workload.name,
        f"{workload.played:,}",
        one.setup.choice.runtime,
        f"{seconds(one.clients):.2f}",
        f"{seconds(two.clients):.2f}",
        f"{seconds(one.clients) / seconds(two.clients):.2f}",
        f"{min(pairs):.2f} – {max(pairs):.2f}",
        f"{seconds(one.rounds) / seconds(two.rounds):.2f}",
        f"{seconds(two.processor) / seconds(one.processor):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def page(rows: list[str], names: list[str], repeats: int, load: float) -> str:
    """The result as a page."""
    heads = (
        "workload", "clients", "engine", "clients, 1 process (s)", "2 workers (s)", "ratio", "smallest – largest",
        "ratio of whole rounds", "processor time",
    )  # fmt: skip
    return f"""# Workers: two processes against one

Command: `python benchmarks/speed/workers.py {" ".join(names)} --repeats {repeats}`; fedmerge {__version__},
torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} processors, load
before the start {load:.1f}. One thread in every process.

FedMerge with five models; all clients in every round; {repeats} rounds of each, interleaved, after {WARM_UP} to warm
up; medians. *Clients* is all of a round but the server's step, which one process does either way. Above 1 the two
workers are faster; {WANTED} is what they ought to reach on an idle machine. Processor time is that of all processes
together, over that of one: what it is above 1 is the price of sending vectors, and of two that share caches and memory.
Both sides ended with the same bits.

| {" | ".join(heads)} |
|{"---|" * len(heads)}
{chr(10).join(rows)}
"""


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=[*PLAYED], help=f"of {', '.join(PLAYED)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "speed")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    load, rows = os.getloadavg()[0], []
    with one_thread():
        for name in options.workloads:
            workload = workload_of(name, PLAYED[name])
            rows.append(row(workload, measured(workload, options.repeats)))
            sys.stderr.write(rows[-1] + "\n")
    text = page(rows, options.workloads, options.repeats, load)
    (options.out / "workers.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
