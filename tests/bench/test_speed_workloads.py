"""What the speed benchmark gives its contestants, and that this package and a plain loop do the same with it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "speed"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "speed" / "peers"))

import rivals
import workloads
from naive import naive, trained
from ours import ours
from talk import counting, marked_network, timing

SMALL = [
    replace(workload, played=3, batch=4, examples=11, epochs=2, dtype=torch.float64)
    for workload in workloads.WORKLOADS.values()
    if workload.model != "lora"
]
NAMES = [workload.name for workload in SMALL]
RUNTIMES = ("sequential", "vectorised")
ROUNDING = 1e-9
"""Between two orders of float64 sums, relative to the way that the average moves (found: 4e-15)."""


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("workload", SMALL, ids=NAMES)
def test_two_rounds_here_and_in_the_plain_loop_reach_the_same_average(workload, runtime):
    run, loop = ours(workload, runtime), naive(workload)
    start = run.average()
    for number in (1, 2):
        run.play()
        loop.play(number)
    wanted = run.setup.layout.read(loop.server)
    moved = (wanted - start).norm()
    assert moved > 1e-3 * start.norm()
    assert (run.average() - wanted).norm() < ROUNDING * moved


@pytest.mark.parametrize("variant", ["reused", "channels_last", "channels_last+reused"])
def test_variants_of_the_plain_loop_reach_the_same_average(variant):
    workload = SMALL[NAMES.index("cnn")]
    plain, other = naive(workload), naive(workload, frozenset(variant.split("+")))
    plain.play(1)
    other.play(1)
    for name, value in trained(plain.server).items():
        torch.testing.assert_close(trained(other.server)[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("workload", SMALL, ids=NAMES)
def test_the_plan_counts_the_steps_that_are_done(workload):
    with counting() as sizes:
        naive(workload).play(1)
    assert len(sizes) == workload.steps * workload.played == 3 * 2 * 3  # 3 clients, 2 epochs, 3 batches
    assert sum(sizes) == workload.epochs * workload.examples * workload.played


def test_evaluation_is_not_counted_as_steps():
    workload = SMALL[0]
    module, (inputs, _) = marked_network(workload), workloads.examples(workload, 0)
    with counting() as sizes:
        module.eval()(inputs)
        with torch.no_grad():
            module.train()(inputs)
        assert sizes == []
        module(inputs)
    assert sizes == [len(inputs)]


def test_the_network_of_the_paper_has_as_many_parameters_as_that_of_the_authors_code():
    assert workloads.num_parameters(workloads.WORKLOADS["resnet9-paper"]) == (83_852, 83_852)


def test_products_of_a_linear_network_are_counted_by_hand():
    logistic = workloads.WORKLOADS["logistic"]
    # forward x W and the gradient of W; inputs need no gradient
    assert workloads.flops_per_step(logistic) == 2 * (2 * logistic.batch * 784 * 10)


def test_examples_of_two_processes_are_the_same_and_of_two_clients_are_not():
    workload = SMALL[0]
    first, again, other = (workloads.examples(workload, client) for client in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)


@pytest.mark.parametrize("workload", workloads.WORKLOADS.values(), ids=list(workloads.WORKLOADS))
def test_no_batch_of_the_real_workloads_is_cut_short(workload):
    assert workload.examples % workload.batch == 0
    assert workload.played <= workload.clients


def test_a_watched_function_within_another_is_not_counted_twice():
    with timing(((torch.nn.Module, "__call__", "forward"),)) as parts:
        module = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(400, 400))
        began = rivals.time.process_time()
        for _ in range(20):
            module(torch.ones(200, 400))
        whole = rivals.time.process_time() - began
    assert 0.2 * whole < parts["forward"] <= whole


def test_every_runtime_is_a_contestant_and_rivals_need_a_python():
    names = rivals.known_contestants(workloads.WORKLOADS["cnn"], {}, {})
    assert {f"fedmerge:{runtime}" for runtime in RUNTIMES} <= set(names)
    assert "flower" not in names
    assert "flower" in rivals.known_contestants(workloads.WORKLOADS["cnn"], {"flower": "python"}, {})
    assert "authors" not in rivals.known_contestants(workloads.WORKLOADS["cnn"], {"authors": "python"}, {})
