"""The page says what the results say, whatever there is of them."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from small_suite import filled, made_up, suite, table

from fedmerge.bench.page import ranking, write_page
from fedmerge.bench.plan import Run
from fedmerge.bench.result import Result, Ticket, diverged
from fedmerge.bench.sheet import sheets
from fedmerge.bench.tables import rate_text
from fedmerge.bench.tuning import Trial, Tuning
from fedmerge.core.errors import FedmergeError
from fedmerge.experiment.config import build_config

LEVEL = {"fedavg": 0.5, "local": 0.3, "oracle": 0.7, "ifca": 0.8}


def steady(run: Run) -> Result:
    """Differences to FedAvg that hardly change from seed to seed; IFCA sends three times as much."""
    level = LEVEL[run.label] + 0.01 * run.seed * (run.seed < 10) + 0.001 * (run.seed == 1 and run.label == "ifca")
    sent = {"ifca": 500.0, "local": 0.0}.get(run.label, 100.0)
    return made_up(run, [level, level + 0.1, level - 0.1, level], bytes_down=sent, recovery=1.0)


def page_of(folder: Path, results: list[Result], **changes: object) -> str:
    return write_page(suite(**changes), results, folder).read_text()


def row(page: str, method: str, table: int = 0) -> list[str]:
    """The cells of a method in the so-many-eth table of methods with thirteen columns or so."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {method} |") and " of 0." in line]
    return [cell.strip() for cell in lines[table].strip("|").split("|")]


def test_a_full_store_gives_tables_goals_ranks_and_figures(tmp_path: Path) -> None:
    page = page_of(tmp_path, filled(suite(), steady))
    assert "All 21 reported runs are here." in page  # (4 + 3) methods and 3 seeds
    assert "1 of 1 met." in page
    # IFCA − FedAvg: 30.0, 30.1, 30.0 points; t(2) = 4.3027 times .05774 / sqrt(3)
    assert "+30.03 ± 0.14 | 3 | ≥ +1 | met" in page
    assert row(page, "fedavg")[:3] == ["fedavg", "3", "51.0 ± 2.5"]  # 50, 51, 52: 4.3027 / sqrt(3)
    assert row(page, "ifca")[9:11] == ["1.00", "600 B (× 3)"]
    assert "Send more than fedavg: ifca." in page
    assert "worse than ifca by 30.0 (p < 0.001) and oracle (a control) by 20.0" in page
    for name in ("ranks", "accuracy-turned", "traffic-turned", "accuracy-alike", "traffic-alike"):
        ElementTree.parse(tmp_path / "figures" / f"{name}.svg")  # noqa: S314 - our own
        assert f"figures/{name}.svg" in page


def test_controls_are_neither_ranked_nor_counted(tmp_path: Path) -> None:
    page = page_of(tmp_path, filled(suite(), steady))
    ranks = ranking(suite(), sheets(suite(), filled(suite(), steady)))
    assert ranks is not None
    assert ranks[0].labels == ("ifca", "fedavg")
    assert "Of 2 comparisons of fedavg" in page


@pytest.mark.parametrize("limit", [0, 1, 9, 12, 14, 20])
def test_every_partial_store_gives_a_page(tmp_path: Path, limit: int) -> None:
    page = page_of(tmp_path, filled(suite(), steady, limit))
    assert "**Incomplete:**" in page
    pictures = re.findall(r"\]\((figures/\S+)\)", page)
    assert {f"figures/{path.name}" for path in (tmp_path / "figures").iterdir()} == set(pictures)
    assert (tmp_path / "results.csv").exists()


def test_one_seed_gives_intervals_over_clients_and_no_test(tmp_path: Path) -> None:
    only = [result for result in filled(suite(), steady) if result.seed in (0, 1000)]
    page = page_of(tmp_path, only)
    assert "too few seeds for a test" in page
    assert "†" in row(page, "local")[7]


def test_figures_of_an_earlier_page_do_not_stay(tmp_path: Path) -> None:
    page_of(tmp_path, filled(suite(), steady))
    page_of(tmp_path, [])
    assert list((tmp_path / "figures").iterdir()) == []


