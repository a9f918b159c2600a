"""Your own clients, one file each: after `write_files`, the body of `main` is all there is to write.

From Python:       python examples/own_files.py [FOLDER]       (writes six small files there; without it, temporary)
From the shell:    fedmerge compare fedmerge fedavg local source=folder source.path=FOLDER rounds=20 --reference fedavg

A file's name is the client's. An .npz file holds the arrays x and y, and x_validation, y_validation, x_test, y_test if
it is split already; a .csv or .parquet file holds a column `label` (or source.label_column=...) beside its numbers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

import fedmerge


def write_files(folder: Path) -> None:
    """Six clinics, three as .npz and three as .csv; every other one goes by another measurement."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(6):
        x = rng.normal(size=(150, 4)).round(3)
        y = np.where(x[:, number % 2] > 0, "ill", "well")
        if number < 3:
            np.savez(folder / f"clinic-{number}.npz", x=x, y=y)
        else:
            frame = pd.DataFrame(x, columns=["age", "weight", "pressure", "sugar"])
            frame.assign(label=y).to_csv(folder / f"clinic-{number}.csv", index=False)


def main(folder: Path, rounds: int = 20) -> None:
    write_files(folder)
    data = fedmerge.from_folder(folder)
    comparison = fedmerge.compare(data, methods=["fedmerge", "fedavg", "local"], rounds=rounds)
    print(comparison.table(reference="fedavg").markdown())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
