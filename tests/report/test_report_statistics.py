from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedmerge.core.errors import DataError
from fedmerge.report.statistics import (
    Interval,
    holm,
    mean_entropy,
    mean_interval,
    overlap,
    paired_interval,
    paired_p_value,
    recovery,
    share_below,
    summarise,
)

shares = st.lists(st.integers(0, 100).map(lambda value: value / 100), min_size=1, max_size=40)
levels = st.lists(st.floats(-1, 1).map(lambda value: round(value, 3)), min_size=2, max_size=8)
mixings = st.integers(1, 5).flatmap(
    lambda models: st.lists(
        st.lists(st.integers(0, 9), min_size=models, max_size=models).filter(any), min_size=1, max_size=8
    ).map(lambda rows: np.array([[value / sum(row) for value in row] for row in rows]))
)


@given(shares, st.randoms())
def test_the_order_of_clients_changes_no_summary(values, random):
    tests = [random.randint(1, 9) for _ in values]
    order = list(range(len(values)))
    random.shuffle(order)
    plain = summarise(np.array(values), np.array(tests, dtype=float))
    mixed = summarise(np.array(values)[order], np.array(tests, dtype=float)[order])
    for name in ("mean", "weighted", "deviation", "worst_tenth", "bottom_decile"):
        assert getattr(plain, name) == pytest.approx(getattr(mixed, name), abs=1e-12)


@given(shares)
def test_summaries_lie_between_the_worst_and_the_best_client(values):
    found = summarise(np.array(values), np.ones(len(values)))
    assert min(values) - 1e-12 <= found.worst_tenth <= found.mean + 1e-12 <= max(values) + 2e-12
    assert found.weighted == pytest.approx(found.mean)
    assert found.bottom_decile >= min(values) - 1e-12


def test_summaries_of_twelve_clients_by_hand():
    accuracy = np.array([0.1, 0.2] + [0.8] * 10)
    tests = np.array([10.0, 10.0] + [1.0] * 10)
    found = summarise(accuracy, tests, local=np.array([0.2, 0.2] + [0.9] * 5 + [0.7] * 5))
    assert found.mean == pytest.approx((0.1 + 0.2 + 8.0) / 12)
    assert found.weighted == pytest.approx((1 + 2 + 8) / 30)
    assert found.worst_tenth == pytest.approx((0.1 + 0.2) / 2)  # ceil(12 / 10) = 2 clients
    assert found.bottom_decile == pytest.approx(0.2 + 0.1 * 0.6)  # position 0.1 * 11 = 1.1, between 0.2 and 0.8
    mean = 8.3 / 12
    assert found.deviation == pytest.approx(math.sqrt((0.01 + 0.04 + 6.4) / 12 - mean**2))
    assert found.below_local == pytest.approx(6 / 12)  # the first, and the five at 0.9; 0.2 is not below 0.2


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (10, 1), (11, 2), (70, 7), (100, 10)])
def test_the_worst_tenth_rounds_up_without_float_surprises(clients, worst):
    accuracy = np.arange(clients) / 100
    assert summarise(accuracy, np.ones(clients)).worst_tenth == pytest.approx(accuracy[:worst].mean())


def test_a_client_without_test_items_takes_no_part():
    found = summarise(np.array([0.5, np.nan, 1.0]), np.array([1.0, 0.0, 3.0]), np.array([0.6, np.nan, 0.9]))
    assert found.mean == pytest.approx(0.75)
    assert found.weighted == pytest.approx((0.5 + 3.0) / 4)
    assert found.below_local == pytest.approx(1 / 2)


def test_no_client_with_a_test_score_is_an_error():
    with pytest.raises(DataError, match="none of the 2 clients has a test score; give the clients test items"):
        summarise(np.array([np.nan, np.nan]), np.zeros(2))


def test_share_below_is_unknown_without_common_clients():
    assert math.isnan(share_below(np.array([0.5, np.nan]), np.array([np.nan, 0.5])))


@given(levels, st.floats(-2, 2), st.floats(0.5, 3))
def test_an_interval_moves_and_stretches_with_its_values(values, shift, factor):
    plain, moved = mean_interval(np.array(values)), mean_interval(factor * np.array(values) + shift)
    assert moved.mean == pytest.approx(factor * plain.mean + shift, abs=1e-9)
    assert moved.half_width == pytest.approx(factor * plain.half_width, abs=1e-9)


def test_the_interval_of_three_seeds_by_hand():
    found = mean_interval(np.array([0.7, 0.8, 0.9]))
    # s = 0.1, t(2; 0.975) = 4.302653
    assert (found.mean, found.count, found.over) == (pytest.approx(0.8), 3, "seeds")
    assert found.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)


def test_one_value_has_a_mean_and_no_interval():
    found = mean_interval(np.array([0.7]))
    assert found.mean == 0.7
    assert math.isnan(found.half_width)
    assert not found.excludes_zero


