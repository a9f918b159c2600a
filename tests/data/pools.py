"""Small random pools."""

import numpy as np

from fedmerge.data.pool import Pool


def random_pool(seed=0, *, n=1200, num_classes=5, copies=1, shape=(1, 4, 4)):
    """`copies` rows of each item, one in each of `copies` domains; ten users share the items among them."""
    rng = np.random.default_rng(seed)
    item = np.repeat(np.arange(n // copies), copies)
    rows = np.arange(len(item))
    return Pool(
        name="toy",
        inputs=rng.integers(0, 256, (len(item), *shape), dtype=np.uint8),
        targets=rng.integers(0, num_classes, n // copies)[item],
        class_names=tuple("abcdefghijklmnopqrst"[:num_classes]),
        user=rng.integers(0, 10, n // copies)[item],
        domain=rows % max(2, copies),
        item=item if copies > 1 else None,
        user_names=tuple(f"writer {number}" for number in range(10)),
        domain_names=tuple(f"style {number}" for number in range(max(2, copies))),
    )
