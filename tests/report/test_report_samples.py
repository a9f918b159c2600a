"""What the clients' language models make of a few test prompts."""

from __future__ import annotations

import json

import pytest
from synthetic_runs import flat_run

from fedmerge.experiment.record import append_rounds, read_run, write_run
from fedmerge.report.page import TEXT, report_page
from fedmerge.report.samples import EMPTY, PROMPTS, samples_table
from fedmerge.report.study import studies


def sample(completion: str = "yes", **changes) -> dict[str, str]:
    values = {"client": "client 0", "task": "spam", "prompt": "Is it?", "completion": completion, "wanted": "yes"}
    return {**values, **changes}


def written(label="fedmerge", seed=0, *samples, **changes):
    return flat_run(label, seed, [0.5, 0.6], samples=samples, **changes)


def table(*runs):
    return samples_table(studies(runs)[0])


def test_runs_without_samples_have_no_table_and_no_chapter():
    for runs in ([flat_run("fedmerge", 0, [0.5])], [written()]):
        assert table(*runs) is None
        assert "What the models write" not in report_page(studies(runs))


def test_methods_answer_the_same_prompt_side_by_side():
    other = sample("no", prompt="And this?")
    found = table(written("fedmerge", 0, sample(), other), written("fedavg", 0, sample("perhaps")))
    assert [column.title for column in found.columns] == ["Client", "Task", "Prompt", "Wanted", "fedmerge", "fedavg"]
    assert found.texts() == (
        ("client 0", "spam", "Is it?", "yes", "yes", "perhaps"),
        ("client 0", "spam", "And this?", "yes", "no", "–"),
    )


def test_one_seed_is_shown_the_first_that_has_any():
    found = table(flat_run("fedmerge", 0, [0.5, 0.6]), written("fedmerge", 1, sample()), written("fedavg", 2, sample()))
    assert [column.title for column in found.columns][-1] == "fedmerge"
    assert found.caption == "What the models write, seed 1"


def test_a_task_that_nobody_named_has_no_column_and_an_empty_answer_is_called_so():
    found = table(written("fedmerge", 0, sample("", task="")))
    assert found.texts() == (("client 0", "Is it?", "yes", EMPTY),)


def test_a_sample_with_missing_parts_is_shown_as_far_as_it_goes():
    assert table(written("fedmerge", 0, {"prompt": "Is it?"})).texts() == (("", "Is it?", "", EMPTY),)


def test_a_long_list_says_what_it_leaves_out():
    found = table(written("fedmerge", 0, *(sample(prompt=f"Is it {n}?") for n in range(PROMPTS + 5))))
    assert len(found.rows) == PROMPTS
    assert found.notes[0].startswith(f"{PROMPTS} of {PROMPTS + 5} test prompts")


def test_a_long_text_is_cut_and_whole_for_a_pointer_that_rests_on_it():
    prompt = "A word " * 100 + "at the end"
    text = report_page(studies([written("fedmerge", 0, sample(prompt=prompt))]))
    assert f'title="{prompt}"' in text
    assert text.count(prompt) == 1
    assert f"{prompt[: TEXT // 2 - 1]}…" in text


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\x00\ud800</td>"])
def test_what_models_write_is_text_and_nothing_else(evil):
    found = written("fedmerge", 0, dict.fromkeys(sample(), evil))
    text = report_page(studies([found]))
    text.encode("utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("</td>") == text.count("<td")


def test_samples_are_kept_and_runs_written_without_them_are_read(tmp_path):
    run = written("fedmerge", 0, sample())
    write_run(tmp_path, run)
    for record in run.rounds:
        append_rounds(tmp_path, (record,))
    assert read_run(tmp_path) == run
    plain = json.loads((tmp_path / "run.json").read_text())
    del plain["samples"]
    (tmp_path / "run.json").write_text(json.dumps(plain))
    assert read_run(tmp_path).samples is None