def test_a_diverged_run_is_listed_and_counts_nothing_in_ranks(tmp_path: Path) -> None:
    def make(run: Run) -> Result:
        if (run.label, run.seed, run.setting) == ("ifca", 1, "turned"):
            ticket = Ticket(run.key, run.request, run.setting, run.label, run.seed, run.stage)
            return diverged(ticket, build_config(run.table), FedmergeError("it diverged"), "ifca", 1.0)
        return steady(run)

    results = filled(suite(), make)
    page = page_of(tmp_path, results)
    assert row(page, "ifca")[1] == "2 (1 diverged)"
    assert "ifca diverged on seeds 1: it diverged" in page
    assert "ifca and fedavg are paired on seeds 0, 2 only." in page
    turned = sheets(suite(), results)[0]
    assert turned.ranked_score("ifca") == pytest.approx((0.8 + 0.0 + 0.82) / 3)


def test_methods_that_saw_different_data_are_called_out(tmp_path: Path) -> None:
    def make(run: Run) -> Result:
        return made_up(run, [0.5], data_sha256=run.label if run.seed == 2 else "same")

    assert "Seeds 2: methods saw different data" in page_of(tmp_path, filled(suite(), make))


def test_results_are_found_after_defaults_changed(tmp_path: Path) -> None:
    results = [Result(**{**vars(result), "key": "of an older version"}) for result in filled(suite(), steady)]
    assert "All 21 reported runs are here." in page_of(tmp_path, results)


@pytest.mark.parametrize(("now", "told"), [({"d": 1, "new": 0}, False), ({"d": 2}, True)])
def test_seeds_with_other_values_are_told_but_not_new_options(tmp_path: Path, now: dict[str, int], told: bool) -> None:
    def make(run: Run) -> Result:
        return made_up(run, [0.5], options=now if run.seed == 2 else {"d": 1})

    assert (
        "Seeds with different options, because defaults changed" in page_of(tmp_path, filled(suite(), make))
    ) == told


def test_a_new_method_in_the_suite_leaves_the_old_results_where_they_are(tmp_path: Path) -> None:
    more = {**table()["methods"], "fedprox": {"name": "fedprox"}}
    page = page_of(tmp_path, filled(suite(), steady), methods=more)
    assert "21 of 27 reported runs are here." in page
    assert "| fedprox | 0 |" in page


def test_the_csv_has_a_row_for_every_reported_run(tmp_path: Path) -> None:
    page_of(tmp_path, filled(suite(), steady))
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(rows) == 21
    found = next(r for r in rows if (r["setting"], r["label"], r["seed"]) == ("turned", "ifca", "2"))
    assert float(found["mean"]) == pytest.approx(np.mean([0.82, 0.92, 0.72, 0.82]))
    assert float(found["worst_tenth"]) == pytest.approx(0.72)
    assert float(found["below_local"]) == 0.0
    assert found["lr"] in found["lr_tried"].split()


def test_a_rate_at_the_edge_is_marked() -> None:
    scores = {Trial(0.1): 0.5, Trial(0.3): 0.6, Trial(1.0): 0.4}
    assert rate_text(Tuning(scores, (), Trial(0.3))) == "0.3 of 0.1, 0.3, 1"
    assert rate_text(Tuning(scores, (), Trial(1.0, (("a", 2),)))) == "1, a = 2 of 0.1, 0.3, 1 (edge)"
    assert rate_text(Tuning(scores, (Trial(3.0),), None)) == "tuning: 3 runs so far"


def test_the_page_says_who_is_told_and_what_else_was_tuned(tmp_path: Path) -> None:
    methods = {**table()["methods"], "fedprox": {"name": "fedprox", "options_grid": {"proximal": [0.1]}, "lr": [1.0]}}
    page = page_of(tmp_path, [], methods=methods)
    assert "Told the number of models (the number of groups, or the number in the table): ifca." in page
    assert "fedprox (proximal in [0.1])" in page
    assert "Grids begin with 0.1, 0.3 (fedprox with 1) and grow by up to 1 rung" in page
