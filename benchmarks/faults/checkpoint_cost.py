"""What it costs to write a run down: the same run with and without a folder, interleaved.

    python benchmarks/faults/checkpoint_cost.py > benchmarks/results/faults/checkpoint_cost.md

Everything that the run itself computes is the same; the folder lies in the system's place for temporary files.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from fedmerge.experiment.config import build_config
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.federation import load_data

REPEATS = 7
SETTINGS: dict[str, dict[str, Any]] = {
    "digits, 20 clients, MLP of 4,810 parameters, 60 rounds": {"rounds": 60},
    "digits, 20 clients, CNN of 31,178 parameters, 20 rounds": {"rounds": 20, "model": "cnn"},
}


def main() -> None:
    """Runs and prints a page."""
    print("    python benchmarks/faults/checkpoint_cost.py > benchmarks/results/faults/checkpoint_cost.md\n")
    print(f"# Cost of checkpoints\n\nMedians of {REPEATS} interleaved repeats, seconds of a whole run.\n")
    print("| run | nothing written | checkpoint_every=0 | checkpoint_every=1 | ratio of the last to the first |")
    print("|---|---:|---:|---:|---:|")
    for name, table in SETTINGS.items():
        config = build_config(table)
        data = load_data(config.source, config.partition, config.run.seed, config.model)
        seconds: dict[int | None, list[float]] = {None: [], 0: [], 1: []}
        for _ in range(REPEATS):
            for every, found in seconds.items():
                with tempfile.TemporaryDirectory() as folder:
                    asked = config if every is None else build_config({**table, "checkpoint_every": every})
                    began = time.perf_counter()
                    execute_config(asked, data=data, folder=None if every is None else Path(folder) / "run")
                    found.append(time.perf_counter() - began)
        nothing, without, each = (statistics.median(found) for found in seconds.values())
        print(f"| {name} | {nothing:.2f} | {without:.2f} | {each:.2f} | {each / nothing:.2f} |")


if __name__ == "__main__":
    main()
