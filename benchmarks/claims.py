"""The first claims, measured: permuted labels and IID clients on Fashion-MNIST.

Run from the repository's root::

    python benchmarks/claims.py --jobs 2

Every method is tuned alike: local learning rate on one bracketed grid, chosen by validation accuracy on a tuning seed
that is not among the reported ones. Writes ``benchmarks/results/claims.md`` and ``claims.csv``.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from fedmerge import __version__
from fedmerge.experiment.comparison import plan, run_jobs
from fedmerge.experiment.record import RunRecord
from fedmerge.report import comparison_table, runs_frame

TUNING_SEED = 1000
SEEDS = (0, 1, 2)
RATES = (0.03, 0.1, 0.3)
ROUNDS = 100
METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedmerge": {"name": "fedmerge"},
    "fedmerge d=5": {"name": "fedmerge", "num_models": 5},
    "fedmerge official": {"name": "fedmerge", "rule": "official", "num_models": 5},
    "oracle": {"name": "oracle"},
    "oracle, momentum": {"name": "oracle", "server_momentum": 0.5},
    "fesem": {"name": "fesem", "num_models": 5},
    "ifca": {"name": "ifca", "num_models": 5},
    "fedavg": {"name": "fedavg"},
    "fedavg, momentum": {"name": "fedavg", "server_momentum": 0.5},
    "fedprox": {"name": "fedprox"},
    "local": {"name": "local"},
}
PARTITIONS = ("permuted", "iid")


def base(partition: str) -> dict[str, Any]:
    """What all runs of a setting share: 50 clients, 64 training, 40 validation, 200 test images each."""
    return {
        "source": {"name": "fashion-mnist"},
        "partition": {"name": partition, "clients": 50, "train": 64, "validation": 40, "test": 200},
        "rounds": ROUNDS,
        "evaluate_every": 10,
    }


def methods_of(partition: str) -> list[str]:
    """IID clients have no groups for an oracle."""
    return [label for label in METHODS if partition != "iid" or not label.startswith("oracle")]


def tuned_rates(partition: str, folder: Path, processes: int) -> dict[str, float]:
    """Each method's learning rate: the best last-round validation accuracy on the tuning seed."""
    tables = [
        {**METHODS[label], "label": f"{label} @ {rate}", "training": {"lr": rate}}
        for label in methods_of(partition)
        for rate in RATES
    ]
    runs = run_jobs(plan(base(partition), tables, [TUNING_SEED]), folder, processes=processes)
    found = {run.label: run.selected().validation for run in runs}
    score = {label: 0.0 if scores is None else scores.mean_accuracy() for label, scores in found.items()}
    return {
        label: max(RATES, key=lambda rate, label=label: score[f"{label} @ {rate}"])  # type: ignore[misc]
        for label in methods_of(partition)
    }


def measured(partition: str, rates: Mapping[str, float], folder: Path, processes: int) -> tuple[RunRecord, ...]:
    """The reported runs."""
    tables = [{**METHODS[label], "label": label, "training": {"lr": rates[label]}} for label in methods_of(partition)]
    return run_jobs(plan(base(partition), tables, SEEDS), folder, processes=processes)


def last_accuracy(runs: Sequence[RunRecord], label: str) -> np.ndarray[Any, Any]:
    """Test accuracy in percent at the round that validation selects, by seed."""
    found = sorted((run for run in runs if run.label == label), key=lambda run: run.seed)
    scores = [run.selected().test for run in found]
    return np.array([100 * score.mean_accuracy() for score in scores if score is not None])


def difference(runs: Sequence[RunRecord], left: str, right: str) -> tuple[float, float]:
    """Mean paired difference over seeds in points, and half its 95 % t interval."""
    gaps = last_accuracy(runs, left) - last_accuracy(runs, right)
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return float(gaps.mean()), float(half)


def claim(runs: Sequence[RunRecord], left: str, right: str, demand: float) -> str:
    """One line: difference, interval, and whether the demand is met by the mean."""
    mean, half = difference(runs, left, right)
    verdict = "met" if mean >= demand else "**missed**"
    return f"| {left} − {right} | {mean:+.2f} ± {half:.2f} | ≥ {demand:+.1f} | {verdict} |"


def main() -> None:
    """Tunes, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    sections, frames, claims = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for partition in PARTITIONS:
            rates = tuned_rates(partition, Path(scratch) / f"{partition}-tuning", options.jobs)
            runs = measured(partition, rates, Path(scratch) / partition, options.jobs)
            frames.append(runs_frame(runs))
            chosen = ", ".join(f"{label} {rate}" for label, rate in rates.items())
            table = comparison_table(runs, reference="fedmerge").markdown()
            sections.append(f"## {partition}\n\n{table}\n\nLearning rates chosen on validation: {chosen}.\n")
            if partition == "permuted":
                for ours in ("fedmerge", "fedmerge d=5"):
                    claims.append(claim(runs, ours, "oracle", -0.8))
                    claims.append(claim(runs, ours, "oracle, momentum", -0.8))
                    claims.append(claim(runs, ours, "fedmerge official", 8.0))
            else:
                claims.append(claim(runs, "fedmerge", "fedavg", -0.3))
                claims.append(claim(runs, "fedmerge", "fedavg, momentum", -0.3))
    text = f"""# First claims

Command: `python benchmarks/claims.py --jobs {options.jobs}`; fedmerge {__version__}, torch {torch.__version__},
Python {platform.python_version()}, {platform.machine()}.

Fashion-MNIST (28 x 28), MLP 784-64-10, 50 clients with 64 training, 40 validation and 200 test images each,
{ROUNDS} rounds of 2 local epochs, batch 32, all clients every round, seeds {", ".join(map(str, SEEDS))} (split, initial
weights and batches change together). Learning rate of every method from {{{", ".join(map(str, RATES))}}} by validation
on seed {TUNING_SEED}, which is not reported. Accuracy in percent on each client's own test images at the round that
validation selects, mean over clients.

| paired difference (points) | mean ± 95 % t interval | demand | |
|---|---|---|---|
{chr(10).join(claims)}

{chr(10).join(sections)}"""
    (options.out / "claims.md").write_text(text, encoding="utf-8")
    pd.concat(frames).to_csv(options.out / "claims.csv", index=False)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
