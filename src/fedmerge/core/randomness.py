"""Counter-based randomness: every draw comes from (seed, round, client, purpose) and from nothing else.

No generator state is carried between rounds, so resuming, reordering clients or spreading them over workers gives
the same bits. There is no global generator anywhere; `fresh_module_randomness` is the one place where torch's is
borrowed (modules draw their initial weights from it) and given back as it was.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A numpy generator that depends on its arguments alone.

    Args:
        seed: The run's seed, >= 0.
        purpose: What is drawn, for example ``"batches"``; two purposes never share numbers.
        counters: For example round and client, >= 0; equally many for all draws of one purpose, because trailing
            zeros do not count.

    >>> bool(generator(0, "batches", 3, 7).integers(100) == generator(0, "batches", 3, 7).integers(100))
    True
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *counters])


@contextmanager
def fresh_module_randomness(seed: int, purpose: str, *counters: int) -> Iterator[None]:
    """Within the block torch's default generator is seeded by the arguments; afterwards it is as it was before."""
    drawn = int(generator(seed, purpose, *counters).integers(2**63))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(drawn)
        yield
