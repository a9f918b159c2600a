"""What a round takes beside its clients' forward and backward passes and updates: interleaved, ratio of medians.

Run from the repository's root on an otherwise idle machine::

    OMP_NUM_THREADS=1 python benchmarks/speed/overhead.py

Writes ``benchmarks/results/speed/overhead.md``. FedMerge with five models, everyone in every round, one thread. A round
is all that `advance` does: drawing batches, what the server sends, training, the gate, the defences and the server's
step. The training alone is that of the same engine on batches that are drawn and stacked already, from one vector.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from workers import METHOD, federation
from workloads import workload_of

from fedmerge import __version__
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.simulation import Progress, Setup, advance, one_thread, prepare
from fedmerge.models import NETWORKS
from fedmerge.runtime import Folded
from fedmerge.training import LocalTraining, Planned
from fedmerge.training.batches import drawn_together

PLAYED = {"logistic": 1000, "mlp": 1000, "cnn": 100, "resnet9": 6}
RUNTIMES = ("sequential", "auto")
ALLOWED = 0.05


def prepared(name: str, runtime: Any) -> tuple[Setup, Progress]:
    """A run on a workload of `workloads` before its first round."""
    workload = workload_of(name, PLAYED[name])
    model = NETWORKS[workload.model].cls(**workload.options)
    training = LocalTraining(lr=workload.lr, batch_size=workload.batch, epochs=workload.epochs)
    return prepare(METHOD, federation(workload), model, training, RunOptions(rounds=1000, runtime=runtime))


def training_alone(setup: Setup) -> Callable[[], None]:
    """Trains all clients for a round on batches that lie ready."""
    start = setup.layout.read(setup.module)
    plans = [Planned(c.train, setup.training, setup.training.lr, 0, 1, i) for i, c in enumerate(setup.data.clients)]
    engine: Any = setup.engine  # the task within is no public part of it
    if not isinstance(setup.engine, Folded):
        drawn = [plan.drawn() for plan in plans]

        def one_by_one() -> None:
            for steps in drawn:
                engine._task.train(start, steps)

        return one_by_one
    chunks = list(engine.chunks([(start, plan) for plan in plans]))
    stacked = [(start.repeat(len(chunk), 1), drawn_together([plans[i] for i in chunk])) for chunk in chunks]
    descent = setup.training.descent()

    def folded() -> None:
        for params, steps in stacked:
            engine._task._fold(params).train(params, steps, descent)

    return folded


def timed(call: Callable[[], Any]) -> float:
    """Processor seconds."""
    began = time.process_time()
    call()
    return time.process_time() - began


def row(name: str, runtime: str, repeats: int) -> str:
    """One line of the table."""
    setup, progress = prepared(name, runtime)
    alone = training_alone(setup)
    rounds, bare = [], []
    for number in range(repeats + 1):
        began = time.process_time()
        progress, _ = advance(setup, progress)
        taken = time.process_time() - began
        if number:
            rounds.append(taken)
            bare.append(timed(alone))
        else:
            alone()
    share = 1 - median(bare) / median(rounds)
    spread = sorted(1 - b / r for b, r in zip(bare, rounds, strict=True))
    choice = setup.choice
    engine = choice.runtime + (f" by {choice.most}" if choice.most else "") + (", kernels" if choice.kernels else "")
    verdict = "met" if share <= ALLOWED else "missed"
    return (
        f"| {name} | {PLAYED[name]:,} | {runtime} ({engine}) | {1000 * median(rounds):.0f} | {1000 * median(bare):.0f} "
        f"| {100 * share:.1f} % | {100 * spread[0]:.1f} – {100 * spread[-1]:.1f} % | {verdict} |"
    )


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workloads", nargs="*", default=list(PLAYED))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results" / "speed")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with one_thread():
        for name in asked.workloads:
            for runtime in RUNTIMES:
                rows.append(row(name, runtime, asked.repeats))
                sys.stderr.write(rows[-1] + "\n")
    text = f"""# What a round takes beside training

Command: `python benchmarks/speed/overhead.py --repeats {asked.repeats}`; fedmerge {__version__},
torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread.

Processor milliseconds of a round of FedMerge with five models, and of its clients' training alone on batches that lie
ready; interleaved, {asked.repeats} repeats, medians. The rest is everything else: drawing, sending, gate, defences and
the server's step. At most {ALLOWED:.0%} is wanted.

| workload | clients | engine | round (ms) | training alone (ms) | rest | smallest – largest | goal |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
    (asked.out / "overhead.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
