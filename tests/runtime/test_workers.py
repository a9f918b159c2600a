"""Clients on several processes: the same bits, and nothing is lost when a process is."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import DataError, FedmergeError, RowError, UsageError
from fedmerge.core.protocol import state_tensors
from fedmerge.runtime import Engine, Sequential, Vectorised, personal_models, score
from fedmerge.runtime.processes import Processes
from fedmerge.runtime.rounds import plain_training
from fedmerge.runtime.workers import Workers
from fedmerge.training import LocalTraining, Planned, one_pass
from small_federation import GROUPS, SIZES, SmallFederation, images, small

FAST = {"most": 2}
"""Clients in a chunk of the vectorised engine: so few that the small federation makes several chunks."""


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 3)
    )


CNN = SmallFederation(convolutions, images(SIZES, GROUPS, (1, 4, 4), torch.float32), GROUPS, torch.float32)


def spread(federation: SmallFederation, kind: Any = Sequential, *, size: int = 2, **more: Any) -> Workers:
    """Workers over an engine of a federation."""
    make = partial(kind, federation.network(), federation.layout, federation.descent)
    return Workers(make(), Processes(make, size, federation.data, **more))


class Planning(SmallFederation):
    """A federation whose steps are drawn by whoever runs a client."""

    def batches(self, clients: list[int], round_number: int) -> list[Any]:
        return [Planned(self.data[i], self.training, self.training.lr, 0, round_number, i) for i in clients]


def planning(federation: SmallFederation) -> Planning:
    return Planning(federation.build, federation.data, federation.groups, federation.dtype)


def leaves(tree: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(tree)


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    gc.collect()  # engines end their processes when they go
    assert [child.name for child in multiprocessing.active_children()] == []


@pytest.mark.parametrize(
    ("name", "federation", "kind", "policy"),
    [
        ("fedmerge", small(), Sequential, "merge"),
        ("fedmerge", small(torch.float32), partial(Vectorised, most=2), "merge"),
        ("fedavg", small(torch.float32), Sequential, "merge"),
        ("ditto", small(torch.float32), Sequential, "merge"),
        ("ditto", small(torch.float32), partial(Vectorised, most=2), "merge"),
        ("local", small(torch.float32), Sequential, "merge"),
        ("fedbn", CNN, Sequential, "merge"),
        ("fedavg", CNN, Sequential, "local"),
        ("fedavg", CNN, partial(Vectorised, most=2), "local"),
    ],
)
def test_rounds_are_the_same_bits_as_in_one_process(name, federation, kind, policy):
    federation, algorithm = planning(federation), ALGORITHMS[name].cls()
    alone = federation.play(algorithm, 3, kind, policy)
    together = federation.play(algorithm, 3, partial(_spread_like, federation, kind), policy)
    states = [state_tensors(state) for state, _ in (alone, together)]
    assert states[0].keys() == states[1].keys()
    assert equal(*states)
    assert equal(alone[1].private, together[1].private)
    assert equal(alone[1].buffers, together[1].buffers)


def _spread_like(federation: SmallFederation, kind: Any, *where: Any) -> Workers:
    del where
    return spread(federation, kind)


@pytest.mark.parametrize("kind", [Sequential, partial(Vectorised, most=2)])
def test_models_buffers_and_scores_are_the_same_bits(kind):
    algorithm = ALGORITHMS["fedavg"].cls()
    state, fleet = CNN.begin(algorithm, "recalibrate")
    passes = [one_pass(each, 5, 0.1) for each in CNN.data]
    found = []
    for engine in (CNN.engine(kind), spread(CNN, kind)):
        models = personal_models(algorithm, state, fleet, passes, engine)
        found.append((models, score(models, passes, engine)))
    assert equal(*found)


def test_workers_that_begin_from_nothing_give_the_same_bits():
    federation = planning(CNN)
    clients = list(zip([federation.draw(0)] * 6, federation.batches([*range(6)], 1), strict=True))
    alone = federation.engine().map(plain_training, clients)
    assert equal(alone, spread(federation, start="spawn").map(plain_training, clients))


def test_workers_are_an_engine():
    assert isinstance(spread(small()), Engine)


def test_nobody_to_run_gives_no_results_and_starts_no_process():
    assert spread(small()).map(plain_training, []) == []
    assert multiprocessing.active_children() == []


def whose(task, number):
    return number, os.getpid()


def test_one_client_is_run_here_by_a_function_that_could_not_be_sent():
    assert spread(small()).map(lambda task, x: x + 1, [(1,)]) == [2]


def test_results_are_in_the_order_of_clients_and_come_from_every_worker():
    engine = spread(small(), size=3)
    found = engine.map(slow, [(number,) for number in range(40)])
    assert [number for number, _ in found] == [*range(40)]
    assert len({process for _, process in found} - {os.getpid()}) == 3


def slow(task, number):
    time.sleep(0.005)
    return number, os.getpid()


def test_processes_stay_for_the_next_call_until_they_are_closed():
    engine = spread(small())
    first, second = ({process for _, process in engine.map(slow, [(n,) for n in range(20)])} for _ in range(2))
    engine.close()
    third = {process for _, process in engine.map(slow, [(n,) for n in range(20)])}
    assert first == second
    assert not first & third


def test_a_function_that_workers_are_no_help_with_is_computed_here_in_the_end():
    engine = spread(small())
    where = [{process for _, process in engine.map(whose, [(n,) for n in range(9)])} for _ in range(20)]
    assert os.getpid() not in where[0] | where[1]
    assert where[-1] == {os.getpid()}
    assert os.getpid() not in {process for _, process in engine.map(slow, [(n,) for n in range(9)])}


def test_a_function_that_workers_help_with_stays_with_them():
    engine = spread(small())
    for _ in range(4):
        assert os.getpid() not in {process for _, process in engine.map(slow, [(n,) for n in range(40)])}


def kept(task, x):
    """Hands back what it was given, as methods do with what did not change."""
    return x, x[1:], {"twice": 2 * x}


@pytest.mark.parametrize("length", [0, 1, 3, 100_000])
def test_results_do_not_change_with_later_calls(length):
    engine = spread(small())
    given = [(torch.full((length,), float(n)),) for n in range(6)]
    first = engine.map(kept, given)
    copies = [tuple(leaf.clone() for leaf in leaves(result)) for result in first]
    engine.map(kept, [(x + 100,) for (x,) in given])
    assert equal(first, [kept(None, *x) for x in given])
    assert equal([tuple(leaves(result)) for result in first], copies)


def as_it_lies(task, x):
    return x.stride(), x.sum(), x.dtype


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(48.0).view(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor([True, False]),
        torch.ones(5, dtype=torch.bfloat16),
        torch.empty(0, 4),
    ],
    ids=["channels last", "scalar", "bool", "bfloat16", "empty"],
)
def test_tensors_arrive_as_they_lie(x):
    stride, total, dtype = spread(small()).map(as_it_lies, [(x,), (x,)])[0]
    assert (stride, dtype) == (x.stride(), x.dtype)
    assert torch.equal(total, x.sum())


def place_of(task, x):
    return x.data_ptr()


def test_examples_are_not_sent():
    """A forked worker sees them at the same address."""
    federation = small()
    given = [(each.inputs[1:],) for each in federation.data]
    assert spread(federation).map(place_of, given) == [x.data_ptr() for (x,) in given]


# --- death ----------------------------------------------------------------------------------------------------------


def die_until(task, number, folder, victim, times):
    """Kills its own process at one client so many times."""
    marks = len(list(Path(folder).iterdir()))
    if number == victim and marks < times:
        (Path(folder) / str(marks)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_costs_time_and_nothing_else(tmp_path, caplog):
    found = spread(small()).map(die_until, [(number, str(tmp_path), 7, 2) for number in range(30)])
    assert found == [*range(30)]
    assert len(list(tmp_path.iterdir())) == 2
    assert "a worker died by signal 9 (SIGKILL); client" in caplog.text


def test_clients_that_kill_three_workers_in_a_row_are_named(tmp_path):
    engine = spread(small())
    with pytest.raises(FedmergeError, match=r"^client 7: their worker died 3 times in a row .* signal 9 \(SIGKILL\)"):
        engine.map(die_until, [(number, str(tmp_path), 7, 9) for number in range(30)])
    assert engine.map(whose, [(1,), (2,)])[1][0] == 2


def die_at_round(algorithm_round, marker):
    """Wraps a client's round: the first process that comes to it is killed."""
    return partial(_killed_once, algorithm_round, marker)


