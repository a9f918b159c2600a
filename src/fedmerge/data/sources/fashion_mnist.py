"""Fashion-MNIST from the Debian package dataset-fashion-mnist."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError
from fedmerge.core.options import check_options, option
from fedmerge.data.archive import read_deb
from fedmerge.data.fetch import Package, Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import Facts, load_packaged, pool_name, source

_FOLDER = "usr/share/datasets/fashion-mnist/"
_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@source("fashion-mnist", citation="Xiao, Rasul, Vollgraf (2017), Fashion-MNIST, arXiv:1708.07747")
@dataclass(frozen=True)
class FashionMnist:
    """70,000 grey pictures of clothes in 10 classes; the customary train and test sets are pooled."""

    facts: ClassVar[Facts] = Facts(
        description="70,000 pictures of clothes, 28x28 grey, 10 classes",
        licence="MIT",
        packages=(
            Package(
                client="apt",
                name="dataset-fashion-mnist",
                version="0.0~git20200523.55506a9-1",
                sha256="487346ab8fb199d13bd6be31f4cd6b96883ec3108e84300d74268db08bc73c57",
                megabytes=30.9,
                folder=_FOLDER,
            ),
        ),
    )
    version: ClassVar[int] = 1

    size: Literal[28, 14] = option(28, help="pixels per side; 14 is the mean of 2x2 pixels")

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, progress: Progress = quiet) -> Pool:
        """The items, 60,000 of the customary train set first; fetched through apt-get if not in the cache."""
        return load_packaged(self, progress)

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the Debian package."""
        progress("reading fashion-mnist", 0, None)
        parts = ("train-images-idx3", "t10k-images-idx3", "train-labels-idx1", "t10k-labels-idx1")
        files = read_deb(archives[0], *(f"{_FOLDER}{part}-ubyte.gz" for part in parts))
        train, test, train_labels, test_labels = (read_idx(gzip.decompress(file)) for file in files)
        images = np.concatenate([train, test])[:, None]
        return Pool(
            name=pool_name(self),
            inputs=images if self.size == 28 else halve(images),
            targets=np.concatenate([train_labels, test_labels]).astype(np.int64),
            class_names=_CLASSES,
        )


def read_idx(content: bytes) -> NDArray[np.uint8]:
    """The array in an IDX file of bytes: two zeros, type 8, number of axes, big-endian lengths, then the values.

    Raises:
        DataError: if the content is something else or of another length than it says.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"not an IDX file of bytes: it begins with {content[:4]!r}")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], dtype=">u4").astype(np.int64)
    if len(content) - start != shape.prod():
        raise DataError(f"an IDX file of shape {tuple(shape.tolist())} holds {len(content) - start} values")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def halve(images: NDArray[Any]) -> NDArray[np.uint8]:
    """Images [n, c, h, w] of even height and width with every 2x2 pixels replaced by their mean, halves rounded up."""
    n, channels, height, width = images.shape
    blocks = images.reshape(n, channels, height // 2, 2, width // 2, 2)
    sums: NDArray[np.uint16] = blocks.sum(axis=(3, 5), dtype=np.uint16)
    return ((sums + 2) // 4).astype(np.uint8)
