"""What is given back as written is on the disk; what was handed in is never left out of the middle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmerge.core.errors import FedmergeError
from fedmerge.experiment import book as module
from fedmerge.experiment.book import Book, digest_of_request, standing
from fedmerge.experiment.checkpoint import SLOTS, latest, tensor_bytes
from fedmerge.experiment.config import build_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import RoundRecord
from fedmerge.experiment.simulation import Progress, Setup, prepare, rounds
from small import small

ROUNDS = 6
Played = list[tuple[Progress, RoundRecord]]


def prepared(**changes: Any) -> tuple[Setup, Progress]:
    config = build_config(small("fedmerge", rounds=ROUNDS, **changes))
    data = load_data(config.source, config.partition, 0, config.model)
    return prepare(config.method, data, config.model, config.training, config.run)


@pytest.fixture(scope="module")
def run() -> tuple[Setup, Played]:
    setup, start = prepared()
    return setup, list(rounds(setup, start))


DATA = "d" * 64


class Gate:
    """Keeps the disk waiting until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.asked = threading.Event(), threading.Semaphore(0)
        append = module.append_rounds

        def slowly(*arguments: Any) -> bytes:
            self.asked.release()
            assert self.open.wait(60)
            return append(*arguments)

        monkeypatch.setattr(module, "append_rounds", slowly)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def note(book: Book, played: Played, number: int, selected: int | None = None) -> None:
    best = number if selected is None else selected
    book.note(played[number][1], played[number][0], (best, played[best][0]), float(number))


def numbers(lines: tuple[RoundRecord, ...]) -> list[int]:
    return [line.round for line in lines]


def lines_in(folder: Path) -> int:
    return (folder / "rounds.jsonl").read_bytes().count(b"\n")


def saved(folder: Path, run: tuple[Setup, Played]) -> Any:
    setup, played = run
    return latest(folder, played[0][0], request=digest_of_request(setup), data=DATA)[0]


def test_a_round_is_not_given_back_before_it_is_written(tmp_path: Path, run: tuple[Setup, Played], gate: Gate) -> None:
    setup, played = run
    book = Book(tmp_path, setup, DATA)
    note(book, played, 0)
    assert gate.asked.acquire(timeout=60)
    assert book.written() == ()
    gate.open.set()
    assert numbers(book.written(wait=True)) == [0]
    assert lines_in(tmp_path) == 1
    assert saved(tmp_path, run).manifest.round == 0
    assert book.written() == book.written(wait=True) == ()
    book.stop()


def test_rounds_that_wait_go_to_the_disk_together_but_not_with_round_0(
    tmp_path: Path, run: tuple[Setup, Played], gate: Gate
) -> None:
    setup, played = run
    book = Book(tmp_path, setup, DATA)
    note(book, played, 0)
    assert gate.asked.acquire(timeout=60)
    for number in (1, 2, 3):
        note(book, played, number)
    gate.open.set()
    assert numbers(book.written(wait=True)) == [0, 1, 2, 3]
    assert gate.asked.acquire(timeout=60)
    assert not gate.asked.acquire(blocking=False)  # the disk was asked twice
    found = saved(tmp_path, run)
    assert (found.manifest.round, found.manifest.seconds, found.manifest.lines) == (
        3,
        3.0,
        (tmp_path / "rounds.jsonl").stat().st_size,
    )
    assert tensor_bytes(found.last) == tensor_bytes(played[3][0])
    book.stop()


