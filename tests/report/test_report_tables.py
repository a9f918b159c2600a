from __future__ import annotations

import csv
import dataclasses
import io
import math

import numpy as np
import pytest
from synthetic_runs import flat_run, means_of, round_record, run_record, scores

from fedmerge.report import clients_frame, comparison_table, runs_frame
from fedmerge.report.statistics import Interval
from fedmerge.report.study import studies
from fedmerge.report.table import Column, Table
from fedmerge.report.tables import cost_table, structure_table
from fedmerge.report.text import duration, formatted, points, ranges, scaled, size

WOBBLY = [
    round_record(0, [0.1, 0.1], [0.1, 0.1]),
    round_record(1, [0.6, 0.8], [0.9, 0.7], mixing=[[1.0, 0.0], [0.5, 0.5]]),
    round_record(2, [1.0, 1.0], [0.5, 0.5], mixing=[[0.5, 0.5], [0.5, 0.5]]),
    round_record(3, [0.5, 0.3], [0.6, 0.6], mixing=[[0.0, 1.0], [0.0, 1.0]]),
]


def test_a_run_is_reported_at_the_selected_and_at_the_last_round_and_never_at_the_best_test_score():
    row = runs_frame([run_record("fedmerge", 0, WOBBLY, num_test=(30, 10), groups=(7, 4))]).iloc[0]
    assert (row["selected_round"], row["last_round"]) == (1, 3)
    assert row["mean"] == pytest.approx((0.6 + 0.8) / 2)
    assert row["weighted"] == pytest.approx((30 * 0.6 + 10 * 0.8) / 40)
    assert row["last_mean"] == pytest.approx((0.5 + 0.3) / 2)
    assert row["entropy"] == pytest.approx((0 + 1) / 2)  # of round 1
    assert row["models"] == 2
    assert math.isnan(row["below_local"])
    assert math.isnan(row["finetuned_mean"])


def test_costs_are_means_over_the_trained_rounds_and_their_cohorts():
    row = runs_frame([run_record("fedmerge", 0, WOBBLY)]).iloc[0]
    assert (row["bytes_down"], row["bytes_up"]) == (100, 50)  # 200 and 100 to a cohort of two
    assert (row["forward"], row["backward"]) == (40, 30)
    assert (row["server_floats"], row["seconds_per_round"], row["seconds"]) == (1000, 2, 9)


def test_a_run_that_trained_nothing_has_no_costs_per_round():
    row = runs_frame([run_record("fedavg", 0, [round_record(0, [0.5], [0.5], state={})])]).iloc[0]
    assert row[["bytes_down", "forward", "server_floats", "seconds_per_round"]].isna().all()


def test_below_local_compares_selected_with_selected_and_last_with_last():
    local = run_record("local", 0, [round_record(1, [0.7, 0.7], [0.9, 0.9]), round_record(2, [0.2, 0.4], [0.5, 0.5])])
    frame = runs_frame([run_record("fedmerge", 0, WOBBLY), local]).set_index("label")
    # selected: 0.6 < 0.7 <= 0.8; last: 0.5 >= 0.2 and 0.3 < 0.4
    assert frame.loc["fedmerge", "below_local"] == 0.5
    assert frame.loc["fedmerge", "last_below_local"] == 0.5
    assert math.isnan(frame.loc["local", "below_local"])


def test_below_local_at_the_last_round_when_that_is_the_selected_one():
    local = run_record("local", 0, [round_record(1, [0.2, 0.2], [0.9, 0.9]), round_record(2, [0.8, 0.8], [0.5, 0.5])])
    frame = runs_frame([flat_run("fedavg", 0, [0.5, 0.5]), local]).set_index("label")
    assert (frame.loc["fedavg", "below_local"], frame.loc["fedavg", "last_below_local"]) == (0, 1)


def test_without_validation_the_last_round_is_the_selected_one():
    rounds = [round_record(1, [0.9], [None]), round_record(2, [0.4], None)]
    row = runs_frame([run_record("fedavg", 0, rounds, num_validation=(0,))]).iloc[0]
    assert (row["selected_round"], row["mean"]) == (2, 0.4)


