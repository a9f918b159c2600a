from __future__ import annotations

import dataclasses
import itertools
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_runs import flat_run, means_of, round_record, run_record, scores

from fedmerge.core.errors import UsageError
from fedmerge.experiment.record import append_rounds, read_run, write_run
from fedmerge.report import write_report
from fedmerge.report.markup import Markup, element, escape, join, shorten
from fedmerge.report.page import report_page
from fedmerge.report.study import studies

VOID = {"meta"}


class Outline(HTMLParser):
    """Reads a page and checks that every element is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page(runs, **options) -> str:
    return report_page(studies(runs, **options))


def full_runs(**changes):
    """Three methods, two seeds, merging weights, groups, fine-tuning, and one client without test items."""
    shared = {
        "groups": (0, 1, 0),
        "finetuned": scores([0.6, 0.6, None]),
        "class_counts": ((90, 10), (10, 90), (60, 60)),
        **changes,
    }
    mixing = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]
    runs = []
    for seed in (0, 1):
        runs.append(flat_run("fedmerge", seed, [0.8 + seed / 100, 0.7, None], mixing=mixing, **shared))
        runs.append(flat_run("fedavg", seed, [0.5, 0.4, None], **shared))
        runs.append(flat_run("local", seed, [0.6, 0.5, None], **shared))
    return runs


# Markup


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_a_text_in_an_element_is_read_back_as_it_was(text):
    outline = Outline(element("p", text, title=text))
    assert outline.tags == [("p", {"title": text})]
    assert "".join(outline.words) == text


@given(st.text(st.characters()))
def test_any_text_at_all_can_be_written_and_opens_no_element(text):
    written = element("b", text)
    written.encode("utf-8")
    assert [tag for tag, _ in Outline(written).tags] == ["b"]


def test_what_a_page_cannot_hold_is_shown_as_missing():
    assert escape("a\x00b\ud800") == "a\ufffdb\ufffd"


def test_markup_is_not_escaped_twice():
    inner = element("i", "&")
    assert element("b", inner, None, "<") == "<b><i>&amp;</i>&lt;</b>"
    assert isinstance(join(inner, "x"), Markup)


def test_long_names_keep_their_ends():
    assert shorten("fedmerge official, d = 10", 16) == "fedmerg…, d = 10"
    assert shorten("fedavg", 16) == "fedavg"


# The page


def test_the_page_tells_the_story_in_order():
    outline = Outline(page(full_runs()))
    text = outline.text[outline.text.index("digits") :]  # after the title
    story = [
        "digits, two groups",
        "fedmerge beats",
        "The numbers",
        "How far apart",
        "Over the rounds",
        "Client by client",
        "Merging weights",
        "Who shares what, and what each model is for",
        "Costs",
        "How it was measured",
        "Versions and hashes",
    ]
    places = [text.index(chapter) for chapter in story]
    assert places == sorted(places)


def test_headings_descend_without_gaps_and_there_is_one_title():
    for runs in (full_runs(), full_runs() + full_runs(setting="other")):
        levels = [int(tag[1]) for tag, _ in Outline(page(runs)).tags if re.fullmatch(r"h\d", tag)]
        assert levels.count(1) == 1
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_page_needs_nothing_from_outside_and_runs_nothing():
    text = page(full_runs())
    outline = Outline(text)
    policies = [attributes["content"] for _, attributes in outline.tags if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in outline.tags}
    assert not [name for _, attributes in outline.tags for name in attributes if name.startswith("on")]
    targets = [attributes[name] for _, attributes in outline.tags for name in ("src", "href") if name in attributes]
    assert all(target.startswith("#") for target in targets)
    assert not re.search(r"https?://|url\(|@import", text)


def test_every_picture_is_described_and_every_id_is_unique():
    tags = Outline(page(full_runs() + full_runs(setting="other"))).tags
    assert all(attributes.get("aria-label") for tag, attributes in tags if tag == "svg")
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)) == 2


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style>&amp;'"])
def test_names_from_outside_are_text_and_nothing_else(evil):
    runs = full_runs(
        setting=evil + " setting",
        client_names=(evil, evil + "2", evil + "3"),
        class_names=(evil, evil + "2"),
        versions={evil: evil},
        options={evil: evil},
        data_sha256=evil,
    )
    runs = [dataclasses.replace(run, label=f"{run.label} {evil}") for run in runs]
    outline = Outline(page(runs))
    plain = Outline(page(full_runs()))
    assert {tag for tag, _ in outline.tags} <= {tag for tag, _ in plain.tags}
    assert not [name for _, attributes in outline.tags for name in attributes if name.startswith("on")]
    assert evil in outline.text


def test_no_number_is_written_as_nan_or_inf():
    runs = [*full_runs(), flat_run("lonely", 7, [0.4, 0.4, None])]
    assert not re.search(r"\b(nan|inf)\b", Outline(page(runs)).text)
    assert not re.search(r'="-?(nan|inf)', page(runs))


def test_a_model_that_nobody_uses_at_all_has_a_row_without_numbers_that_are_none():
    runs = [flat_run("fedmerge", 0, [0.5, 0.4], mixing=[[1.0, 0.0]] * 2, groups=(0, 1), class_counts=((9, 1), (1, 9)))]
    assert not re.search(r'\b(nan|inf)\b|="-?(nan|inf)', page(runs))
    assert "Model 1 is unused" in page(runs)


def test_groups_models_and_clients_are_explained_for_the_reference():
    text = " ".join(Outline(page(full_runs())).text.split())
    shared = r"client 0 and client 2 share model 0 \(75 %\) and model 1 \(25 %\)\. True groups: 2 of group 0\."
    assert re.search(rf"Group [AB]: {shared}", text)
    assert "client 2 uses both models nearly alike." in text
    assert "uses model 0 (90 %) and model 1 (10 %) with client 2" in text
    assert "All 3 clients, like ones side by side" in text
    assert "Who shares what" not in page([flat_run("fedavg", 0, [0.5])])


def test_a_thousand_clients_make_a_page_that_can_be_sent():
    mixing = (np.eye(4)[np.arange(1000) % 4] * 0.9 + 0.025).tolist()
    text = page([flat_run("fedmerge", 0, [0.5] * 1000, mixing=mixing, groups=tuple(i % 4 for i in range(1000)))])
    assert "500 of 1,000 clients, like ones side by side" in text
    assert len(text) < 1_000_000


def test_names_in_print_are_no_larger_than_the_room_kept_for_them():
    style = resources.files("fedmerge.report").joinpath("style.css").read_text(encoding="utf-8")
    printed = style[style.index("@media print") :]
    assert re.search(r"\.chart \.name \{ font-size: 13px; \}", printed)  # `svg.CHARACTER` is measured at 13


def test_every_setting_has_its_own_section_and_verdict():
    outline = Outline(page(full_runs() + means_of({"fedmerge": [0.3, 0.4], "fedavg": [0.3, 0.4]}, setting="tied")))
    assert "3 methods in 2 settings" in outline.text
    assert "fedmerge gives exactly the results of fedavg." in outline.text


@pytest.mark.parametrize(
    "runs",
    [
        [flat_run("fedavg", 0, [0.5])],
        [run_record("fedavg", 0, [round_record(0, [0.5, None])], num_validation=(0, 0))],
        [run_record("fedavg", 0, [round_record(1, [0.5, 0.6]), round_record(2)], status="interrupted")],
        [flat_run("fedmerge", 0, [0.5], mixing=[[1.0]])],
        [flat_run("fedmerge", 0, [0.0, 0.0], mixing=[[0.5, 0.5], [0.5, 0.5]], client_names=("", ""))],
        means_of({f"method {index}": [0.5, 0.5] for index in range(20)}),
    ],
    ids=["one client", "one evaluation", "interrupted", "one model", "all wrong", "twenty methods"],
)
def test_odd_runs_make_a_whole_page(runs):
    assert "Versions and hashes" in Outline(page(runs)).text


def test_a_long_list_of_clients_says_what_it_leaves_out():
    run = flat_run("fedavg", 0, [index / 300 for index in range(300)])
    text = Outline(page([run])).text
    assert "200 of 300 clients of seed 0, at the selected rounds; worst under fedavg first." in text
    assert "client 199" in text
    assert "client 200" not in text


def test_different_versions_are_told_apart_by_run():
    runs = means_of({"a": [0.5, 0.6], "b": [0.5, 0.6]})
    runs[1] = flat_run("a", 1, [0.5, 0.7], versions={"fedmerge": "0.2"})
    text = Outline(page(runs)).text
    assert "a (seed 0) and b (seed 0, 1)" in text
    assert "fedmerge 0.2" in text


def test_the_same_runs_make_the_same_page():
    assert page(full_runs()) == page(full_runs())


def test_a_run_folder_becomes_a_file(tmp_path: Path):
    run = full_runs()[0]
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, run)
    for record in run.rounds:
        append_rounds(folder, (record,))
    target = write_report([read_run(folder)], tmp_path / "new" / "report.html")
    assert target.read_text(encoding="utf-8") == page([run])
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_a_folder_is_no_target(tmp_path: Path):
    with pytest.raises(UsageError, match=r"is a folder; give the file to write, for example .*report\.html"):
        write_report(full_runs(), tmp_path)


def test_a_refused_report_leaves_the_old_one_alone(tmp_path: Path):
    target = tmp_path / "report.html"
    target.write_text("old")
    with pytest.raises(UsageError):
        write_report([], target)
    assert target.read_text() == "old"
