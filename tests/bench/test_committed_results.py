"""The committed results of the benchmarks are whole, belong to the suites of today, and give the committed pages."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from fedmerge.bench.known import Known
from fedmerge.bench.page import CSV, PAGE, write_page
from fedmerge.bench.plan import Planner
from fedmerge.bench.result import Result
from fedmerge.bench.store import read_results
from fedmerge.bench.suite import Suite
from fedmerge.bench.suite_file import read_suite, suite_path

pytestmark = pytest.mark.no_cover  # thousands of results through a few lines, which other tests cover
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module", params=["full", "lora"])
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def suite(name: str) -> Suite:
    return read_suite(name)


@cache
def results_of(name: str) -> tuple[Result, ...]:
    return read_results(RESULTS / name)


def test_they_were_asked_for_by_the_suite_of_today(name: str) -> None:
    assert (RESULTS / name / "suite.toml").read_text(encoding="utf-8") == suite_path(name).read_text(encoding="utf-8")


def test_no_run_is_missing(name: str, suite: Suite) -> None:
    left = Planner(suite).left(Known(results_of(name)).find)
    assert {setting: count for setting, count in left.items() if count} == {}


def test_tuning_runs_hold_no_test_scores(name: str) -> None:
    assert not [
        result.label for result in results_of(name) if result.stage == "tuning" and (result.test or result.last_test)
    ]


def test_the_page_is_made_from_them(name: str, suite: Suite, tmp_path: Path) -> None:
    write_page(suite, results_of(name), tmp_path)
    for file in (PAGE, CSV):
        assert (tmp_path / file).read_text(encoding="utf-8") == (RESULTS / name / file).read_text(encoding="utf-8")
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {path.name for path in (RESULTS / name / "figures").iterdir()}


def test_every_method_saw_the_same_data(name: str) -> None:
    """Turning images by odd angles interpolates, so that another processor may give other last bits: made on one."""
    seen: dict[tuple[str, int], set[str]] = {}
    for result in results_of(name):
        if result.status == "finished":
            seen.setdefault((result.setting, result.seed), set()).add(result.data_sha256)
    assert [place for place, hashes in seen.items() if len(hashes) > 1] == []