def test_every_client_of_every_run_has_a_row():
    runs = [
        run_record("fedmerge", 0, WOBBLY, groups=(7, 4), finetuned=scores([0.7, None])),
        flat_run("local", 0, [0.5, None]),
    ]
    frame = clients_frame(runs)
    assert len(frame) == 4
    first = frame.iloc[0]
    assert first[["label", "name", "group", "accuracy", "last_accuracy", "finetuned_accuracy"]].tolist() == [
        "fedmerge", "client 0", 7, 0.6, 0.5, 0.7
    ]  # fmt: skip
    assert frame["loss"].tolist()[:3] == pytest.approx([0.4, 0.2, 0.5])
    assert math.isnan(frame.iloc[3]["accuracy"])


def test_every_summary_can_be_derived_from_the_client_table():
    runs = means_of({"fedmerge": [0.8, 0.7], "local": [0.5, 0.6]}, clients=5)
    derived = clients_frame(runs).groupby(["label", "seed"])["accuracy"].mean()
    stated = runs_frame(runs).set_index(["label", "seed"])["mean"]
    assert derived.to_dict() == pytest.approx(stated.to_dict())


def column(table: Table, title: str) -> dict[str, object]:
    index = [found.title for found in table.columns].index(title)
    return {str(row[0]): row[index] for row in table.rows}


def test_the_main_table_by_hand():
    table = comparison_table(means_of({"local": [0.6, 0.6], "fedmerge": [0.8, 0.7]}))
    assert [row[0] for row in table.rows] == ["fedmerge", "local"]  # best mean first
    mean = column(table, "Mean (%)")["fedmerge"]
    assert isinstance(mean, Interval)
    assert (mean.mean, mean.half_width) == (pytest.approx(0.75), pytest.approx(12.706205 * 0.05, rel=1e-6))
    gap = column(table, "To fedmerge (points)")
    assert gap["fedmerge"] is None
    assert gap["local"].mean == pytest.approx(-0.15)
    assert column(table, "Below Local (%)")["fedmerge"].mean == 0
    # t = 0.15 / 0.05 = 3 with one degree of freedom
    assert column(table, "p (Holm)")["local"] == pytest.approx(1 - 2 / math.pi * math.atan(3))


def test_columns_without_a_number_are_left_out_and_said():
    table = comparison_table(means_of({"fedmerge": [0.8, 0.7], "fedavg": [0.5, 0.5]}))
    titles = [found.title for found in table.columns]
    assert "Fine-tuned (%)" not in titles
    assert "Below Local (%)" not in titles
    assert "There is no Local-only run: the share of clients below it is unknown." in table.notes


def test_fine_tuned_results_stand_beside_the_plain_ones():
    runs = [flat_run("fedavg", 0, [0.5, 0.5], finetuned=scores([0.6, 0.8])), flat_run("local", 0, [0.5, 0.5])]
    found = column(comparison_table(runs), "Fine-tuned (%)")
    assert found["fedavg"].mean == pytest.approx(0.7)
    assert math.isnan(found["local"].mean)


def test_an_interval_over_clients_is_marked_and_explained_in_every_form():
    table = comparison_table(means_of({"fedmerge": [0.8], "fedavg": [0.5]}, clients=3))
    assert "−30.0 ± 0.0†" in table.markdown()
    assert "† over clients, one seed: says nothing about other splits." in table.markdown()
    assert r"$-$30.0 $\pm$ 0.0$^\dagger$" in table.latex()
    assert r"% $^" not in table.latex()
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert rows[1]["To fedmerge (points) ± over"] == "clients"
    assert "p (Holm)" not in rows[0]
    assert not any(note.startswith("±") for note in table.notes)


def test_seeds_that_are_not_shared_are_named():
    runs = means_of({"fedmerge": [0.8, 0.7, 0.6], "fedavg": [0.5, 0.5], "local": [0.5, 0.5]})
    notes = comparison_table(runs).notes
    assert "fedavg and fedmerge are paired on seeds 0, 1 only." in notes
    assert "The share below Local counts seeds 0, 1 only." in notes


def test_several_settings_stand_in_one_table_with_their_own_comparisons():
    runs = means_of({"fedmerge": [0.8, 0.7], "fedavg": [0.5, 0.5]}, setting="a") + means_of(
        {"fedmerge": [0.4, 0.3], "fedavg": [0.5, 0.5]}, setting="b"
    )
    table = comparison_table(runs)
    assert [row[:2] for row in table.rows] == [("a", "fedmerge"), ("a", "fedavg"), ("b", "fedavg"), ("b", "fedmerge")]
    assert comparison_table(runs).columns[0].title == "Setting"


