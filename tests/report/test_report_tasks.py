"""Clients of several tasks: the table by task, the order of the heat maps, and what each model is for."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_runs import flat_run, means_of

from fedmerge.report import clients_frame, task_table
from fedmerge.report.classes import SERVED, Classes, class_shares, classes_of, federation_shares
from fedmerge.report.explain import explain
from fedmerge.report.explain_figures import class_map, dendrogram, likeness_map, model_use
from fedmerge.report.explain_text import client_sentence, client_table, group_sentences, group_table, model_table
from fedmerge.report.figures import worst_clients
from fedmerge.report.kinds import kinds_of, known_tasks, other_groups
from fedmerge.report.page import report_page
from fedmerge.report.study import studies
from fedmerge.report.weights import client_order, merging_weights, weights_over_rounds

TASKS = ("spam", "topic", "spam", "topic")
NAMES = ("spam: ham", "spam: junk", "topic: sports", "topic: business")
COUNTS = ((90, 10, 0, 0), (0, 0, 90, 10), (10, 90, 0, 0), (0, 0, 50, 50))
MIXING = [[0.9, 0.1, 0.0], [0.1, 0.0, 0.9], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]]


def tasked(label="fedmerge", seed=0, accuracy=(0.9, 0.5, 0.8, 0.4), **changes):
    values = {"mixing": MIXING, "groups": (0, 1, 0, 1), "tasks": TASKS, "class_names": NAMES, "class_counts": COUNTS}
    return flat_run(label, seed, list(accuracy), **{**values, **changes})


def drawn(figure) -> ET.Element:
    return ET.fromstring(figure.svg)  # noqa: S314 - our own output


def words(figure) -> list[str]:
    return ["".join(node.itertext()) for node in drawn(figure).iter("text")]


def tips(figure) -> set[str]:
    return {node.text or "" for node in drawn(figure).iter("title")}


def with_class(figure, name: str) -> list[ET.Element]:
    return [node for node in drawn(figure).iter() if name in node.get("class", "").split()]


def titles(table) -> list[str]:
    return [column.title for column in table.columns]


# Tasks and true groups


def test_a_single_task_is_no_task_to_tell_apart():
    assert known_tasks(tasked(tasks=("spam",) * 4)) is None
    assert known_tasks(tasked(tasks=None)) is None
    assert known_tasks(tasked()) == TASKS


def test_true_groups_that_are_the_tasks_by_number_are_not_told_again():
    assert other_groups(tasked()) is None
    assert other_groups(tasked(groups=(1, 0, 1, 0))) is None
    assert other_groups(tasked(groups=(0, 0, 1, 1))) == (0, 0, 1, 1)  # across the tasks
    assert other_groups(tasked(groups=(0, 1, 2, 1))) == (0, 1, 2, 1)  # finer than the tasks
    assert other_groups(tasked(groups=(0, 0, 0, 0))) == (0, 0, 0, 0)
    assert other_groups(tasked(tasks=None)) == (0, 1, 0, 1)
    assert other_groups(tasked(groups=None)) is None


def test_kinds_are_tasks_in_the_order_of_clients_else_true_groups_by_number():
    assert kinds_of(tasked(tasks=("b", "a", "b", "a")))[:4] == ("Task", ("b", "a"), ("b", "a"), (0, 1, 0, 1))
    groups = kinds_of(tasked(tasks=None, groups=(7, 2, 7, 2)))
    assert groups[:4] == ("True group", ("2", "7"), ("group 2", "group 7"), (1, 0, 1, 0))
    assert kinds_of(tasked(tasks=None, groups=None)) is None


# The table by task


def test_the_table_by_task_by_hand():
    runs = [tasked(seed=0), tasked(seed=1, accuracy=(0.7, 0.3, 0.8, 0.4)), tasked("fedavg", 0, (0.5, 0.9, 0.5, 0.9))]
    table = task_table(runs)
    assert titles(table) == ["Method", "spam (%)", "topic (%)", "Mean over tasks (%)"]
    assert [row[0] for row in table.rows] == ["fedavg", "fedmerge"]  # 70 % and 60 %
    _, spam, topic, overall = table.rows[1]
    assert spam.mean == pytest.approx((0.85 + 0.75) / 2)
    assert topic.mean == pytest.approx((0.45 + 0.35) / 2)
    assert overall.mean == pytest.approx(((0.85 + 0.45) / 2 + (0.75 + 0.35) / 2) / 2)
    assert overall.half_width == pytest.approx(12.706205 * 0.05, rel=1e-6)  # seeds at 65 % and 55 %
    assert math.isnan(table.rows[0][1].half_width)
    assert table.notes == (
        "± is the half width of a 95 % t interval over seeds.",
        "Mean over the clients of a task (2 clients each), at the round chosen on validation.",
    )


def test_each_task_counts_once_however_many_clients_it_has():
    run = tasked(accuracy=(0.9, 0.1, 0.9, 0.9), tasks=("spam", "topic", "spam", "spam"), groups=None)
    (row,) = task_table([run]).rows
    assert row[-1].mean == pytest.approx((0.9 + 0.1) / 2)
    assert "1 to 3 clients each" in task_table([run]).notes[0]


@given(st.lists(st.floats(0, 1), min_size=8, max_size=8), st.permutations(range(4)))
def test_the_order_of_clients_changes_no_mean_of_a_task(values, order):
    def table(places):
        runs = []
        for seed in (0, 1):
            own = values[4 * seed : 4 * seed + 4]
            accuracy, tasks = [own[i] for i in places], tuple(TASKS[i] for i in places)
            runs.append(flat_run("fedmerge", seed, accuracy, tasks=tasks))
        found = task_table(runs)
        return dict(zip(titles(found)[1:], [cell.mean for cell in found.rows[0][1:]], strict=True))

    assert table(order) == pytest.approx(table(range(4)))


def test_tasks_of_clients_without_test_items_are_left_out_of_the_mean():
    (row,) = task_table([tasked(accuracy=(0.6, None, 0.8, None))]).texts()
    assert row == ("fedmerge", "70.0", "–", "70.0")


def test_without_tasks_there_is_no_table_and_a_run_without_them_keeps_its_row():
    assert task_table(means_of({"fedmerge": [0.5]})) is None
    assert task_table([tasked(tasks=("spam",) * 4)]) is None
    rows = task_table([tasked(), tasked("old", tasks=None)]).texts()
    assert rows[1] == ("old", "–", "–", "–")


def test_several_settings_stand_in_one_table_by_task():
    other = tasked(tasks=("spam", "genre", "spam", "genre"), setting="other")
    table = task_table([tasked(), other, tasked(tasks=None, setting="none")])
    assert titles(table) == ["Setting", "Method", "spam (%)", "topic (%)", "Mean over tasks (%)", "genre (%)"]
    assert [row[0] for row in table.rows] == ["digits, two groups", "other"]
    assert table.rows[1][3] is None


def test_the_page_has_the_table_where_there_are_tasks_and_nowhere_else():
    assert "Task by task" in report_page(studies([tasked()]))
    assert "Task by task" not in report_page(studies([tasked(tasks=None)]))


def test_every_client_of_the_client_table_says_its_task():
    assert clients_frame([tasked()])["task"].tolist() == list(TASKS)
    assert clients_frame([tasked(tasks=None)])["task"].isna().all()


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
def test_names_of_tasks_are_text_and_nothing_else(evil):
    run = tasked(tasks=(evil, "topic", evil, "topic"), class_names=(f"{evil}: a", f"{evil}: b", *NAMES[2:]))
    text = report_page(studies([run]))
    assert "<script" not in text
    assert "<img" not in text


# Figures


@given(st.integers(1, 30), st.integers(1, 5))
def test_within_a_task_clients_stand_by_their_favourite_model(clients, models):
    mixing = np.array([[1.0 + (7 * i + 3 * j) % 5 for j in range(models)] for i in range(clients)])
    mixing /= mixing.sum(axis=1, keepdims=True)
    tasks = [i % 3 for i in range(clients)]
    order = client_order(mixing, tasks, by_favourite=True)
    places = [(tasks[client], int(mixing[client].argmax())) for client in order]
    assert sorted(order) == list(range(clients))
    assert places == sorted(places)


def test_the_heat_map_has_a_block_with_its_name_for_each_task():
    figure = merging_weights(tasked())
    rows = [text for text in words(figure) if text.startswith("client ")]
    assert rows[:2] == ["client 0", "client 2"]  # of spam: models 0 and 1
    assert set(rows[2:]) == {"client 1", "client 3"}  # of topic: model 2
    assert len(with_class(figure, "cut")) == 1
    assert {"spam", "topic"} <= set(words(figure))
    assert "client 2 (spam), model 1: 0.80" in tips(figure)
    assert "Rows by task, then favourite model." in figure.caption
    assert len(with_class(weights_over_rounds(tasked()), "cut")) == 2  # one in each of two rounds


def test_the_heat_map_by_true_group_is_as_it_was():
    figure = merging_weights(tasked(tasks=None, groups=(7, 2, 7, 2)))
    assert {"group 2", "group 7"} <= set(words(figure))
    assert "client 2, model 1: 0.80" in tips(figure)
    assert "Rows by true group, then likeness." in figure.caption


def test_colours_are_of_tasks_and_the_key_names_them():
    found = explain(tasked())
    for figure in (dendrogram(found), model_use(found)):
        assert {"Task", "spam", "topic"} <= set(words(figure))
    assert "client 3: task topic" in tips(dendrogram(found))
    assert "client 3: task topic" in tips(likeness_map(found))
    weight = (0.9 + 0.2) / 4
    assert f"Model 0, spam: {100 * weight:.1f} % of all weight" in tips(model_use(found))
    assert "Colours: the tasks of its users." in model_use(found).caption


def test_long_names_of_tasks_take_further_lines_of_the_key_and_none_lies_beyond_the_figure():
    tasks = tuple(f"a name that is long {index}" for index in range(8))
    mixing = np.eye(8).tolist()
    figure = model_use(explain(flat_run("fedmerge", 0, [0.5] * 8, mixing=mixing, tasks=tasks)))
    key = list(drawn(figure).iter("circle"))
    assert len({node.get("cy") for node in key}) > 1
    assert max(float(node.get("cx")) for node in key) + 8 + 7.4 * 16 <= 520
    bars = [float(node.get("y")) for node in drawn(figure).iter("rect")]
    assert min(bars) > max(float(node.get("cy")) for node in key) + 4


def test_the_worst_clients_say_their_tasks():
    figure = worst_clients(studies([tasked()])[0])
    assert figure.caption.endswith("Tasks: 2 of topic and 2 of spam.")
    assert "fedmerge, client 3 (topic), seed 0: 40.0 %" in tips(figure)
    assert "Tasks" not in worst_clients(studies([tasked(tasks=None)])[0]).caption


# Words and tables


def test_groups_and_clients_are_told_with_their_tasks_in_place_of_true_groups():
    found = explain(tasked())
    said = " ".join(group_sentences(found))
    assert "client 1 and client 3 share model 2 (95 %). Tasks: 2 of topic." in said
    assert "True groups" not in said
    assert "; task spam, group " in client_sentence(found, 0)
    for table, here, gone in (
        (group_table(found), "Tasks", "True groups"),
        (model_table(found), "Tasks", "True groups"),
        (client_table(found), "Task", "True group"),
    ):
        assert here in titles(table)
        assert gone not in titles(table)


def test_true_groups_across_the_tasks_are_told_beside_them():
    found = explain(tasked(groups=(0, 0, 1, 1)))
    assert "Tasks: 2 of topic. True groups: 1 of group 0 and 1 of group 1." in " ".join(group_sentences(found))
    assert {"Tasks", "True groups"} <= set(titles(model_table(found)))
    assert {"Task", "True group"} <= set(titles(client_table(found)))


def test_a_model_says_which_tasks_it_serves():
    first, second, last = explain(tasked()).models
    mass = 0.9 + 0.1 + 0.2
    assert first.tasks == (("spam", pytest.approx(1.1 / mass)), ("topic", pytest.approx(0.1 / mass)))
    assert second.tasks == (("spam", 1.0),)
    assert last.tasks == (("topic", 1.0),)
    table = model_table(explain(tasked()))
    column = titles(table).index("Tasks")
    assert [row[column] for row in table.texts()] == ["spam (92 %), topic (8 %)", "spam (100 %)", "topic (100 %)"]
    assert explain(tasked(tasks=None)).models[0].tasks is None


# Classes


def test_classes_of_single_tasks_are_compared_within_their_task():
    classes = classes_of(tasked())
    assert classes.tasks == ("spam", "topic")
    assert classes.blocks.tolist() == [0, 0, 1, 1]
    assert federation_shares(classes) == pytest.approx([0.5, 0.5, 0.7, 0.3])
    first, second, last = explain(tasked()).models
    ham = (0.9 * 90 + 0.2 * 10) / (1.1 * 100)
    assert first.classes == ((0, pytest.approx(ham), pytest.approx(ham / 0.5)),)
    assert second.classes == ((1, pytest.approx((0.1 * 10 + 0.8 * 90) / 90), pytest.approx(73 / 90 / 0.5)),)
    assert last.classes == ()  # it serves all of topic alike, which its tasks say
    assert "within their task" in next(c.meaning for c in model_table(explain(tasked())).columns if "stand" in c.title)


def test_classes_that_two_tasks_share_are_compared_across_the_federation():
    classes = classes_of(tasked(class_counts=((9, 1, 0, 0), (0, 0, 9, 1), (1, 9, 0, 0), (1, 0, 5, 5))))
    assert classes.tasks == ()
    assert federation_shares(classes).sum() == pytest.approx(1)


def test_shares_within_each_task_sum_to_one_where_the_task_is_served():
    shares = class_shares(np.array(MIXING), classes_of(tasked()))
    assert np.nansum(shares[0, :2]) == pytest.approx(1)
    assert np.isnan(shares[1, 2:]).all()  # model 1 has no user with topics
    rare = np.array([[1.0], [SERVED / 2], [1.0], [0.0]])  # topics: 1 / 80 of the model's examples
    assert np.isnan(class_shares(rare, classes_of(tasked()))[0, 2:]).all()


def test_a_task_without_examples_is_no_reason_to_stumble():
    run = tasked(class_counts=((9, 1, 0, 0), (0,) * 4, (1, 9, 0, 0), (0,) * 4))
    assert federation_shares(classes_of(run)) == pytest.approx([0.5, 0.5, 0.0, 0.0])
    assert explain(run).models[2].classes == ()
    assert "nan" not in report_page(studies([run]))


def test_the_map_of_classes_has_its_tasks_in_blocks_and_says_their_names_once():
    names = (NAMES[0], NAMES[2], NAMES[1], NAMES[3])  # out of order: classes of a task stand together all the same
    counts = tuple((a, c, b, d) for a, b, c, d in COUNTS)
    figure = class_map(explain(tasked(class_names=names, class_counts=counts)))
    shown = [text for text in words(figure) if text in {"ham", "junk", "sports", "business"}]
    assert shown == ["ham", "junk", "sports", "business"]
    assert {"spam", "topic"} <= set(words(figure))
    assert len(with_class(figure, "cut")) == 1
    assert "spam: ham, model 0: 75.5 %, 1.5 times the average" in tips(figure)
    assert not {tip for tip in tips(figure) if tip.startswith("spam") and "model 2" in tip}
    assert "against the federation within its task" in figure.caption


def test_a_map_of_classes_without_any_difference_is_not_drawn():
    assert class_map(explain(tasked(class_counts=((5, 5, 0, 0), (0, 0, 5, 5)) * 2))) is None


def test_completions_have_one_class_and_say_nothing_of_classes():
    found = explain(tasked(class_names=("text",), class_counts=((20,),) * 4))
    assert "Classes that stand out" not in titles(model_table(found))
    assert model_table(found).notes == ()
    assert class_map(found) is None


def test_tags_are_counted_as_labels():
    tags = explain(tasked(class_names=("O", "person"), class_counts=((500, 90), (500, 10), (500, 10), (500, 10))))
    assert class_map(tags).caption.startswith("Train labels of a class")
    few = explain(tasked(class_names=("no", "yes"), class_counts=((15, 5), (5, 15), (15, 5), (5, 15))))
    assert class_map(few).caption.startswith("Train examples of a class")


def test_without_tasks_a_share_is_of_all_classes():
    counts = np.array(COUNTS, dtype=np.float64)
    plain = Classes(counts, np.zeros(4, dtype=np.int64), ())
    assert federation_shares(plain) == pytest.approx(counts.sum(axis=0) / counts.sum())
