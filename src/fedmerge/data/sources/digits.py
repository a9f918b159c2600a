"""The 8x8 digits that come with scikit-learn: no download, for first steps and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedmerge.data.fetch import Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import Facts, pool_name, source


@source("digits")
@dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits of 8x8 pixels, installed with scikit-learn."""

    facts: ClassVar[Facts] = Facts(
        description="1,797 handwritten digits, 8x8 grey, 10 classes; installed with scikit-learn",
        licence="CC-BY-4.0 (UCI, Optical Recognition of Handwritten Digits)",
    )

    def load(self, progress: Progress = quiet) -> Pool:  # noqa: ARG002 - it takes no time
        """The items; their 17 levels of grey are spread over 0..255."""
        from sklearn.datasets import load_digits  # noqa: PLC0415 - takes a second to import

        inputs, targets = load_digits(return_X_y=True)
        return Pool(
            name=pool_name(self),
            inputs=np.rint(inputs * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8),
            targets=targets.astype(np.int64),
            class_names=tuple("0123456789"),
        )