NASTY = Table(
    (Column("Name", "text"), Column("Score (%)", "percent")),
    (("a|b_c & 50% <x>\nnext", Interval(0.5, 0.25, 2)), ("=1", None)),
    "nasty",
)


def test_markdown_keeps_its_columns_whatever_a_label_holds():
    lines = NASTY.markdown().splitlines()
    assert lines == [
        "| Name | Score (%) |",
        "| --- | ---: |",
        r"| a\|b\_c & 50% \<x\> next | 50.0 ± 25.0 |",
        "| =1 | – |",
    ]


def test_latex_is_a_plain_tabular_with_everything_escaped():
    assert NASTY.latex().splitlines() == [
        r"\begin{tabular}{lr}",
        r"\hline",
        r"Name & Score (\%) \\",
        r"\hline",
        r"a|b\_c \& 50\% $<$x$>$ next & 50.0 $\pm$ 25.0 \\",
        r"=1 & -- \\",
        r"\hline",
        r"\end{tabular}",
    ]


def test_csv_reads_back_to_the_numbers_of_full_precision():
    third = Table((Column("x", "percent"),), ((Interval(1 / 3, 1 / 7, 5),), (Interval(0.5, math.nan, 1),)), "thirds")
    rows = list(csv.reader(io.StringIO(third.csv())))
    assert rows[0] == ["x", "x ±"]
    assert [float(text) for text in rows[1]] == pytest.approx([100 / 3, 100 / 7])
    assert rows[2] == ["50", ""]
    assert next(csv.reader(io.StringIO(NASTY.csv().split("\n", 1)[1])))[0] == "a|b_c & 50% <x>\nnext"


def test_the_cost_table_keeps_every_method_even_one_that_sends_nothing():
    silent = run_record("local", 0, [round_record(1, [0.5], [0.5], bytes_down=0, bytes_up=0)])
    (text,) = cost_table(studies([silent])[0]).texts()
    assert text[:3] == ("local", "0 B", "0 B")


def test_recovery_and_entropy_are_tabled_for_methods_with_merging_weights():
    mixing = np.eye(2)[[0, 1, 0]].tolist()
    runs = [
        flat_run("fedmerge", 0, [0.5] * 3, mixing=mixing, groups=(4, 2, 4)),
        flat_run("fedavg", 0, [0.5] * 3, groups=(4, 2, 4)),
    ]
    table = structure_table(studies(runs)[0])
    assert table.texts() == (("fedmerge", "2", "0.00", "1.00"),)
    assert structure_table(studies(runs[1:])[0]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (formatted(None, "percent"), "–"),
        (formatted(math.nan, "bytes"), "–"),
        (formatted(0.0004, "p"), "< 0.001"),
        (formatted(0.0512, "p"), "0.051"),
        (formatted(0.04963, "p"), "0.0496"),
        (formatted(Interval(-0.0004, 0.002, 3), "points"), "0.0 ± 0.2"),
        (formatted(Interval(0.0125, math.nan, 1), "points"), "+1.2"),
        (points(-0.1234), "−12.3"),
        (scaled(999.6), "1 k"),
        (scaled(73728), "73.7 k"),
        (size(999), "999 B"),
        (size(1_200_000), "1.2 MB"),
        (size(2_500_000_000), "2.5 GB"),
        (duration(0.25), "250 ms"),
        (duration(0), "0 s"),
        (duration(9), "9.0 s"),
        (duration(59.6), "60 s"),
        (duration(150), "2 min"),
        (duration(9000), "2.5 h"),
        (ranges([0, 1, 2, 4, 5]), "0–2, 4, 5"),
    ],
)
def test_numbers_are_written_as_a_reader_wants_them(value, text):
    assert value == text


def test_server_memory_is_the_most_that_was_ever_kept():
    run = flat_run("FedMerge", 0, [0.5, 0.6])
    first, last = run.rounds[0], run.rounds[-1]
    busy = dataclasses.replace(last, round=1, state={"server_floats": 9000})
    calm = dataclasses.replace(last, round=2, state={"server_floats": 1000})
    frame = runs_frame([dataclasses.replace(run, rounds=(first, busy, calm))])
    assert frame["server_floats"].tolist() == [9000]
