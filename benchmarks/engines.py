"""The two engines against each other: seconds per round, interleaved, ratio of medians.

Run from the repository's root on an otherwise idle machine::

    python benchmarks/engines.py

Writes ``benchmarks/results/engines.md``. One thread; FedMerge; 50 clients with 64 images of Fashion-MNIST each, two
local epochs of batch 32 (200 client-steps per round).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fedmerge import __version__
from fedmerge.algorithms import ALGORITHMS
from fedmerge.data import PARTITIONS, SOURCES, FederatedData, deal
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.simulation import advance, one_thread, prepare
from fedmerge.models import NETWORKS
from fedmerge.training import LocalTraining

WORKLOADS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("mlp", 14, {"hidden": (32,)}),
    ("mlp", 28, {"hidden": (64,)}),
    ("cnn", 14, {}),
    ("cnn", 28, {}),
    ("resnet9", 28, {}),
)
ROUNDS = 4


def federation(size: int) -> FederatedData:
    """50 clients with permuted labels."""
    faults: list[str] = []
    source = SOURCES.build({"name": "fashion-mnist", "size": size}, "source", faults)
    partition = PARTITIONS.build({"name": "permuted"}, "partition", faults)
    assert source is not None
    assert partition is not None
    pool = source.load()
    return deal(pool, partition.split(pool, 0))


def seconds_per_round(model: Any, data: FederatedData, runtime: str) -> list[float]:
    """One run of a few rounds; the first two are warm-up."""
    algorithm = ALGORITHMS["fedmerge"].cls()
    setup, progress = prepare(algorithm, data, model, LocalTraining(), RunOptions(runtime=runtime))  # type: ignore[arg-type]
    times = []
    for number in range(ROUNDS + 2):
        began = time.perf_counter()
        progress, _ = advance(setup, progress)
        if number >= 2:
            times.append(time.perf_counter() - began)
    return times


def measured(repeats: int) -> list[str]:
    """One table row per workload."""
    rows = []
    for name, size, options in WORKLOADS:
        data, model = federation(size), NETWORKS[name].cls(**options)
        times: dict[str, list[float]] = {"sequential": [], "vectorised": []}
        for _ in range(repeats):
            for runtime, found in times.items():
                found.append(statistics.median(seconds_per_round(model, data, runtime)))
        middle = {runtime: statistics.median(found) for runtime, found in times.items()}
        ratios = [a / b for a, b in zip(times["sequential"], times["vectorised"], strict=True)]
        rows.append(
            f"| {name} {size} x {size} | {1000 * middle['sequential']:.0f} | {1000 * middle['vectorised']:.0f} "
            f"| {middle['sequential'] / middle['vectorised']:.2f} | {min(ratios):.2f} – {max(ratios):.2f} |"
        )
        sys.stderr.write(rows[-1] + "\n")
    return rows


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    with one_thread():
        rows = measured(options.repeats)
    text = f"""# Engines: milliseconds per round

Command: `python benchmarks/engines.py --repeats {options.repeats}`; fedmerge {__version__}, torch {torch.__version__},
Python {platform.python_version()}, {platform.machine()}, one thread.

FedMerge, 50 clients with 64 images of Fashion-MNIST each, two local epochs of batch 32: 200 client-steps a round, the
server's step included. Sequential and vectorised interleaved, {options.repeats} repeats, medians; above 1 the
vectorised one is faster.

| network and image | sequential (ms) | vectorised (ms) | ratio of medians | smallest – largest |
|---|---|---|---|---|
{chr(10).join(rows)}
"""
    (options.out / "engines.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
