"""The end of a site's program that hangs: what reads its examples is the site's own, and may wait for ever."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_MOST = 1e9
"""Seconds that a timer can be set to, at least."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends this process, at once and with all of its threads, if the block takes longer.

    Nothing less ends a function that waits for a disk or a server that is gone. To be used in a process that does
    nothing else.

    Args:
        seconds: 0 for no limit.
    """
    if not seconds:
        yield
        return
    timer = threading.Timer(min(seconds, _MOST), _end, [seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(seconds: float) -> None:
    log.error("the site's program has worked for %.0f s and nobody waits any longer: it is ended", seconds)
    logging.shutdown()
    os._exit(1)