def test_the_run_waits_for_a_disk_that_is_far_behind(
    tmp_path: Path, run: tuple[Setup, Played], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, played = run
    monkeypatch.setattr(module, "_MOST_BEHIND", 2)
    book, told = Book(tmp_path, setup, DATA), []

    def play() -> None:
        for number in range(5):
            note(book, played, number)
            told.append(number)

    thread = threading.Thread(target=play)
    thread.start()
    assert gate.asked.acquire(timeout=60)
    thread.join(0.3)
    assert told == [0, 1, 2]  # one is being written, two wait
    gate.open.set()
    thread.join(60)
    assert numbers(book.written(wait=True)) == [0, 1, 2, 3, 4]
    book.stop()


def test_stopping_writes_what_waits_and_a_checkpoint_of_it(tmp_path: Path, run: tuple[Setup, Played]) -> None:
    _, played = run
    setup, _ = prepared(checkpoint_every=4)
    book = Book(tmp_path, setup, DATA)
    for number in (0, 1, 2):
        note(book, played, number, selected=0)
    book.stop()
    assert lines_in(tmp_path) == 3
    found = saved(tmp_path, run)
    assert (found.manifest.round, found.manifest.selected) == (2, 0)
    assert tensor_bytes(found.selected) == tensor_bytes(played[0][0])


def test_a_book_that_was_given_nothing_leaves_nothing(tmp_path: Path, run: tuple[Setup, Played]) -> None:
    Book(tmp_path, run[0], DATA).stop()
    Book(tmp_path, run[0], DATA).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 2, 4, 6]), (3, [0, 3, 6]), (0, [])]
)
def test_checkpoints_come_as_often_as_asked(
    tmp_path: Path, run: tuple[Setup, Played], every: int, expected: list[int]
) -> None:
    _, played = run
    setup, _ = prepared(checkpoint_every=every)
    book, seen = Book(tmp_path, setup, DATA), []
    for number in range(ROUNDS + 1):
        note(book, played, number)
        assert numbers(book.written(wait=True)) == [number]
        found = saved(tmp_path, run)
        if found is not None and found.manifest.round == number:
            seen.append(number)
            assert not seen[1:] or (tmp_path / SLOTS[1 - found.slot]).exists()
    assert seen == expected
    book.close()
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.jsonl"]


def test_states_go_as_soon_as_no_slot_refers_to_them(tmp_path: Path, run: tuple[Setup, Played]) -> None:
    setup, played = run
    book, seen = Book(tmp_path, setup, DATA), []
    for number, selected in enumerate([0, 1, 1, 3, 3, 3]):
        note(book, played, number, selected)
        book.written(wait=True)
        seen.append(sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-best-*")))
    assert seen == [[0], [0, 1], [1], [1, 3], [3], [3]]
    book.stop()


def test_a_book_goes_on_where_a_checkpoint_was_made(tmp_path: Path, run: tuple[Setup, Played]) -> None:
    setup, played = run
    book = Book(tmp_path, setup, DATA)
    for number in (0, 1, 2):
        note(book, played, number, selected=min(number, 1))
        book.written(wait=True)
    book.stop()
    with (tmp_path / "rounds.jsonl").open("ab") as file:
        file.write(b"torn")
    stand = standing(tmp_path, setup, played[0][0], DATA)
    assert stand.found is not None
    assert numbers(stand.lines) == [0, 1, 2]
    kept = (tmp_path / SLOTS[stand.found.slot]).read_bytes()
    again = Book(tmp_path, setup, DATA, stand.found)
    assert lines_in(tmp_path) == 3
    assert (tmp_path / "rounds.jsonl").read_bytes().endswith(b"}\n")
    note(again, played, 3, selected=1)
    assert numbers(again.written(wait=True)) == [3]
    assert (tmp_path / SLOTS[stand.found.slot]).read_bytes() == kept  # the newer of the two stays
    found = saved(tmp_path, run)
    assert (found.manifest.round, found.slot) == (3, 1 - stand.found.slot)
    assert tensor_bytes(found.selected) == tensor_bytes(played[1][0])
    again.stop()


def test_a_book_that_goes_on_writes_no_checkpoint_twice(tmp_path: Path, run: tuple[Setup, Played]) -> None:
    setup, played = run
    book = Book(tmp_path, setup, DATA)
    note(book, played, 0)
    book.stop()
    found = saved(tmp_path, run)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name in SLOTS}
    Book(tmp_path, setup, DATA, found).stop()
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name in SLOTS} == before


