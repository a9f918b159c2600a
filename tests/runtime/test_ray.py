"""Clients on a Ray cluster of this machine: the same bits as in one process, also when an actor dies."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
from functools import partial
from typing import Any

import pytest

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.protocol import state_tensors
from fedmerge.runtime import Sequential, Vectorised
from fedmerge.runtime.ray import Actors
from fedmerge.runtime.workers import Workers
from runtime.test_workers import CNN, equal, planning
from small_federation import SmallFederation, small

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def spread(federation: SmallFederation, kind: Any = Sequential, **where: Any) -> Workers:
    make = partial(kind, federation.network(), federation.layout, federation.descent)
    return Workers(make(), Actors(make, 2, federation.data, **{"address": "local", **where}))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_it_is_said_what_to_install():
    with pytest.raises(UsageError, match=r"cluster: the package ray is missing; .* 'fedmerge\[ray\]'"):
        spread(small())


@pytest.fixture(scope="module")
def _local_ray():
    """A cluster that the first call starts and that ends with this file's tests."""
    yield
    importlib.import_module("ray").shutdown()


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
class TestActors:
    @pytest.mark.parametrize(
        ("name", "federation", "kind"),
        [
            ("fedmerge", small(), partial(Vectorised, most=2)),
            ("ditto", small(), Sequential),
            ("fedbn", CNN, Sequential),
        ],
    )
    def test_rounds_are_the_same_bits_as_in_one_process(self, name, federation, kind):
        federation, algorithm = planning(federation), ALGORITHMS[name].cls()
        alone = federation.play(algorithm, 3, kind)
        engine = spread(federation, kind)
        together = federation.play(algorithm, 3, lambda *_: engine)
        engine.close()
        assert equal(*(state_tensors(state) for state, _ in (alone, together)))
        assert equal(alone[1].private, together[1].private)

    def test_a_killed_actor_costs_time_and_nothing_else(self, tmp_path, caplog):
        marker = tmp_path / "dead"

        def die_once(task, number):  # of this test, so that Ray sends it whole
            if number == 4 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        engine = spread(small())
        found = engine.map(die_once, [(number,) for number in range(9)])
        engine.close()
        assert found == [*range(9)]
        assert marker.exists()
        assert "a worker died by what Ray calls ActorDiedError" in caplog.text

    def test_an_exception_says_where_it_happened(self):
        def lose(task, number):
            if number == 3:
                raise FedmergeError("lost")
            return number

        engine = spread(small())
        with pytest.raises(FedmergeError, match=r"^lost \(at client 3\)$"):
            engine.map(lose, [(number,) for number in range(9)])
