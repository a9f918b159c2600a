from __future__ import annotations

import dataclasses
import math

import pytest
from synthetic_runs import flat_run, means_of, round_record, run_record

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.report.study import differences, studies


def test_runs_are_sorted_by_setting_label_and_seed_with_one_colour_per_label():
    runs = [
        flat_run("fedavg", 1, [0.5, 0.5], setting="a"),
        flat_run("fedmerge", 0, [0.5, 0.5], setting="b"),
        flat_run("fedavg", 0, [0.5, 0.5], setting="a"),
        flat_run("fedavg", 0, [0.5, 0.5], setting="b"),
    ]
    first, second = studies(runs)
    assert (first.setting, list(first.runs["fedavg"]), first.seeds) == ("a", [0, 1], (0, 1))
    assert (second.setting, second.labels) == ("b", ("fedavg", "fedmerge"))
    assert first.colours == second.colours == {"fedavg": 0, "fedmerge": 1}


def test_fedmerge_is_the_reference_unless_told_otherwise():
    runs = means_of({"fedavg": [0.5], "mine": [0.5], "local": [0.5]})
    assert studies(runs)[0].reference == "fedavg"
    runs[1] = dataclasses.replace(runs[1], method="fedmerge")
    assert studies(runs)[0].reference == "mine"
    assert studies(runs, reference="local")[0].reference == "local"


def test_an_unknown_reference_names_the_nearest_label():
    with pytest.raises(UsageError, match="unknown reference 'fedavgg'; did you mean 'fedavg'"):
        studies(means_of({"fedavg": [0.5], "local": [0.5]}), reference="fedavgg")


def test_no_runs_are_refused():
    with pytest.raises(UsageError, match="no runs to report on; give at least one run folder"):
        studies([])


def test_a_run_given_twice_is_refused():
    run = flat_run("fedavg", 3, [0.5, 0.5])
    with pytest.raises(UsageError, match="two runs are called 'fedavg' with seed 3"):
        studies([run, run])


def test_runs_of_one_seed_on_different_data_are_refused():
    runs = [flat_run("fedavg", 0, [0.5, 0.5]), flat_run("local", 0, [0.5, 0.5], data_sha256="f" * 64)]
    with pytest.raises(UsageError, match=r"'fedavg' and 'local' of seed 0 saw different data \(sha256 0{12} and f{12}"):
        studies(runs)


def test_one_label_with_two_kinds_of_options_is_refused():
    runs = [flat_run("fedavg", 0, [0.5, 0.5]), flat_run("fedavg", 1, [0.5, 0.5], options={"lr": 0.2})]
    with pytest.raises(UsageError, match=r"runs called 'fedavg' differ: .*'lr': 0.1.*'lr': 0.2.*its own label"):
        studies(runs)


def test_a_run_that_was_never_evaluated_is_an_error():
    run = dataclasses.replace(flat_run("fedavg", 0, [0.5, 0.5]), rounds=(round_record(1),))
    with pytest.raises(FedmergeError, match=r"'fedavg' \(seed 0\) has no evaluated round yet"):
        studies([run])


def test_a_run_without_any_test_item_is_an_error():
    with pytest.raises(FedmergeError, match=r"'fedavg' \(seed 0\) has no test score of any client in round 1"):
        studies([flat_run("fedavg", 0, [None, None])])


def test_differences_are_method_minus_reference_on_the_seeds_of_both():
    runs = means_of({"fedmerge": [0.8, 0.7, 0.9], "fedavg": [0.6, 0.6]})
    (found,) = differences(studies(runs)[0])
    # gaps -0.2 and -0.1: mean -0.15, s = 0.0707, t(1; 0.975) = 12.706205
    assert (found.label, found.seeds) == ("fedavg", (0, 1))
    assert found.interval.mean == pytest.approx(-0.15)
    assert found.interval.half_width == pytest.approx(12.706205 * 0.05, rel=1e-6)


def test_differences_are_taken_at_the_round_chosen_on_validation_and_not_at_the_best_test_score():
    early = round_record(1, test=[0.9, 0.9], validation=[0.5, 0.5])
    late = round_record(2, test=[0.6, 0.6], validation=[0.7, 0.7])
    runs = [run_record("fedmerge", 0, [early, late]), flat_run("fedavg", 0, [0.5, 0.4])]
    (found,) = differences(studies(runs)[0])
    assert found.interval.mean == pytest.approx(0.45 - 0.6)


def test_without_a_common_seed_there_is_no_difference():
    runs = [flat_run("fedmerge", 0, [0.5, 0.6]), flat_run("fedavg", 1, [0.5, 0.6])]
    (found,) = differences(studies(runs)[0])
    assert found.seeds == ()
    assert math.isnan(found.interval.mean)
    assert math.isnan(found.p_value)


def test_p_values_are_corrected_for_the_methods_compared():
    gaps = {"fedavg": [0.5, 0.51, 0.5], "ditto": [0.6, 0.6, 0.61]}
    alone = differences(studies(means_of({"fedmerge": [0.8, 0.8, 0.8], "fedavg": gaps["fedavg"]}))[0])
    both = differences(studies(means_of({"fedmerge": [0.8, 0.8, 0.8], **gaps}))[0])
    smaller, larger = sorted((both[0].p_value, both[1].p_value))
    assert smaller <= larger
    assert both[0].p_value == pytest.approx(2 * alone[0].p_value)  # fedavg is the farther: smallest of two