def _killed_once(inner, marker, task, *arguments):
    if not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(task, *arguments)


def test_a_death_in_a_round_changes_no_bit(tmp_path):
    federation = planning(small(torch.float32))
    clients = list(zip([federation.draw(0)] * 6, federation.batches([*range(6)], 1), strict=True))
    found = spread(federation).map(die_at_round(plain_training, str(tmp_path / "dead")), clients)
    assert (tmp_path / "dead").exists()
    assert equal(found, federation.engine().map(plain_training, clients))


def test_a_worker_that_was_killed_while_idle_is_replaced(caplog):
    engine = spread(small())
    engine.map(whose, [(1,), (2,)])
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    assert [number for number, _ in engine.map(whose, [(n,) for n in range(9)])] == [*range(9)]


# --- exceptions -----------------------------------------------------------------------------------------------------


class OddError(Exception):
    """Cannot be made from its message alone."""

    def __init__(self, one, two):
        super().__init__(f"{one}{two}")


def fail(task, number, error):
    if number == 3:
        raise {"usage": UsageError("no such"), "row": RowError(5, "bad row"), "value": ValueError("a", 1)}.get(
            error
        ) or OddError("o", "dd")
    return number


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        ("usage", UsageError, "no such (at client 3)"),
        ("row", DataError, "bad row (at client 3)"),
        ("value", ValueError, "('a', 1)"),
        ("odd", Exception, "odd"),
    ],
)
def test_an_exception_of_a_client_is_raised_here(error, kind, text):
    engine = spread(small())
    with pytest.raises(kind) as caught:
        engine.map(fail, [(number, error) for number in range(8)])
    assert type(caught.value) is kind
    assert str(caught.value) == text
    assert "in fail" in str(caught.value.__cause__)
    assert len(engine.map(whose, [(1,), (2,)])) == 2


