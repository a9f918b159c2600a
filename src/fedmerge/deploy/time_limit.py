"""The end of a site's program that hangs: what reads its examples is the site's own, and may wait for ever."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger(__name__)

_MOST = 1e9
"""Seconds that a timer can be set to, at least."""
_GRACE = 30.0
"""Seconds after which a program that does not end itself is ended by the interpreter."""


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
    seconds = min(seconds, _MOST)
    timer = threading.Timer(seconds, _end, [seconds])
    timer.daemon = True
    timer.start()
    with suppress(OSError, ValueError, AttributeError):  # no standard error to write to
        faulthandler.dump_traceback_later(seconds + _GRACE, exit=True)  # where no other thread gets a turn
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()


def _end(seconds: float) -> None:
    log.error(
        "the site's program has worked for %.0f s, twice deploy.deadline or longer, and is taken to hang: it is ended",
        seconds,
    )
    faulthandler.dump_traceback()
    logging.shutdown()
    os._exit(1)
