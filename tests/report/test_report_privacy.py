"""The crowds of a run's clients in numbers, words and pictures, and a page that may be published."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import stat
from collections.abc import Iterator
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_runs import flat_run, round_record, run_record

from fedmerge.core.crowd import crowd
from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.report import privacy, privacy_table, write_privacy, write_report
from fedmerge.report.page import report_page
from fedmerge.report.privacy_figure import DOTS, crowds
from fedmerge.report.privacy_text import method_table, plain_privacy, sentences
from fedmerge.report.study import studies

PAIRS = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
"""Two clusters of two, and one client alone."""


def merging(mixing, label="fedmerge", seed=0, **changes):
    count = len(mixing)
    return flat_run(label, seed, [0.5 + 0.01 * i for i in range(count)], mixing=mixing, **changes)


def one_model(count, label="fedavg", **changes):
    state = {"server_floats": 10, "num_models": 1}
    rounds = [
        round_record(k, [0.5] * count, [0.5] * count, state=state, cohort=tuple(range(k * count))) for k in (0, 1)
    ]
    return run_record(label, 0, rounds, **changes)


def without_models(label, models):
    state = {"server_floats": 0} if models is None else {"server_floats": 0, "num_models": models}
    return run_record(label, 0, [round_record(k, [0.5] * 3, [0.5] * 3, state=state) for k in (0, 1)])


# Numbers


def test_the_numbers_are_those_of_the_last_evaluated_rounds_weights():
    first, last = [[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], [[0.7, 0.3], [0.6, 0.4], [0.1, 0.9]]
    rounds = [round_record(k, [0.5] * 3, [1 - k / 10] * 3, mixing=rows) for k, rows in ((0, first), (2, last))]
    run = run_record("fedmerge", 0, [*rounds, round_record(3)], num_train=(10, 20, 30))
    found, wanted = privacy(run), crowd(torch.tensor(last, dtype=torch.float64), torch.tensor([10, 20, 30]))
    assert (found.kind, found.round, run.selected().round) == ("weights", 2, 0)
    np.testing.assert_allclose(found.effective, wanted.effective, atol=1e-9)
    assert found.found is not None
    assert torch.equal(found.found.leverage, wanted.leverage)


def test_one_model_is_a_crowd_of_everybody_else():
    found = privacy(one_model(7))
    assert found.kind == "one model"
    np.testing.assert_allclose(found.effective, 6)
    np.testing.assert_allclose(found.smallest, 6)


@pytest.mark.parametrize(
    ("models", "kind", "words"),
    [
        (0, "nothing shared", "Method local shares nothing, so no client learns anything"),
        (3, "unknown", "The records of method local do not say .*: how small its crowds are is not known"),
        (None, "unknown", "The records of method local do not say"),
    ],
)
def test_where_there_are_no_weights_the_reason_is_said(models, kind, words):
    run = without_models("local", models)
    found = privacy(run)
    assert (found.kind, found.found, found.smallest, crowds(found)) == (kind, None, None, None)
    assert re.match(words, sentences(found)[0])
    assert plain_privacy(found)["clients"] is None
    with pytest.raises(UsageError, match=r"run 'local' \(seed 0\): .*there is no table of it"):
        privacy_table(run)


def test_the_crowd_of_a_round_is_that_of_its_cohort_under_the_weights_before_it():
    """d = 1 and equal n: a cohort of m clients is a crowd of m − 1; round 1 has its own weights only afterwards."""
    even, apart = [[1.0, 0.0]] * 4, [[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2
    rounds = [
        round_record(0, [0.5] * 4, mixing=even),
        round_record(1, [0.5] * 4, mixing=apart, cohort=(0, 1, 2)),
        round_record(2, cohort=(0, 2)),
        round_record(3, cohort=(2, 3)),
    ]
    found = privacy(run_record("fedmerge", 0, rounds))
    np.testing.assert_array_equal(found.effective, [1, 1, 1, 1])
    assert found.smallest is not None
    np.testing.assert_array_equal(found.smallest, [2, 2, 1, 1])  # in round 2 clients 0 and 2 share no model


def test_only_replies_that_counted_are_in_a_rounds_crowd():
    """Of six clients two are missing, one of whom was not believed; a second reply of client 0 changed nothing."""
    run = one_model(6)
    refused = ({"client": 2, "reason": "values"}, {"client": 0, "reason": "duplicate"})
    late = dataclasses.replace(run.rounds[1], dropped=(5,), refused=refused)
    found = privacy(dataclasses.replace(run, rounds=(run.rounds[0], late)))
    assert found.smallest is not None
    np.testing.assert_array_equal(found.smallest, [3, 3, np.nan, 3, 3, np.nan])
    nothing = dataclasses.replace(run, rounds=(run.rounds[0], dataclasses.replace(late, abandoned=True)))
    assert privacy(nothing).smallest is None


def test_a_client_that_never_took_part_has_no_crowd_of_a_round():
    found = privacy(merging([[0.5, 0.5]] * 3))  # clients 0 and 1 take part
    assert found.smallest is not None
    np.testing.assert_array_equal(found.smallest, [1, 1, np.nan])


def test_without_a_round_there_is_no_crowd_of_one():
    run = run_record("fedmerge", 0, [round_record(0, [0.5] * 3, mixing=[[1.0]] * 3)])
    assert privacy(run).smallest is None
    assert "Crowds of single rounds were not computed" in sentences(privacy(run))[-1]
    assert "Smallest round" not in [column.title for column in privacy_table(run).columns]


def test_a_cohort_of_clients_that_are_not_there_is_named():
    run = one_model(3)
    odd = dataclasses.replace(run, rounds=(run.rounds[0], dataclasses.replace(run.rounds[1], cohort=(0, 7))))
    with pytest.raises(DataError, match=r"got a cohort with client 7; expected 0..2"):
        privacy(odd)


def test_a_run_without_an_evaluation_is_refused():
    run = one_model(3)
    bare = tuple(dataclasses.replace(record, test=None) for record in run.rounds)
    with pytest.raises(FedmergeError, match="no evaluated round yet"):
        privacy(dataclasses.replace(run, rounds=bare))


# Words and tables


def test_the_smallest_crowds_come_first_and_are_warned_of():
    mixing = [[0.0, 1.0]] * 2 + [[1.0, 0.0]] * 7
    table = privacy_table(merging(mixing, num_train=(10,) * 9))
    titles = [column.title for column in table.columns]
    rows = [dict(zip(titles, row, strict=True)) for row in table.rows]
    assert [row["Crowd"] for row in rows] == pytest.approx([1, 1, *[6] * 7])
    assert [row["Client"] for row in rows] == [f"client {i}" for i in range(9)]
    assert [row["Warning"] for row in rows] == ["below 5"] * 2 + [None] * 7
    assert rows[0]["Reads best"] == "client 1"
    assert rows[0]["Its part (%)"] == 1
    assert rows[0]["Leverage (%)"] == rows[0]["Largest share (%)"] == 0.5


def test_who_can_read_nobody_comes_last_and_has_no_name_beside_it():
    table = privacy_table(merging(PAIRS))
    assert [row[0] for row in table.rows][-1] == "client 4"
    assert "| client 4 | – |" in table.markdown()


def test_the_table_can_be_cut_and_says_so():
    table = privacy_table(merging([[1.0]] * 30), most=4)
    assert len(table.rows) == 4
    assert table.notes[0].startswith("4 of 30 clients, the smallest crowd first.")


def test_the_smallest_crowd_is_named_with_who_is_read():
    said = sentences(privacy(merging(PAIRS)))
    assert said[0] == (
        "4 of 5 clients have a crowd below 5. The smallest is 1.00: of what client 0 sees of the others' updates on "
        "its own models, 100.0 % is that of client 1."
    )
    assert said[1] == "With these weights 1 client shares no model: nobody but the server reads its updates."


def test_large_crowds_are_said_to_be_large():
    assert sentences(privacy(one_model(9)))[0] == "Every crowd is 5 or more; the smallest is 8.00."


def test_with_nobody_to_read_nothing_else_is_said():
    found = privacy(merging([[1.0, 0.0], [0.0, 1.0]]))
    assert sentences(found)[0].startswith("No client can read another's update off its own models")
    assert crowds(found) is None


def test_rows_of_parts_of_the_network_are_said_to_be_in_their_mean_only():
    run = merging([[1.0]] * 9, options={"rows": "layer"})
    assert "single parts may have smaller crowds" in sentences(privacy(run))[-1]


def test_methods_are_compared_by_their_worst_seed():
    runs = [merging(PAIRS), merging([[1.0]] * 5, seed=1), one_model(5), without_models("local", 0)]
    same = [dataclasses.replace(run, data_sha256=f"{run.seed:064x}") for run in runs]
    study = studies([run for run in same if len(run.client_names) == 5])[0]
    rows = {row[0]: row[1:] for row in method_table(study).rows}
    assert rows["fedmerge"] == (1.0, 5, 1.0)
    assert rows["fedavg"] == pytest.approx((4.0, 5, 0.2))


def test_a_method_without_weights_says_why_in_the_comparison():
    study = studies([without_models("local", 0), without_models("fedem", 3)])[0]
    assert [row[-1] for row in method_table(study).rows] == ["nothing is shared", "not known"]


def test_the_plain_numbers_are_json_with_null_for_nobody():
    clients = plain_privacy(privacy(merging(PAIRS)))["clients"]
    assert clients[4]["crowd"] is clients[4]["reads_best"] is clients[4]["reads_best_share"] is None
    assert (clients[0]["crowd"], clients[0]["reads_best"], clients[0]["leverage"]) == (1.0, "client 1", 0.5)


def test_a_crowd_of_five_is_not_below_five():
    """Σ p² of five equal shares is rounded to just above 1/5."""
    found = privacy(one_model(6))
    assert found.small == ()
    assert sentences(found)[0] == "Every crowd is 5 or more; the smallest is 5.00."


# Figure


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 40), models=st.integers(1, 4), seed=st.integers(0, 1000))
def test_every_client_with_a_crowd_is_a_dot_within_the_axes(count, models, seed):
    rng = np.random.default_rng(seed)
    found = privacy(merging(rng.dirichlet(np.full(models, 0.3), count).round(6).tolist()))
    figure = crowds(found)
    if figure is None:
        return
    root = ET.fromstring(figure.svg)  # noqa: S314 - our own output
    dots = list(root.iter("circle"))
    width, height = map(float, root.get("viewBox", "").split()[2:])
    assert all(0 <= float(dot.get("cx", "nan")) <= width for dot in dots)
    assert all(0 <= float(dot.get("cy", "nan")) <= height for dot in dots)
    values = [float((dot.find("title").text or "").split(": ")[1]) for dot in dots]
    assert values == sorted(values)
    assert sum("c1" in dot.get("class", "") for dot in dots) == len(found.small)


@pytest.mark.parametrize("small", [0, 3, DOTS + 2])
def test_many_clients_are_a_line_with_the_small_crowds_in_a_colour_of_their_own(small):
    mixing = [[1.0, 0.0]] * small + [[0.0, 1.0]] * (DOTS + 2 - small)
    found = privacy(merging(mixing))
    root = ET.fromstring(crowds(found).svg)  # noqa: S314 - our own output
    lengths = {path.get("class"): path.get("d").count("L") + 1 for path in root.iter("path")}
    warned = len(found.small)
    wanted = {"line c1": 2 * warned, "line c0": 2 * (DOTS + 2 - warned)}
    assert lengths == {name: count for name, count in wanted.items() if count}
    assert not list(root.iter("circle"))


# Pages


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_pages_are_their_owners_and_the_public_one_is_everybodys(tmp_path, open_umask):
    run = merging(PAIRS)
    assert mode(write_privacy(run, tmp_path / "new" / "privacy.html")) == 0o600
    assert mode(write_report([run], tmp_path / "report.html")) == 0o600
    assert mode(write_report([run], tmp_path / "public.html", public=True)) == 0o666


def test_a_folder_is_not_taken_for_a_page(tmp_path):
    with pytest.raises(UsageError, match=re.escape("privacy.html")):
        write_privacy(merging(PAIRS), tmp_path)


@pytest.mark.parametrize("run", [merging(PAIRS), one_model(3), without_models("local", 0), without_models("x", 4)])
def test_every_kind_of_run_has_a_page_and_a_chapter(tmp_path, run):
    page = write_privacy(run, tmp_path / "privacy.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "Content-Security-Policy" in page
    assert ">Privacy</h2>" in report_page(studies([run]))


def test_names_are_escaped(tmp_path):
    run = merging(PAIRS, client_names=tuple(f"<script>{i}" for i in range(5)))
    assert "<script>" not in write_privacy(run, tmp_path / "privacy.html").read_text()


# What may be published

_NAMES = ("Anna", "Bert", "Cleo", "Dora", "Emil")


def told(mixing, names=_NAMES, groups=(0, 0, 1, 1, 2), accuracy=(0.5, 0.51, 0.52, 0.53, 0.54)):
    """A study with all that tells of clients: weights, names, groups, tasks, class counts, texts."""
    shared = {
        "client_names": names,
        "groups": groups,
        "tasks": ("spam", "spam", "tags", "tags", "tags"),
        "class_counts": tuple((90 - i, 10 + i) for i in range(5)),
        "samples": ({"client": names[0], "task": "spam", "prompt": "secret", "completion": "word", "wanted": "yes"},),
    }
    return studies(
        [
            flat_run("fedmerge", 0, accuracy, mixing=mixing, **shared),
            flat_run("ifca", 0, accuracy, mixing=np.eye(5)[list(groups)].tolist(), **shared),
            flat_run("fedavg", 0, accuracy, **shared),
        ]
    )


def chapter(page, title):
    found = re.search(rf"<section><h2>{title}</h2>.*?</section>", page, re.DOTALL)
    return "" if found is None else found[0]


rows_of_five = st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=5, max_size=5)


@settings(max_examples=20, deadline=None)
@given(first=rows_of_five, second=rows_of_five, order=st.permutations(range(5)))
def test_a_public_page_is_the_same_whatever_the_weights_and_whoever_is_like_whom(first, second, order):
    """Five clients: every crowd is below 5, so that not even the count of small ones changes."""
    one, other = ([[round(a / math.fsum(row), 6) for a in row] for row in rows] for rows in (first, second))
    groups = tuple((0, 0, 1, 1, 2)[i] for i in order)
    names = tuple(_NAMES[i] for i in order)
    assert report_page(told(one), public=True) == report_page(told(other, names, groups), public=True)
    assert report_page(told(one)) != report_page(told(other, names, groups)) or (one, list(order)) == (
        other,
        sorted(order),
    )


def test_a_public_page_has_no_names_no_rows_and_no_lists_of_clusters():
    mixing = [[0.8137, 0.1451, 0.0412], [0.8137, 0.1451, 0.0412], *[[0.2391, 0.7283, 0.0326]] * 3]
    private, public = (
        re.sub("<style>.*?</style>", "", report_page(told(mixing), public=flag), flags=re.DOTALL)
        for flag in (False, True)
    )
    numbers = {form.format(a) for row in mixing for a in row for form in ("{:.4f}", "{:.3f}", "{:.2f}")}
    numbers |= {f"{100 * a:.1f}" for row in mixing for a in row}
    leaks = [*_NAMES, "secret", "Groups found", "Who uses which model", "true group", "Reads best", "Group A"]
    assert [word for word in [*_NAMES, "secret", "Groups found", "Who uses which model"] if word not in private] == []
    assert [word for word in leaks if word in public] == []
    assert numbers & set(re.findall(r"\d+\.\d+", private))
    assert not numbers & set(re.findall(r"\d+\.\d+", public))
    assert 'class="heat"' not in public


def test_a_public_page_does_not_tell_by_its_order_who_has_which_accuracy():
    mixing, shuffled = [[0.5, 0.3, 0.2]] * 5, (0.53, 0.5, 0.54, 0.52, 0.51)
    pages = [
        report_page(told(mixing, accuracy=accuracy), public=True)
        for accuracy in ((0.5, 0.51, 0.52, 0.53, 0.54), shuffled)
    ]
    first, second = (page.replace(chapter(page, "Task by task"), "") for page in pages)
    assert first == second


def test_a_public_page_says_how_many_crowds_are_small():
    public = report_page(studies([merging(PAIRS), one_model(9)][:1]), public=True)
    assert "fedmerge, seed 0: 4 of 5 clients had a crowd K_eff below 5" in public
    assert "fedavg, seed 0: none of 9 clients had a crowd" in report_page(studies([one_model(9)]), public=True)


def test_a_public_page_keeps_what_is_measured_of_the_methods():
    private, public = (report_page(told([[0.5, 0.3, 0.2]] * 5), public=flag) for flag in (False, True))
    for title in ("The numbers", "Task by task", "Costs", "How it was measured", "Versions and hashes"):
        assert chapter(private, title) == chapter(public, title) != ""
    for title in ("How far apart", "Over the rounds", "Privacy"):
        assert chapter(public, title)