def test_a_disk_that_fails_is_told_to_every_caller_and_nothing_is_given_back(
    tmp_path: Path, run: tuple[Setup, Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, played = run
    book = Book(tmp_path, setup, DATA)
    note(book, played, 0)
    assert numbers(book.written(wait=True)) == [0]

    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "append_rounds", full)
    note(book, played, 1)
    with pytest.raises(OSError, match="No space left"):
        book.written(wait=True)
    with pytest.raises(OSError, match="No space left"):
        book.written()
    with pytest.raises(OSError, match="No space left"):
        note(book, played, 2)
    with pytest.raises(OSError, match="No space left"):
        book.stop()
    assert lines_in(tmp_path) == 1
    assert saved(tmp_path, run).manifest.round == 0


def test_whoever_waits_hears_of_a_failure(
    tmp_path: Path, run: tuple[Setup, Played], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, played = run
    monkeypatch.setattr(module, "_MOST_BEHIND", 1)
    book = Book(tmp_path, setup, DATA)
    note(book, played, 0)
    assert gate.asked.acquire(timeout=60)
    note(book, played, 1)
    told: list[BaseException] = []

    def play() -> None:
        try:
            note(book, played, 2)
        except OSError as error:
            told.append(error)

    thread = threading.Thread(target=play)
    thread.start()
    (tmp_path / "rounds.jsonl").mkdir()  # it cannot be written
    gate.open.set()
    thread.join(60)
    assert not thread.is_alive()
    assert [type(error) for error in told] == [IsADirectoryError]
    with pytest.raises(IsADirectoryError):
        book.stop()


def test_checkpoints_that_cannot_be_removed_do_not_fail_a_finished_run(
    tmp_path: Path, run: tuple[Setup, Played], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    setup, played = run
    book = Book(tmp_path, setup, DATA)
    note(book, played, 0)
    book.written(wait=True)

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.unlink", broken)
        book.close()
    assert "cannot remove the checkpoints of a finished run" in caplog.text


def test_no_thread_outlives_its_book(tmp_path: Path, run: tuple[Setup, Played]) -> None:
    before = threading.active_count()
    Book(tmp_path, run[0], DATA).stop()
    Book(tmp_path, run[0], DATA).close()
    assert threading.active_count() == before


CHANGES: dict[str, dict[str, Any]] = {
    "method": {"method": "fedavg"},
    "its options": {"method": {"name": "fedmerge", "num_models": 3}},
    "training": {"training": {"epochs": 2}},
    "rounds": {"rounds": 7},
    "seed": {"seed": 1},
    "network": {"model": {"name": "mlp", "hidden": [9]}},
    "engine": {"runtime": "sequential"},
    "precision": {"precision": "float64"},
    "trace": {"participation": {"availability": "diurnal"}},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_another_request_has_another_digest(run: tuple[Setup, Played], changes: dict[str, Any]) -> None:
    table = {**small("fedmerge", rounds=ROUNDS), **changes}
    config = build_config(table)
    data = load_data(config.source, config.partition, config.run.seed, config.model)
    other, _ = prepare(config.method, data, config.model, config.training, config.run)
    assert digest_of_request(other) != digest_of_request(run[0])


def test_the_same_request_has_the_same_digest_however_often_it_is_saved(run: tuple[Setup, Played]) -> None:
    assert digest_of_request(prepared()[0]) == digest_of_request(run[0])
    assert digest_of_request(prepared(checkpoint_every=5)[0]) == digest_of_request(run[0])


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_that_wrote_no_round_stands_at_its_beginning(
    tmp_path: Path, run: tuple[Setup, Played], every: int, caplog: pytest.LogCaptureFixture
) -> None:
    setup, start = prepared(checkpoint_every=every)
    stand = standing(tmp_path, setup, start, DATA)
    assert (stand.found, stand.lines) == (None, ())
    assert caplog.messages == [f"no round of {tmp_path} was finished: it begins anew"]
    assert list(tmp_path.iterdir()) == []


def test_every_checkpoint_that_cannot_be_used_is_told(
    tmp_path: Path, run: tuple[Setup, Played], caplog: pytest.LogCaptureFixture
) -> None:
    setup, played = run
    book = Book(tmp_path, setup, DATA)
    for number in (0, 1):
        note(book, played, number)
        book.written(wait=True)
    book.stop()
    newest = saved(tmp_path, run)
    (tmp_path / SLOTS[newest.slot]).write_bytes(b"")
    stand = standing(tmp_path, setup, played[0][0], DATA)
    assert stand.found is not None
    empty = "it does not begin with 'fedmerge checkpoint 1'"
    first = f"{tmp_path / SLOTS[newest.slot]}: {empty}"
    assert caplog.messages == [f"a checkpoint cannot be used: {first}", "going on from the other one, after round 0"]
    (tmp_path / SLOTS[stand.found.slot]).write_bytes(b"")
    with pytest.raises(FedmergeError) as caught:
        standing(tmp_path, setup, played[0][0], DATA)
    assert str(caught.value).splitlines() == [
        "no checkpoint of this run can be used, make it again:",
        *(f"{tmp_path / slot}: {empty}" for slot in SLOTS),
    ]
