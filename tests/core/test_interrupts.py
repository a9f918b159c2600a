"""Ctrl-C waits where it is held, and comes where it is heard."""

import signal
import threading

import pytest

from fedmerge.core.interrupts import interrupts_heard, interrupts_held


def test_an_interrupt_waits_until_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117 - the inner block must end before it comes
        with interrupts_held():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # to this thread: others have no mask
            done.append("after the signal")
    assert done == ["after the signal"]


def test_an_interrupt_that_waits_comes_where_it_is_heard() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012 - as above
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # to this thread: others have no mask
        with interrupts_heard():
            done.append("too far")
    assert done == []
