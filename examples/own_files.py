"""Your own clients, one file each: the body of `main` below `write_files` is all there is to write.

From Python:       python examples/own_files.py [FOLDER]      (writes six small files there first; default: a new folder)
From the shell:    fedmerge compare fedmerge fedavg local source=folder source.path=FOLDER rounds=20 --reference fedavg

A file's name is the client's. An .npz file holds the arrays x and y, and x_validation, y_validation, x_test, y_test if
it is split already; a .csv or .parquet file holds a column `label` (or source.label_column=...) beside its numbers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

import fedmerge


def write_files(folder: Path) -> None:
    """Three clinics as .npz and three as .csv; two habits of calling the same measurements ill."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(6):
        x = rng.normal(size=(150, 4)).round(3)
        y = (x[:, 0] > 0 if number % 2 else x[:, 1] + x[:, 2] > 0).astype(int)
        if number < 3:
            np.savez(folder / f"clinic-{number}.npz", x=x, y=y)
        else:
            table = np.column_stack([x, y])
            header = "age,weight,pressure,sugar,label"
            np.savetxt(folder / f"clinic-{number}.csv", table, fmt="%g", delimiter=",", header=header, comments="")


def main(folder: Path, rounds: int = 20) -> None:
    write_files(folder)
    data = fedmerge.from_folder(folder)
    comparison = fedmerge.compare(data, methods=["fedmerge", "fedavg", "local"], rounds=rounds)
    print(comparison.table(reference="fedavg").markdown())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