def test_no_value_has_no_mean():
    found = mean_interval(np.array([np.nan]))
    assert math.isnan(found.mean)
    assert found.count == 0


@given(st.lists(st.tuples(shares, shares), min_size=2, max_size=6))
def test_a_paired_difference_turned_round_changes_its_sign(pairs):
    cut = [(np.array(a[: len(b)]), np.array(b[: len(a)])) for a, b in pairs]
    there = paired_interval([a for a, _ in cut], [b for _, b in cut])
    back = paired_interval([b for _, b in cut], [a for a, _ in cut])
    assert there.mean == pytest.approx(-back.mean, abs=1e-12)
    assert there.half_width == pytest.approx(back.half_width, abs=1e-12)
    assert paired_p_value(there) == pytest.approx(paired_p_value(back), abs=1e-6)


@given(levels)
def test_the_test_rejects_exactly_when_the_interval_excludes_zero(values):
    found = mean_interval(np.array(values))
    p = paired_p_value(found)
    if abs(p - 0.05) > 1e-9:
        assert (p < 0.05) == found.excludes_zero


def test_the_p_value_is_that_of_the_paired_t_test():
    ours, theirs = np.array([0.8, 0.7, 0.9, 0.85]), np.array([0.75, 0.72, 0.8, 0.7])
    assert paired_p_value(mean_interval(ours - theirs)) == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)


def test_identical_results_differ_by_exactly_nothing():
    same = [np.array([0.3, 0.7]), np.array([0.4, 0.8])]
    found = paired_interval(same, same)
    assert (found.mean, found.half_width) == (0.0, 0.0)
    assert paired_p_value(found) == 1.0


def test_the_same_gap_on_every_seed_is_certain():
    assert paired_p_value(Interval(0.25, 0.0, 3)) == 0.0


def test_with_one_seed_the_interval_is_over_clients_and_there_is_no_test():
    found = paired_interval([np.array([0.9, 0.7, np.nan])], [np.array([0.6, 0.6, np.nan])])
    # gaps 0.3 and 0.1: mean 0.2, s = 0.1414, t(1; 0.975) = 12.706205
    assert (found.over, found.count) == ("clients", 2)
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(12.706205 * math.sqrt(0.02) / math.sqrt(2), rel=1e-6)
    assert math.isnan(paired_p_value(found))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_a_p_value_nor_exceeds_bonferroni(values):
    for p, corrected in zip(values, holm(values), strict=True):
        assert p <= corrected <= min(1.0, p * len(values)) + 1e-12


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_holm_keeps_the_order(values):
    pairs = sorted(zip(values, holm(values), strict=True))
    assert [corrected for _, corrected in pairs] == sorted(corrected for _, corrected in pairs)


def test_holm_by_hand_with_an_untested_method_between():
    # sorted .01, .03, .04 of three: 3 * .01, max(.03, 2 * .03), max(.06, .04)
    assert holm([0.01, math.nan, 0.04, 0.03])[::2] == pytest.approx((0.03, 0.06))
    assert math.isnan(holm([0.01, math.nan])[1])


@given(mixings, st.randoms())
def test_the_names_of_the_models_do_not_matter_for_recovery(mixing, random):
    groups = [random.randint(0, 2) for _ in mixing]
    mixing = np.eye(mixing.shape[1])[mixing.argmax(axis=1)]  # without ties, which argmax breaks by position
    order = list(range(mixing.shape[1]))
    random.shuffle(order)
    assert recovery(mixing, groups) == pytest.approx(recovery(mixing[:, order], groups))


def test_recovery_is_one_for_the_true_groups_under_any_names():
    assert recovery(np.array([[0.1, 0.9], [0.4, 0.6], [0.8, 0.2]]), [5, 5, 3]) == 1.0


@given(mixings)
def test_entropy_lies_between_one_model_and_all_alike(mixing):
    if mixing.shape[1] == 1:
        assert math.isnan(mean_entropy(mixing))
    else:
        assert -1e-12 <= mean_entropy(mixing) <= 1 + 1e-12


def test_entropy_at_its_ends_and_in_between():
    assert mean_entropy(np.eye(4)) == 0
    assert mean_entropy(np.full((2, 4), 0.25)) == pytest.approx(1)
    assert mean_entropy(np.array([[0.5, 0.5, 0, 0], [1, 0, 0, 0]])) == pytest.approx((0.5 + 0) / 2)


@given(mixings)
def test_overlap_is_symmetric_and_complete_with_oneself(mixing):
    found = overlap(mixing)
    assert found == pytest.approx(found.T)
    assert np.diag(found) == pytest.approx(np.ones(len(mixing)))
    assert (found <= 1 + 1e-12).all()


def test_overlap_of_two_clients_by_hand():
    assert overlap(np.array([[0.7, 0.3], [0.4, 0.6]]))[0, 1] == pytest.approx(0.4 + 0.3)
