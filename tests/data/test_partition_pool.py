"""A pool refuses what cannot be dealt out."""

import dataclasses

import numpy as np
import pytest
from pools import random_pool

from fedmerge.core.errors import DataError


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("targets", np.zeros(3, dtype=np.int64), r"`targets` has shape \(3,\); expected \(1200,\)"),
        ("targets", np.full(1200, 0.5), "`targets` holds float64; expected whole numbers"),
        ("targets", np.full(1200, 5), r"labels run from 5 to 5; expected 0\.\.4 for 5 classes"),
        ("targets", np.full(1200, -1), "labels run from -1 to -1"),
        ("item", np.array(["x"] * 1200), "`item` holds <U1; expected whole numbers"),
        ("inputs", np.full((1200, 2), np.nan), "item 0 has NaN or infinite inputs"),
        ("inputs", np.full((1200, 2), None), "inputs are object; expected uint8 images, float32 or texts"),
    ],
)
def test_what_is_wrong_is_named(column, values, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(random_pool(), **{column: values})


def test_the_hash_changes_with_one_pixel_and_one_label():
    pool = random_pool()
    for name in ("inputs", "targets"):
        changed = getattr(pool, name).copy()
        changed.flat[0] = 0 if changed.flat[0] else 1
        assert dataclasses.replace(pool, **{name: changed}).sha256() != pool.sha256()
