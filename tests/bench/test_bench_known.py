"""Which results still answer a run after the package has changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_suite import made_up, suite

from fedmerge.bench.known import Known
from fedmerge.bench.plan import Planner
from fedmerge.bench.tuning import Trial

PLANNER = Planner(suite())
RUN = PLANNER.run(PLANNER.suite.settings["turned"], "ifca", 0, Trial(0.1))
"""IFCA told of two models."""


def test_a_run_knows_the_options_that_it_will_be_made_with() -> None:
    assert RUN.options["num_models"] == 2
    assert RUN.options["training"]["lr"] == 0.1
    assert RUN.options["training"]["momentum"] == 0.0  # a default


def test_the_last_result_of_a_key_counts() -> None:
    first, second = made_up(RUN, [0.1]), made_up(RUN, [0.2])
    assert Known([first, second]).find(RUN) is second


@pytest.mark.parametrize(
    ("then", "answers"),
    [
        ({"num_models": 2, "training": {"lr": 0.1, "momentum": 0.0}}, True),  # options have been added since
        ({"num_models": 2, "training": {"lr": 0.1, "momentum": 0.9}}, False),  # a default has changed
        ({"num_models": 2, "shyness": 1.0, "training": {"lr": 0.1}}, False),  # an option is gone
        ({"num_models": 3, "training": {"lr": 0.1}}, False),
    ],
)
def test_a_result_of_an_earlier_package_answers_if_its_options_still_hold(
    then: dict[str, object], answers: bool
) -> None:
    earlier = replace(made_up(RUN, [0.1]), key="of another resolved configuration", options=then)
    assert (Known([earlier]).find(RUN) is earlier) == answers


def test_a_tuning_run_answers_no_report() -> None:
    """A suite may come to report the seed that it once tuned on; what was kept of that run has no test scores."""
    tuned = replace(made_up(RUN, [0.1]), stage="tuning")
    assert Known([tuned]).find(RUN) is None
    assert Known([tuned]).find(replace(RUN, stage="tuning")) is tuned
    reported = made_up(RUN, [0.1])
    assert Known([reported]).find(replace(RUN, stage="tuning")) is reported


def test_other_words_are_another_run() -> None:
    other = PLANNER.run(PLANNER.suite.settings["turned"], "ifca", 0, Trial(0.3))
    assert Known([made_up(RUN, [0.1])]).find(other) is None


def test_a_result_that_comes_in_is_known_at_once() -> None:
    known = Known()
    assert known.find(RUN) is None
    result = made_up(RUN, [0.1])
    known.add(result)
    assert known.find(RUN) is result
