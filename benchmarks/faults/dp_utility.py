"""What privacy of clients costs on Fashion-MNIST: accuracy over epsilon, for one, two and five shared models.

``python benchmarks/faults/dp_utility.py`` writes benchmarks/results/faults/dp_utility.md. Clip, rates and rounds were
chosen on seed 0; the table is of other seeds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import fedmerge
from fedmerge.privacy import forecast, noise_for

OUT = Path(__file__).parent.parent / "results" / "faults" / "dp_utility.md"
N, RATE, ROUNDS, CLIP, DELTA, SEEDS = 1000, 0.2, 60, 0.5, 1e-5, (1, 2)
EPSILONS = (None, 8.0, 2.0, 0.5)
RUN: dict[str, Any] = {
    "source": {"name": "fashion-mnist", "size": 14},
    "partition": {"name": "rotations", "clients": N, "train": 24, "validation": 4, "test": 16},
    "model": {"name": "mlp", "hidden": []},
    "training": {"lr": 0.1, "epochs": 2, "batch_size": 12},
    "rounds": ROUNDS,
    "fraction": RATE,
    "evaluate_every": ROUNDS,
    "select": "last",
    "participation": {"sampling": "poisson", "quorum": 0.0},
    "defences": {"clip": 0.0, "max_count": 0.0},
    "checkpoint_every": 0,
}


def accuracy(method: Mapping[str, object], seed: int) -> tuple[float, int]:
    record = fedmerge.run_config({**RUN, "method": method, "seed": seed}).record
    last = record.last()
    assert last.test is not None
    return last.test.mean_accuracy(), record.num_params


def private(d: int, z: float) -> dict[str, object]:
    return {
        "name": "dp-fedmerge",
        "num_models": d,
        "noise_multiplier": z,
        "clip": CLIP,
        "sampling_rate": RATE,
        "delta": DELTA,
        "force": True,
    }


def main() -> None:
    began, lines = time.perf_counter(), []
    for target in EPSILONS:
        z = 0.0 if target is None else noise_for(target, RATE, ROUNDS, DELTA)
        cells, ratios = [], []
        for d in (1, 2, 5):
            found = [accuracy(private(d, z), seed) for seed in SEEDS]
            cells.append(f"{100 * mean(score for score, _ in found):.1f}")
            expected = forecast(
                noise_multiplier=z,
                clip=CLIP,
                sampling_rate=RATE,
                rounds=ROUNDS,
                delta=DELTA,
                num_clients=N,
                num_models=d,
                num_params=found[0][1],
            )
            ratios.append(f"{expected.snr:.2f}")
        name = "no noise" if target is None else f"{target:g}"
        lines.append(f"| {name} | {z:.2f} | {' | '.join(cells)} | {', '.join(ratios)} |")
        print(lines[-1], flush=True)
    others = {
        name: mean(accuracy(method, seed)[0] for seed in SEEDS)
        for name, method in {"fedavg": {"name": "fedavg"}, "fedmerge, d found": {"name": "fedmerge"}}.items()
    }
    text = f"""`OMP_NUM_THREADS=1 python benchmarks/faults/dp_utility.py`

# Accuracy over epsilon

Fashion-MNIST at 14 × 14 in five rotations, {N} clients with 24 training images each, linear network of 1,970
parameters, {ROUNDS} rounds, Poisson cohorts of {100 * RATE:g} %, clip {CLIP}, delta {DELTA:g}, mean test accuracy in %
of the last round over seeds {SEEDS}. *Ratio* is the forecast's signal-to-noise ratio for d = 1, 2, 5.
{time.perf_counter() - began:.0f} seconds.

| epsilon | z | d = 1 | d = 2 | d = 5 | ratio |
|---|---|---|---|---|---|
{chr(10).join(lines)}

Without privacy: {", ".join(f"{name} {100 * score:.1f}" for name, score in others.items())}.
"""
    OUT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
