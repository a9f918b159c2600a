"""What averaging the factors of adapters would miss, round by round."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest
from synthetic_runs import flat_run, round_record, run_record

from fedmerge.core import spaces
from fedmerge.report.averaging import LIMIT, POINTS, averaging_error, averaging_errors
from fedmerge.report.page import report_page
from fedmerge.report.study import studies


def adapted(errors, *, seed=0, label="fedavg", spaces_used=None):
    """Round 0 and one round per error; products are averaged above the limit unless it is said which space was used."""
    used = spaces_used or ["product" if error is not None and error > LIMIT else "factors" for error in errors]
    rounds = [round_record(0, [0.5], [0.5], state={"averaging_error": None, "space": "factors"})]
    for number, (error, space) in enumerate(zip(errors, used, strict=True), 1):
        evaluated = [0.5] if number == len(errors) else None
        rounds.append(round_record(number, evaluated, evaluated, state={"averaging_error": error, "space": space}))
    return run_record(label, seed, rounds)


def figure(*runs):
    return averaging_errors(studies(runs)[0])


def drawn(found) -> ET.Element:
    return ET.fromstring(found.svg)  # noqa: S314 - our own output


def with_class(found, name: str) -> list[ET.Element]:
    return [node for node in drawn(found).iter() if name in node.get("class", "").split()]


def points(found) -> list[tuple[float, float]]:
    (path,) = with_class(found, "line")
    return [tuple(map(float, pair.split())) for pair in path.get("d", "").strip("M").split("L")]


def test_the_limit_is_that_of_the_merging():
    assert LIMIT == spaces.LIMIT


def test_a_run_without_adapters_has_no_figure():
    assert figure(flat_run("fedavg", 0, [0.5])) is None
    assert figure(adapted([None, math.nan])) is None
    assert "averaging factors" not in report_page(studies([flat_run("fedavg", 0, [0.5])]))


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "high"])
def test_what_was_not_measured_is_no_number(value):
    assert math.isnan(averaging_error(round_record(1, state={"averaging_error": value})))


def test_every_measured_round_is_a_point_evaluated_or_not():
    found = figure(adapted([0.1, None, 0.2, 0.6]))
    assert len(points(found)) == 3
    assert "fedavg, 4: 0.6" in {node.text for node in drawn(found).iter("title")}


def test_the_threshold_lies_between_the_rounds_below_and_above_it():
    found = figure(adapted([0.2, 0.4]))
    (threshold,) = with_class(found, "threshold")
    (_, below), (_, above) = points(found)
    assert float(threshold.get("y1")) == pytest.approx((below + above) / 2, abs=0.1)  # 0.3 of 0.2 and 0.4
    assert "0.3" in {node.text for node in drawn(found).iter("text")}


def test_errors_beyond_the_whole_norm_are_drawn_where_they_are():
    (_, first), (_, second), (_, third) = points(figure(adapted([0.0, 1.5, 3.0])))
    assert first - second == pytest.approx(second - third, abs=0.2)


def test_marks_stand_where_products_were_averaged():
    found = figure(adapted([0.1, 0.4, 0.5]))
    assert len(with_class(found, "mark")) == 2
    assert "fedavg, round 2: 0.4, products" in {node.text for node in drawn(found).iter("title")}
    assert found.caption.endswith("truncated back to rank r. Marks: products were averaged.")
    assert "Marks" not in figure(adapted([0.1, 0.2])).caption


def test_a_mark_of_some_seeds_says_of_how_many():
    found = figure(adapted([0.1, 0.4]), adapted([0.1, 0.2], seed=1))
    assert "fedavg, round 2: 0.3, products in 1 of 2 seeds" in {node.text for node in drawn(found).iter("title")}
    assert len(with_class(found, "band")) == 1


def test_rounds_that_a_seed_did_not_measure_are_left_out():
    assert len(points(figure(adapted([0.1, 0.4, 0.2]), adapted([0.1, None, 0.2], seed=1)))) == 2


def test_methods_told_to_average_otherwise_are_named():
    always = adapted([0.1, 0.4], spaces_used=["product", "product"])
    never = adapted([0.1, 0.4], label="fedmerge", spaces_used=["factors", "factors"])
    assert figure(always).caption.endswith("fedavg: products below 0.3, too.")
    assert figure(never).caption.endswith("truncated back to rank r. fedmerge: factors above 0.3, too.")


def test_very_many_rounds_are_drawn_at_even_distances_with_first_and_last():
    found = figure(adapted([round_ / 2000 for round_ in range(1, 1001)]))
    assert len(points(found)) == POINTS
    said = {node.text for node in drawn(found).iter("title")}
    assert {"fedavg, 1: 0.0005", "fedavg, 1000: 0.5"} <= said
    assert len(found.svg) < 60_000
