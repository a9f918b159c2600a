"""The first claims, measured: permuted labels and IID clients on Fashion-MNIST.

Run from the repository's root::

    python benchmarks/claims.py --jobs 2

Every method is tuned alike: its local learning rate by validation accuracy on a tuning seed that is not among the
reported ones, on a grid that grows until the best rate is not at its edge. Permuted labels are also measured at one
rate for all. Writes ``benchmarks/results/claims.md`` and ``claims.csv``.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fedmerge import __version__
from fedmerge.core.errors import FedmergeError
from fedmerge.experiment.comparison import Job, plan, run_jobs
from fedmerge.experiment.record import RunRecord, read_run
from fedmerge.report import comparison_table, runs_frame
from fedmerge.report.statistics import paired_interval
from fedmerge.report.study import client_accuracies

TUNING_SEED = 1000
SEEDS = (0, 1, 2)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
FIRST_RATES = (0.03, 0.1, 0.3)
SAME_RATE = 0.1
ROUNDS = 100
METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedmerge": {"name": "fedmerge"},
    "fedmerge d=5": {"name": "fedmerge", "num_models": 5},
    "official": {"name": "fedmerge", "rule": "official", "num_models": 5},
    "oracle": {"name": "oracle"},
    "oracle, momentum": {"name": "oracle", "server_momentum": 0.5},
    "fesem": {"name": "fesem", "num_models": 5},
    "ifca": {"name": "ifca", "num_models": 5},
    "fedavg": {"name": "fedavg"},
    "fedavg, momentum": {"name": "fedavg", "server_momentum": 0.5},
    "fedprox": {"name": "fedprox"},
    "local": {"name": "local"},
}


@dataclass(frozen=True)
class Setting:
    """Data and network of one table."""

    title: str
    partition: str
    size: int
    hidden: int
    tuned: bool

    def base(self) -> dict[str, Any]:
        """What all runs share: 50 clients, 64 training, 40 validation, 200 test images each."""
        return {
            "source": {"name": "fashion-mnist", "size": self.size},
            "partition": {"name": self.partition, "clients": 50, "train": 64, "validation": 40, "test": 200},
            "model": {"name": "mlp", "hidden": [self.hidden]},
            "rounds": ROUNDS,
            "evaluate_every": 10,
        }

    def methods(self) -> list[str]:
        """IID clients have no groups for an oracle."""
        return [label for label in METHODS if self.partition != "iid" or not label.startswith("oracle")]


SETTINGS = (
    Setting("Permuted labels, 14 x 14, MLP 196-32-10, one rate for all", "permuted", 14, 32, tuned=False),
    Setting("Permuted labels, 14 x 14, MLP 196-32-10, every method tuned", "permuted", 14, 32, tuned=True),
    Setting("Permuted labels, 28 x 28, MLP 784-64-10, every method tuned", "permuted", 28, 64, tuned=True),
    Setting("IID, 14 x 14, MLP 196-32-10, every method tuned", "iid", 14, 32, tuned=True),
    Setting("IID, 28 x 28, MLP 784-64-10, every method tuned", "iid", 28, 64, tuned=True),
)
DEMANDS = {
    "permuted": (("oracle", -0.8), ("oracle, momentum", -0.8), ("official", 8.0)),
    "iid": (("fedavg", -0.3), ("fedavg, momentum", -0.3)),
}
Scores = dict[str, dict[float, float]]


def tuned_rates(setting: Setting, folder: Path, processes: int) -> tuple[dict[str, float], Scores]:
    """Each method's best rate on the tuning seed, and all that was tried.

    The grid of a method grows by one rate at a time while the best one is its smallest or largest.
    """
    scores: Scores = {label: {} for label in setting.methods()}
    wanted = {label: list(FIRST_RATES) for label in setting.methods()}
    step = 0
    while wanted:
        tables = [
            {**METHODS[label], "label": f"{label} @ {rate}", "training": {"lr": rate}}
            for label, rates in wanted.items()
            for rate in rates
        ]
        jobs = plan(setting.base(), tables, [TUNING_SEED])
        for name, score in validation_scores(jobs, folder / str(step), processes).items():
            label, _, rate = name.partition(" @ ")
            scores[label][float(rate)] = score
        wanted = {label: rates for label, tried in scores.items() if (rates := next_rates(tried))}
        step += 1
    return {label: max(tried, key=lambda rate, tried=tried: tried[rate]) for label, tried in scores.items()}, scores  # type: ignore[misc]


def validation_scores(jobs: Sequence[Job], folder: Path, processes: int) -> dict[str, float]:
    """Validation accuracy of every job by label; 0 for one whose training diverged."""
    found: dict[str, float] = {}
    waiting, attempt = list(jobs), 0
    while waiting:
        place = folder / f"attempt-{attempt}"
        with contextlib.suppress(FedmergeError):  # a diverged run ends the batch; the others are run again
            run_jobs(waiting, place, processes=processes)
        runs = {job.name: read_run(place / job.name) for job in waiting if (place / job.name / "run.json").exists()}
        ended = {name: run for name, run in runs.items() if run.status in ("finished", "failed")}
        if not ended:
            raise FedmergeError(f"none of {', '.join(job.name for job in waiting)} came to an end")
        for run in ended.values():
            validation = run.selected().validation
            assert validation is not None
            found[run.label] = validation.mean_accuracy() if run.status == "finished" else 0.0
        waiting, attempt = [job for job in waiting if job.name not in ended], attempt + 1
    return found


def next_rates(tried: Mapping[float, float]) -> list[float]:
    """The neighbour beyond the edge on which the best rate lies, if there is one."""
    best = max(tried, key=lambda rate: tried[rate])
    place = RATES.index(best)
    outside = [RATES[i] for i in (place - 1, place + 1) if 0 <= i < len(RATES)]
    return [rate for rate in outside if rate not in tried]


def difference(runs: Sequence[RunRecord], left: str, right: str) -> tuple[float, float]:
    """Mean paired difference over seeds in points, and half its 95 % t interval."""

    def accuracies(label: str) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        found = sorted((run for run in runs if run.label == label), key=lambda run: run.seed)
        return [100 * client_accuracies(run.selected()) for run in found]

    interval = paired_interval(accuracies(left), accuracies(right))
    return interval.mean, interval.half_width


def claims(setting: Setting, runs: Sequence[RunRecord]) -> list[str]:
    """A line per demand: difference, interval, and whether the mean meets it."""
    lines = []
    for other, demand in DEMANDS[setting.partition]:
        for ours in ("fedmerge", "fedmerge d=5") if setting.partition == "permuted" else ("fedmerge",):
            mean, half = difference(runs, ours, other)
            verdict = "met" if mean >= demand else "**missed**"
            lines.append(
                f"| {setting.title} | {ours} − {other} | {mean:+.2f} ± {half:.2f} | ≥ {demand:+.1f} | {verdict} |"
            )
    return lines


def measured(setting: Setting, folder: Path, processes: int) -> tuple[tuple[RunRecord, ...], str]:
    """The reported runs, and one paragraph on how their rates were chosen."""
    if setting.tuned:
        rates, scores = tuned_rates(setting, folder / "tuning", processes)
        grids = "; ".join(f"{label}: **{rates[label]}** of {sorted(tried)}" for label, tried in scores.items())
        how = f"Learning rates, chosen on validation of seed {TUNING_SEED}: {grids}."
    else:
        rates = dict.fromkeys(setting.methods(), SAME_RATE)
        how = f"Learning rate {SAME_RATE} for every method."
    tables = [{**METHODS[label], "label": label, "training": {"lr": rates[label]}} for label in setting.methods()]
    return run_jobs(plan(setting.base(), tables, SEEDS), folder / "runs", processes=processes), how


def main() -> None:
    """Tunes, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    sections, frames, lines = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, setting in enumerate(SETTINGS):
            runs, how = measured(setting, Path(scratch) / str(number), options.jobs)
            table = comparison_table(runs, reference="fedmerge").markdown()
            sections.append(f"## {setting.title}\n\n{table}\n{how}\n")
            frames.append(runs_frame(runs).assign(table=setting.title))
            lines += claims(setting, runs)
            sys.stderr.write(f"{setting.title}: done\n")
    text = f"""# First claims

Command: `python benchmarks/claims.py --jobs {options.jobs}`; fedmerge {__version__}, torch {torch.__version__},
Python {platform.python_version()}, {platform.machine()}.

Fashion-MNIST, 50 clients with 64 training, 40 validation and 200 test images each, {ROUNDS} rounds of 2 local epochs,
batch 32, all clients every round, seeds {", ".join(map(str, SEEDS))} (split, initial weights and batches change
together). Accuracy in percent on each client's own test images at the round that validation selects, mean over clients.

| setting | paired difference (points) | mean ± 95 % t interval | demand | |
|---|---|---|---|---|
{chr(10).join(lines)}

{chr(10).join(sections)}"""
    (options.out / "claims.md").write_text(text, encoding="utf-8")
    pd.concat(frames).to_csv(options.out / "claims.csv", index=False)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
