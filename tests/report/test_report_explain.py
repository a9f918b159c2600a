"""What the merging weights say: groups, models and clients, on matrices whose answers are known by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_runs import flat_run

from fedmerge.core.errors import UsageError
from fedmerge.experiment.record import append_rounds, read_run, write_run
from fedmerge.report.classes import Classes, class_shares
from fedmerge.report.explain import (
    client_use,
    effective_models,
    explain,
    explained,
    group_name,
    near_equal_models,
    undecided_clients,
    unused_models,
)
from fedmerge.report.explain_figures import class_map, dendrogram, likeness_map, model_use
from fedmerge.report.explain_text import (
    client_phrase,
    client_sentence,
    client_table,
    gain_sentence,
    group_sentences,
    group_table,
    model_table,
    remarks,
)
from fedmerge.report.likeness import LINKED, likeness, nearest
from fedmerge.report.study import studies

# Two pairs that share a model, and a client of its own.
PAIRS = [[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]]
COUNTS = ((90, 10), (90, 10), (10, 90), (10, 90), (50, 50))
ACCURACY = [0.9, 0.8, 0.5, 0.4, None]


def pairs(**changes):
    values = {"mixing": PAIRS, "groups": (0, 0, 1, 1, 2), "class_counts": COUNTS, **changes}
    return flat_run("fedmerge", 0, ACCURACY, **values)


@st.composite
def mixings(draw) -> np.ndarray:
    clients, models = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    cells = st.lists(st.integers(0, 9), min_size=models, max_size=models).filter(any)
    rows = np.array([draw(cells) for _ in range(clients)], dtype=np.float64)
    return rows / rows.sum(axis=1, keepdims=True)


def drawn(figure) -> ET.Element:
    return ET.fromstring(figure.svg)  # noqa: S314 - our own output


def texts(figure) -> list[str]:
    return [node.text or "" for node in drawn(figure).iter("text")]


# Likeness


@given(mixings())
def test_every_client_is_in_one_group_and_groups_follow_the_order(mixing):
    found = likeness(mixing)
    assert sorted(found.order) == list(range(len(mixing)))
    assert [client for group in found.groups for client in group] == list(found.order)


@given(mixings(), st.randoms(use_true_random=False))
def test_numbering_the_models_otherwise_changes_no_group(mixing, random):
    columns = list(range(mixing.shape[1]))
    random.shuffle(columns)
    before, after = ({frozenset(group) for group in likeness(m).groups} for m in (mixing, mixing[:, columns]))
    distances = np.round([np.minimum(a, b).sum() for a in mixing for b in mixing], 9)
    if len(set(distances)) > len(mixing) * (len(mixing) - 1) // 2:  # without ties, which a tree may break either way
        assert before == after


@pytest.mark.parametrize("clients", [9, LINKED + 9])
def test_one_hot_rows_are_their_own_groups_however_many_clients(clients):
    models = np.arange(clients) % 3
    found = likeness(np.eye(3)[models])
    assert {frozenset(group) for group in found.groups} == {
        frozenset(np.flatnonzero(models == model).tolist()) for model in range(3)
    }
    assert (found.tree is None) == (clients > LINKED)


def test_clients_that_share_exactly_half_are_together_and_less_is_apart():
    assert len(likeness(np.array([[1.0, 0.0], [0.5, 0.5]])).groups) == 1
    assert len(likeness(np.array([[1.0, 0.0], [0.49, 0.51]])).groups) == 2


def test_branches_meet_at_the_mean_weight_shared_over_pairs():
    heights = likeness(np.array(PAIRS)).tree[:, 2]
    across = np.mean([0.1 + 0.1, 0.1 + 0.2, 0.2 + 0.1, 0.2 + 0.2])  # clients 0, 1 with 2, 3
    assert np.allclose(heights, [1 - 0.9, 1 - 0.9, 1 - across, 1.0])


def test_the_nearest_clients_come_first_and_strangers_never():
    assert nearest(np.array(PAIRS), 0, 4) == (
        (1, pytest.approx(0.8 + 0.1)),
        (3, pytest.approx(0.2 + 0.1)),
        (2, pytest.approx(0.1 + 0.1)),
    )


# Numbers


def test_groups_have_their_members_models_true_groups_and_accuracy():
    found = {group.members: group for group in explain(pairs()).groups}
    assert {frozenset(members) for members in found} == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4})}
    first = next(group for members, group in found.items() if 0 in members)
    assert first.models == ((0, pytest.approx((0.9 + 0.8) / 2)), (1, pytest.approx((0.1 + 0.2) / 2)))
    assert first.true_groups == ((0, 2),)
    assert first.accuracy == pytest.approx((0.9 + 0.8) / 2)
    assert math.isnan(next(group for group in found.values() if group.members == (4,)).accuracy)
    assert [group.name for group in explain(pairs()).groups] == ["A", "B", "C"]


def test_a_model_has_its_share_users_true_groups_and_accuracy():
    first, second, last = explain(pairs()).models
    mass = 0.9 + 0.8 + 0.1 + 0.2
    assert first.share == pytest.approx(mass / 5)
    assert (first.heaviest_of, second.heaviest_of, last.heaviest_of) == (2, 2, 1)
    assert first.clients == ((0, 0.9), (1, 0.8), (3, 0.2))
    assert first.true_groups == ((0, pytest.approx(1.7 / mass)), (1, pytest.approx(0.3 / mass)))
    assert first.accuracy == pytest.approx((0.9 * 0.9 + 0.8 * 0.8 + 0.1 * 0.5 + 0.2 * 0.4) / mass)
    assert math.isnan(last.accuracy)  # its only user has no test items


def test_classes_stand_out_against_the_federation_if_the_examples_suffice():
    first, second, last = explain(pairs()).models
    share = (1.7 * 90 + 0.3 * 10) / (2 * 100)  # 0.78; 250 of 500 examples in the federation are of this class
    assert first.classes == ((0, pytest.approx(share), pytest.approx(share / 0.5)),)
    assert second.classes[0].class_index == 1
    assert last.classes == ()
    few = tuple(tuple(count // 10 for count in row) for row in COUNTS)  # 0.78 of 20: 2.5 standard errors above 0.5
    assert explain(pairs(class_counts=few)).models[0].classes == ()


@given(mixings(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_models_users_together_are_the_federation(mixing, classes, random):
    counts = np.array([[random.randint(1, 9) for _ in range(classes)] for _ in mixing], dtype=np.float64)
    shares = np.nan_to_num(class_shares(mixing, Classes(counts, np.zeros(classes, dtype=np.int64), ())))
    examples = mixing.T @ counts.sum(axis=1)
    assert np.allclose(examples @ shares, counts.sum(axis=0))


def test_effective_models_count_the_models_in_use():
    mixing = np.array([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4])
    assert effective_models(mixing) == pytest.approx([1, 2, 4])


@given(mixings())
def test_effective_models_lie_between_one_and_all(mixing):
    found = effective_models(mixing)
    assert (found >= 1 - 1e-9).all()
    assert (found <= mixing.shape[1] + 1e-9).all()


def test_a_client_is_compared_with_training_alone():
    local = flat_run("local", 0, [0.7, 0.85, 0.5, 0.6, None])
    found = explain(pairs(), local)
    assert client_use(found, 0).gain == pytest.approx(0.9 - 0.7)
    assert math.isnan(client_use(found, 4).gain)
    assert gain_sentence(found) == "Of 4 clients, against training alone: 1 better, 2 worse, 1 equal."
    assert math.isnan(client_use(explain(pairs()), 0).gain)
    assert gain_sentence(explain(pairs())) == ""


def test_names_of_groups_never_end():
    names = [group_name(index) for index in range(800)]
    assert len(set(names)) == 800
    assert (names[0], names[25], names[26], names[701], names[702]) == ("A", "Z", "AA", "ZZ", "AAA")


# What is odd


def test_a_model_that_nobody_gives_five_percent_is_unused():
    mixing = np.array([[0.96, 0.04, 0.0], [0.0, 0.0, 1.0]])
    assert unused_models(mixing) == (1,)
    assert unused_models(np.full((3, 40), 1 / 40)) == ()  # few percent each is all there is


def test_models_in_one_ratio_at_every_client_are_near_equal():
    mixing = np.array([[0.6, 0.3, 0.1], [0.2, 0.1, 0.7], [0.4, 0.2, 0.4]])
    assert near_equal_models(mixing) == ((0, 1),)
    assert near_equal_models(np.array(PAIRS)) == ()
    assert near_equal_models(mixing[:1]) == ()  # one client says nothing


def test_unused_models_are_not_called_equal():
    assert near_equal_models(np.array([[0.5, 0.499, 0.001, 0.0], [0.5, 0.499, 0.001, 0.0]])) == ((0, 1),)


def test_a_client_is_undecided_within_a_quarter_of_even_weights():
    mixing = np.array([[0.5, 0.5], [0.625, 0.375], [0.63, 0.37]])
    assert undecided_clients(mixing) == (0, 1)
    assert undecided_clients(np.ones((3, 1))) == ()


def test_what_is_odd_is_said():
    mixing = [[0.25] * 4, [0.64, 0.32, 0.0, 0.04], [0.6, 0.3, 0.06, 0.04]]
    said = " ".join(remarks(explain(flat_run("fedmerge", 0, [0.5] * 3, mixing=mixing))))
    assert "client 0 uses all 4 models nearly alike." in said
    assert "A client uses" in said
    unused = remarks(explain(flat_run("fedmerge", 0, [0.5] * 2, mixing=[[0.64, 0.32, 0.04], [0.3, 0.15, 0.55]])))
    assert any(words.startswith("Models 0 and 1 are used by the same clients") for words in unused)
    lonely = remarks(explain(flat_run("fedmerge", 0, [0.5] * 2, mixing=[[0.9, 0.08, 0.02], [0.2, 0.8, 0.0]])))
    assert "Model 2 is unused: no client gives 5 % to it." in lonely


# Words and tables


def test_groups_are_told_in_plain_words():
    assert set(group_sentences(explain(pairs()))) == {
        f"Group {name}: {members}"
        for name, members in _told(
            {
                (0, 1): "client 0 and client 1 share model 0 (85 %) and model 1 (15 %). True groups: 2 of group 0.",
                (2, 3): "client 2 and client 3 share model 1 (85 %) and model 0 (15 %). True groups: 2 of group 1.",
            }
        )
    } | {"client 4 shares less than half of the weight with any group."}


def _told(sentences):
    names = {frozenset(group.members): group.name for group in explain(pairs()).groups}
    return [(names[frozenset(members)], words) for members, words in sentences.items()]


def test_a_client_is_told_in_plain_words():
    found = explain(pairs(), flat_run("local", 0, [0.7, 0.85, 0.5, 0.6, None]))
    assert client_phrase(found, client_use(found, 0)) == "uses model 0 (90 %) and model 1 (10 %) with client 1"
    assert client_phrase(found, client_use(found, 4)) == "uses model 2 (100 %) and is like no other client"
    assert client_sentence(found, 0).endswith("models in effect. Test accuracy 90.0 %, +20.0 points to training alone.")
    assert client_sentence(found, 4).endswith("1.0 models in effect.")


def test_tables_leave_out_what_is_not_known():
    old = explain(pairs(groups=None, class_counts=None))
    titles = [
        column.title for table in (group_table(old), model_table(old), client_table(old)) for column in table.columns
    ]
    assert not {"True groups", "True group", "Classes that stand out", "To Local (points)"} & set(titles)
    assert "run it again" in model_table(old).notes[0]
    assert model_table(explain(pairs())).notes == ()
    row = dict(
        zip(
            [c.title for c in model_table(explain(pairs())).columns],
            model_table(explain(pairs())).texts()[0],
            strict=True,
        )
    )
    assert row["Classes that stand out"] == "yes (1.6 ×)"
    assert row["True groups"] == "0 (85 %), 1 (15 %)"
    assert row["Heaviest users"] == "client 0 (90 %), client 1 (80 %), client 3 (20 %)"


def test_many_small_groups_are_counted_and_not_told():
    mixing = np.eye(30)[np.arange(60) // 2].tolist()
    said = group_sentences(explain(flat_run("fedmerge", 0, [0.5] * 60, mixing=mixing)))
    assert len(said) == 13
    assert said[-1] == "36 clients in 18 smaller groups."


# One model, none, one client


def test_one_model_serves_all_and_nothing_is_odd():
    found = explain(flat_run("fedmerge", 0, [0.5] * 4, mixing=[[1.0]] * 4, class_counts=((1, 2),) * 4))
    assert group_sentences(found) == ("One model serves all 4 clients alike: there are no groups to tell apart.",)
    assert remarks(found) == ()
    assert (dendrogram(found), likeness_map(found), class_map(found)) == (None, None, None)
    assert "100.0 %, heaviest of 4" in texts(model_use(found))


def test_a_run_without_merging_weights_is_refused_by_name():
    with pytest.raises(UsageError, match=r"run 'fedavg' \(seed 0\) has no merging weights.*for example fedmerge"):
        explain(flat_run("fedavg", 0, [0.5]))


def test_of_a_study_the_reference_is_explained_or_the_first_that_can_be():
    others = [flat_run("fedavg", 0, ACCURACY), flat_run("local", 0, ACCURACY)]
    found = explained(studies([*others, pairs()])[0])
    assert found is not None
    assert found.run.label == "fedmerge"
    assert found.local is not None
    other = explained(studies([*others, pairs()], reference="fedavg")[0])
    assert other is not None
    assert other.run.label == "fedmerge"
    assert explained(studies(others)[0]) is None


def test_a_single_client_is_alone():
    found = explain(flat_run("fedmerge", 0, [0.5], mixing=[[0.7, 0.3]]))
    assert (dendrogram(found), likeness_map(found)) == (None, None)
    assert (
        client_phrase(found, client_use(found, 0))
        == "uses model 0 (70 %) and model 1 (30 %) and is like no other client"
    )


# Figures


def test_the_tree_has_every_client_as_a_leaf_and_every_group_with_its_letter():
    found = explain(pairs())
    figure = dendrogram(found)
    assert {f"client {index}" for index in range(5)} <= set(texts(figure))
    assert {"A", "B", "C"} <= set(texts(figure))
    branches = [node for node in drawn(figure).iter("path") if node.get("class") == "branch"]
    assert len(branches) == 4


def test_branches_are_drawn_at_the_weight_they_share():
    figure = drawn(dendrogram(explain(pairs())))
    ticks = {node.text: float(node.get("x")) for node in figure.iter("text") if node.get("text-anchor") == "middle"}
    deepest = sorted(
        max(float(pair.split()[0]) for pair in node.get("d", "").strip("M").split("L"))
        for node in figure.iter("path")
        if node.get("class") == "branch"
    )
    at = [ticks["100"] + (1 - shared) * (ticks["0"] - ticks["100"]) for shared in (0.9, 0.9, 0.3, 0.0)]
    assert deepest == pytest.approx(at, abs=0.2)


def test_the_map_tells_the_weight_that_two_clients_share():
    found = [node.text for node in drawn(likeness_map(explain(pairs()))).iter("title")]
    assert {"client 0, client 1: 0.90", "client 1, client 3: 0.40", "client 2: true group 1"} <= set(found)


def test_bars_of_models_are_as_long_as_their_parts():
    figure = drawn(model_use(explain(pairs())))
    bars = [node for node in figure.iter("rect") if "box" in node.get("class", "")]
    lengths = {node.find("title").text: float(node.get("width")) for node in bars}
    first = lengths["Model 0, group 0: 34.0 % of all weight"], lengths["Model 0, group 1: 6.0 % of all weight"]
    assert first[0] / first[1] == pytest.approx(0.34 / 0.06, rel=0.01)
    assert lengths["Model 2, group 2: 20.0 % of all weight"] == pytest.approx(sum(first) / 2, rel=0.01)


def test_a_class_is_marked_as_more_or_less_with_its_ratio():
    cells = {
        (node.find("title").text, node.get("class"))
        for node in drawn(class_map(explain(pairs()))).iter("rect")
        if node.get("class") in ("more", "less") and "model" in node.find("title").text
    }
    assert cells == {
        ("yes, model 0: 78.0 %, 1.6 times the average", "more"),
        ("no, model 0: 22.0 %, 0.44 times the average", "less"),
        ("yes, model 1: 22.0 %, 0.44 times the average", "less"),
        ("no, model 1: 78.0 %, 1.6 times the average", "more"),
    }
    assert class_map(explain(pairs(class_counts=None))) is None


def test_of_very_many_classes_those_that_differ_most_are_shown():
    counts = np.full((2, 100), 10)
    counts[0, 77] = 90
    run = flat_run(
        "fedmerge",
        0,
        [0.5, 0.5],
        mixing=[[1.0, 0.0], [0.0, 1.0]],
        class_names=tuple(f"class {index}" for index in range(100)),
        class_counts=tuple(map(tuple, counts.tolist())),
    )
    shown = texts(class_map(explain(run)))
    assert "class 77" in shown
    assert sum(words.startswith("class ") for words in shown) == 30


def test_a_thousand_clients_make_no_big_figures_and_no_tree():
    mixing = np.eye(4)[np.arange(1000) % 4] * 0.9 + 0.025
    run = flat_run("fedmerge", 0, [0.5] * 1000, mixing=mixing.tolist(), groups=tuple(i % 4 for i in range(1000)))
    found = explain(run)
    assert dendrogram(found) is None
    assert len(found.groups) == 4
    assert len(likeness_map(found).svg) < 350_000
    assert len(client_table(found, 500).rows) == 500


def test_very_many_groups_share_the_rows_of_a_map():
    mixing = np.eye(300)[np.arange(900) // 3].tolist()
    figure = likeness_map(explain(flat_run("fedmerge", 0, [0.5] * 900, mixing=mixing)))
    assert len(figure.svg) < 350_000
    assert "Up to 25 clients share a row" in figure.caption  # 900 / 36


def test_the_nearest_of_many_alike_are_the_first():
    assert nearest(np.ones((50, 1)), 3, 3) == ((0, 1.0), (1, 1.0), (2, 1.0))


def test_colours_of_true_groups_are_named_while_they_can_be_told_apart():
    def figure(groups: int):
        mixing = np.eye(groups).tolist()
        return model_use(explain(flat_run("fedmerge", 0, [0.5] * groups, mixing=mixing, groups=tuple(range(groups)))))

    assert "True group" in texts(figure(14))
    assert len(set(re.findall(r'class="mark ([^"]+)"', figure(14).svg))) == 14
    assert "True group" not in texts(figure(15))


# Records


def test_class_counts_are_kept_and_runs_written_without_them_are_read(tmp_path):
    run = pairs()
    write_run(tmp_path, run)
    for record in run.rounds:
        append_rounds(tmp_path, (record,))
    assert read_run(tmp_path).class_counts == COUNTS
    plain = json.loads((tmp_path / "run.json").read_text())
    del plain["class_counts"]
    (tmp_path / "run.json").write_text(json.dumps(plain))
    assert read_run(tmp_path) == dataclasses.replace(run, class_counts=None)