def test_steps_tell_which_client_it_was():
    federation = planning(small())
    steps = [(n, Planned(federation.data[0], LocalTraining(), 0.1, 0, 1, n)) for n in (11, 12, 13)]
    with pytest.raises(FedmergeError, match=r"lost \(at client 12\)"):
        spread(federation).map(lose_second, steps)


def lose_second(task, number, batches):
    if number == 12:
        raise FedmergeError("lost")
    return number


def unsendable(task, number):
    return lambda: number


def test_results_and_functions_that_cannot_be_sent_are_told():
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        spread(small()).map(unsendable, [(1,), (2,)])
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        spread(small()).map(lambda task, x: x, [(1,), (2,)])


def draw_a_number(task, number):
    return torch.rand(())


def test_a_network_that_draws_numbers_is_refused():
    """Its draws would depend on who computes what."""
    with pytest.raises(UsageError, match="draws random numbers in training"):
        spread(small()).map(draw_a_number, [(1,), (2,)])


# --- ends -----------------------------------------------------------------------------------------------------------

PARENT = """
import sys, time
sys.path.insert(0, {tests!r})
from runtime.test_workers import *

def sleepy(task, number):
    time.sleep(0.3 if number else 0)
    return os.getpid()

if __name__ == "__main__":
    engine = spread(small())
    print(*set(engine.map(sleepy, [(0,)] * 20)), flush=True)
    engine.map(sleepy, [(1,)] * 10_000)
"""


@pytest.fixture
def family():
    """A program that maps, and the process ids of its workers."""
    script = PARENT.format(tests=str(Path(__file__).parents[1]))
    program = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield program, [int(word) for word in program.stdout.readline().split()]
    program.kill()
    program.communicate()


def is_alive(pid: int) -> bool:
    try:
        return not re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(family, how):
    program, workers = family
    assert workers
    assert all(map(is_alive, workers))
    program.send_signal(how)
    program.wait(60)
    end = time.monotonic() + 5
    while any(map(is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    assert [pid for pid in workers if is_alive(pid)] == []


def test_a_process_that_is_one_of_several_cannot_have_its_own(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    with pytest.raises(UsageError, match="workers: got 2 in a process that is one of several already"):
        spread(small())


def test_nothing_is_said_of_a_call_without_faults(caplog):
    with caplog.at_level(logging.DEBUG):
        spread(small()).map(whose, [(1,), (2,)])
    assert caplog.text == ""
