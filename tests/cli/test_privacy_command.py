"""``fedmerge privacy`` and ``fedmerge report --public``, and that no command prints a row of W."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmerge.cli import main
from fedmerge.experiment.record import read_run
from fedmerge.report import privacy
from small import WORDS

Captured = pytest.CaptureFixture[str]
FEDMERGE = "fedmerge:num_models=2,initial=independent"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("privacy") / "runs"
    assert main(["compare", FEDMERGE, "fedavg", "local", *WORDS, "--quiet", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def _wide_and_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "200")
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def rows_of(folder: Path) -> set[str]:
    """Every merging weight of every evaluated round as it could be written, but for 0, ½ and 1."""
    weights = {a for record in read_run(folder).rounds for row in record.mixing or () for a in row}
    telling = {a for a in weights if round(a, 2) not in (0.0, 0.5, 1.0)}
    return {form.format(a) for a in telling for form in ("{:.6f}", "{:.4f}", "{:.3f}", "{:.2f}")}


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d+", text))


def words_of(page: Path) -> str:
    """What a reader sees, and what pointers show: not where things are drawn."""
    body = page.read_text().partition("</style>")[2]
    return re.sub(r'(?<!title)="[^"]*"', "", body)


def test_crowds_are_printed_with_the_smallest_first(runs: Path, capsys: Captured) -> None:
    assert main(["privacy", str(runs / "fedmerge-seed0")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "fedmerge, seed 0, weights of round 2, the last evaluated one"
    assert lines[2].startswith("5 of 5 clients have a crowd below 5.")
    found = privacy(read_run(runs / "fedmerge-seed0"))
    shown = [line.split()[:2] for line in lines if line.strip().startswith("client-")]
    assert shown == [[found.run.client_names[i], f"{found.effective[i]:.2f}"] for i in found.order]


def test_numbers_are_given_as_json(runs: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["privacy", str(runs / "fedavg-seed0"), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["kind"] == "one model"
    assert [client["crowd"] for client in plain["clients"]] == pytest.approx([4] * 5)
    assert main(["privacy", str(runs / "fedavg-seed0"), "--json", "--out", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == plain
    assert mode(tmp_path / "a.json") == 0o600


def test_a_page_is_written_for_its_owner(runs: Path, tmp_path: Path, capsys: Captured) -> None:
    page = tmp_path / "privacy.html"
    assert main(["privacy", str(runs / "fedmerge-seed0"), "--out", str(page)]) == 0
    assert f"page    {page} (only its owner may read it)" in capsys.readouterr().out
    assert mode(page) == 0o600
    assert all(f"client-{i}" in page.read_text() for i in range(5))


def test_a_method_that_shares_nothing_says_so(runs: Path, capsys: Captured) -> None:
    assert main(["privacy", str(runs / "local-seed0")]) == 0
    assert "Method local shares nothing" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["missing/a.json", "."])
def test_a_place_that_cannot_be_written_is_refused(runs: Path, tmp_path: Path, capsys: Captured, out: str) -> None:
    assert main(["privacy", str(runs / "fedavg-seed0"), "--json", "--out", str(tmp_path / out)]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert main(["privacy", str(tmp_path)]) == 1
    assert "is not a run" in capsys.readouterr().err


def test_a_public_report_is_written_on_request(runs: Path, tmp_path: Path, capsys: Captured) -> None:
    pages = {flag: tmp_path / f"{len(flag)}.html" for flag in ((), ("--public",))}
    for flag, page in pages.items():
        assert main(["report", str(runs), "--out", str(page), *flag]) == 0
    private, public = pages.values()
    assert (mode(private), mode(public)) == (0o600, 0o666)
    assert "client-3" in private.read_text()
    assert "client-" not in public.read_text()
    told = rows_of(runs / "fedmerge-seed0")
    assert told
    assert not told & numbers(words_of(public))


@pytest.mark.parametrize("words", [["run", "fedmerge", "--num-models", "2"], ["compare", FEDMERGE, "local"]])
def test_nothing_that_is_printed_or_logged_has_a_row_of_weights(
    tmp_path: Path, capsys: Captured, caplog: pytest.LogCaptureFixture, words: list[str]
) -> None:
    out = tmp_path / "out"
    with caplog.at_level(logging.DEBUG, logger="fedmerge"):
        assert main([*words, *WORDS, "rounds=3", "evaluate_every=1", "--out", str(out)]) == 0
        assert main(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0
    captured = capsys.readouterr()
    folder = out if (out / "run.json").exists() else out / "fedmerge-seed0"
    told = {number for number in rows_of(folder) if len(number) > len("0.00")}  # p values have two decimals, too
    assert told
    assert not told & numbers(captured.out + captured.err + caplog.text)
