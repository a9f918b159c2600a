"""Whose replies were lost or refused, counted from the records."""

import dataclasses

from synthetic_runs import flat_run, round_record, run_record

from fedmerge.report import attendance_table, write_report

ROUND = round_record(1, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], cohort=(0, 1, 2))
BAD = {"client": 1, "reason": "values"}


def run(*rounds):
    return run_record("fedavg", 0, [round_record(0, [0.5] * 3, [0.5] * 3), *rounds])


def test_a_run_in_which_everybody_answers_has_no_table():
    assert attendance_table(flat_run("fedavg", 0, [0.5, 0.5])) is None


def test_every_lost_and_refused_reply_is_counted_where_it_belongs():
    first = dataclasses.replace(ROUND, dropped=(2,), refused=(BAD, {"client": 1, "reason": "duplicate"}))
    second = dataclasses.replace(ROUND, round=2, refused=(BAD, {"client": None, "reason": "run"}))
    table = attendance_table(run(first, second))
    assert table is not None
    titles = [column.title for column in table.columns]
    assert titles == [
        "Client",
        "Asked",
        "Counted",
        "No answer",
        "Refused: run",
        "Refused: duplicate",
        "Refused: values",
    ]
    assert [row[1:] for row in table.rows] == [(2, 0, 0, 0, 1, 2), (2, 1, 1, 0, 0, 0)]
    assert table.notes == ("Refused without a readable sender: 1.",)


def test_abandoned_rounds_are_told_where_nothing_else_is_odd():
    table = attendance_table(run(dataclasses.replace(ROUND, abandoned=True)))
    assert table is not None
    assert table.rows == ()
    assert table.notes == (
        "1 round of 1 abandoned for too few replies: the models stayed as they were (first: round 1).",
    )


def test_the_table_shows_the_worst_and_says_how_many_there_are():
    table = attendance_table(run(dataclasses.replace(ROUND, dropped=(0, 2), refused=(BAD, BAD))), most=1)
    assert table is not None
    assert len(table.rows) == 1
    assert table.rows[0][0] == "client 1"
    assert table.notes == ("1 of 3 clients with a lost or refused reply.",)


def test_the_report_has_it_and_the_public_one_has_not(tmp_path):
    odd = run(dataclasses.replace(ROUND, refused=(BAD,)))
    assert "Refused: values" in write_report([odd], tmp_path / "page.html").read_text()
    assert "Refused: values" not in write_report([odd], tmp_path / "public.html", public=True).read_text()
