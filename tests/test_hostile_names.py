"""Names that somebody else has chosen are shown harmlessly and lead nowhere; sizes are refused before they are made."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

import fedmerge
from fedmerge.cli import main
from fedmerge.core.errors import DataError, FedmergeError
from fedmerge.core.text import is_visible
from fedmerge.data import from_arrays, from_folder
from fedmerge.report.markup import escape
from small import WORDS

Captured = pytest.CaptureFixture[str]
HOSTILE = "\x1b[2J\x1b]0;owned\x07evil\u202egnp.\r"
ROWS = np.arange(48.0).reshape(12, 4)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def harmless(text: str) -> bool:
    return all(is_visible(letter) or letter == "\n" for letter in text)


def client(name: str, *, labels: list[str]) -> None:
    """A CSV file whose labels are quoted, so that anything can stand in them."""
    Path("clients").mkdir(exist_ok=True)
    rows = [f'{number},{number % 3},"{label}"' for number, label in enumerate(labels)]
    Path(f"clients/{name}.csv").write_text("\n".join(["a,b,label", *rows]) + "\n", encoding="utf-8", newline="")


def test_class_names_reach_terminal_and_pages_harmlessly(capsys: Captured) -> None:
    for name in ("a", "b"):
        client(name, labels=[HOSTILE + "x", "fine"] * 6)
    words = ["run", "fedavg", "source=folder", "source.path=clients", "model.hidden=[4]", "rounds=1", "--out", "run"]
    assert main(words) == 0
    assert main(["report", "run", "--markdown", "table.md", "--csv", "table.csv", "--runs-csv", "runs.csv"]) == 0
    assert main(["export", "run", "a", "--out", "export"]) == 0
    printed = capsys.readouterr()
    assert harmless(printed.out + printed.err)
    assert json.loads(Path("run/run.json").read_text())["class_names"] == [HOSTILE + "x", "fine"]
    for page in ("report.html", "run/report.html", "table.md", "run/partition.svg"):
        content = Path(page).read_text(encoding="utf-8")
        assert not set("\x1b\x07\u202e") & set(content), page


@pytest.mark.parametrize("name", ["../../escape", "/etc/escape", "a\nb", HOSTILE, "a\x00b"])
def test_client_names_lead_nowhere(name: str, tmp_path: Path) -> None:
    """Names with control characters are refused; others are names only and never become paths."""
    arrays = {name: (ROWS, [0, 1] * 6), "other": (ROWS + 1, [0, 1] * 6)}
    if not name.isprintable():
        with pytest.raises(DataError, match="expected a name of printable characters") as caught:
            from_arrays(arrays)
        assert harmless(str(caught.value))
        return
    run = fedmerge.run(from_arrays(arrays), method="fedavg", rounds=1, model={"name": "mlp", "hidden": [4]}, out="run")
    fedmerge.export(run, name, "export")
    assert {path.parts[0] for path in Path().rglob("*")} == {"run", "export"}
    assert not list(tmp_path.parent.glob("escape*"))


def test_the_names_of_files_that_are_not_read_are_logged_harmlessly(caplog: pytest.LogCaptureFixture) -> None:
    client("a", labels=["x", "y"] * 6)
    Path(f"clients/{HOSTILE}").write_text("")
    with caplog.at_level(logging.WARNING):
        from_folder("clients")
    (message,) = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert "evil" in message
    assert harmless(message)


def test_columns_and_labels_are_named_harmlessly() -> None:
    Path("clients").mkdir()
    Path("clients/a.csv").write_text(f'"{HOSTILE}",b,label\n1,2,x\n', encoding="utf-8", newline="")
    with pytest.raises(FedmergeError) as caught:
        from_folder("clients", label_column="labl")
    assert harmless(str(caught.value))
    Path("clients/a.csv").write_text(f'"{HOSTILE}",b,label\n{HOSTILE.strip()},2,x\n', encoding="utf-8", newline="")
    with pytest.raises(FedmergeError) as caught:
        from_folder("clients")
    assert harmless(str(caught.value))


def test_a_hostile_run_record_is_shown_harmlessly(capsys: Captured) -> None:
    """Whatever stands in a saved run's texts."""
    assert main(["run", "fedmerge", *WORDS, "--out", "run", "--quiet"]) == 0
    plain = json.loads(Path("run/run.json").read_text())
    plain.update(label=HOSTILE, setting=HOSTILE, method=HOSTILE)
    plain["client_names"] = [f"{HOSTILE}{number}" for number in range(len(plain["client_names"]))]
    plain["class_names"] = [f"../{HOSTILE}{number}" for number in range(len(plain["class_names"]))]
    Path("run/run.json").write_text(json.dumps(plain))
    capsys.readouterr()
    for words in (["report", "run"], ["explain", "run", "--all-clients"], ["privacy", "run"], ["explain", "run", "x"]):
        main(words)
        printed = capsys.readouterr()
        assert printed.out + printed.err
        assert harmless(printed.out + printed.err), words
    assert not set("\x1b\x07\u202e") & set(Path("report.html").read_text(encoding="utf-8"))


def test_pages_hold_no_marks_that_turn_the_direction_of_writing() -> None:
    assert escape("a\u202eb\x1bc") == "a\ufffdb\ufffdc"
    assert escape("👩\u200d👧 می\u200cخواهم") == "👩\u200d👧 می\u200cخواهم"


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("clients", [10**6, 10**12, 2**63 - 1])
def test_a_crowd_that_no_pool_can_serve_is_refused_at_once(clients: int, capsys: Captured) -> None:
    assert main(["run", "fedavg", *WORDS, f"partition.clients={clients}"]) == 1
    told = capsys.readouterr().err
    assert f"partition.clients: got {clients} for digits, which has 1797 items" in told
    assert "take fewer clients" in told


def test_a_network_that_no_memory_can_hold_is_refused(capsys: Captured) -> None:
    words = [word for word in WORDS if not word.startswith("model.")]
    assert main(["run", "fedavg", *words, "model.hidden=[1000000000000]"]) == 2
    assert "model Mlp could not be made" in capsys.readouterr().err
