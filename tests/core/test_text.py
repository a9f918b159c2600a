"""Foreign texts in messages: nothing that a terminal would obey, nothing without end, and the name that was meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.core.errors import FedmergeError, together, unknown_name
from fedmerge.core.nearest import nearest
from fedmerge.core.text import brief, is_visible, printable, shortened

OBEYED = ["\x1b[2J", "\x07", "\x9b31m", "\r", "\n", "\x00", "\u202e", "\u2066", "\u200f", "\u2028", "\ud800", "\x7f"]
SEEN = ["fedmerge", "café", "北京", "Très\u00a0bien", "👩\u200d👩\u200d👧", "می\u200cخواهم", "a\\nb", ""]


@pytest.mark.parametrize("letters", OBEYED)
def test_what_a_terminal_obeys_is_written_as_its_escape(letters: str) -> None:
    shown = printable(f"a{letters}b")
    assert all(map(is_visible, shown))
    assert shown.startswith("a\\")


@pytest.mark.parametrize("text", SEEN)
def test_what_can_only_be_seen_stays(text: str) -> None:
    assert printable(text) == text


@given(st.text())
def test_escaping_twice_changes_nothing_more(text: str) -> None:
    assert printable(printable(text)) == printable(text)
    assert all(map(is_visible, printable(text)))


@pytest.mark.parametrize("letters", OBEYED)
def test_no_error_message_carries_them_however_it_was_made(letters: str) -> None:
    message = str(FedmergeError(f"first{letters}line\nsecond line"))
    assert message.count("\n") == 1 + (letters == "\n")
    assert all(is_visible(letter) or letter == "\n" for letter in message)


@given(st.recursive(st.text() | st.integers() | st.floats(), st.lists), st.integers(5, 50))
def test_a_value_in_a_message_is_short(value: object, most: int) -> None:
    assert len(brief(value, most)) <= most


def test_values_that_cannot_be_written_are_named_by_type() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert brief(10**5000) == "a int too large to show"
    assert brief(deep) == "a list too large to show"
    while deep:
        deep = deep.pop()  # type: ignore[assignment]


def test_a_name_in_a_message_is_one_short_line() -> None:
    assert shortened("a\nb") == "a\\nb"
    assert len(shortened("x" * 10_000)) == 200


# ------------------------------------------------------------------------------------------------ the nearest name

NAMES = ["fedavg", "fedavg-ft", "fedavgm", "fedmerge", "lr", "num_models", "rounds", "seed"]


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("fedmrge", "fedmerge"),
        ("fedmergee", "fedmerge"),
        ("fedmurge", "fedmerge"),
        ("fedmegre", "fedmerge"),
        ("rl", "lr"),
        ("l", "lr"),
        ("LR", "lr"),
        ("num-models", "num_models"),
        ("models", "num_models"),
        ("sed", "seed"),
        ("fedavg_tf", "fedavg-ft"),
    ],
)
def test_the_name_that_was_meant_is_suggested(slip: str, meant: str) -> None:
    assert nearest(slip, NAMES) == meant


@pytest.mark.parametrize("word", ["", "x", "qwerty", "x" * 100_000])
def test_nothing_is_suggested_for_what_is_like_nothing(word: str) -> None:
    assert nearest(word, NAMES) is None


def test_one_letter_is_not_mistaken_for_another() -> None:
    assert nearest("x", ["a", "d"]) is None


def test_a_file_with_a_hundred_thousand_columns_gives_a_short_message() -> None:
    message = unknown_name("column", "labl", [f"column-{number}\x1b[2J" for number in range(100_000)])
    assert "\x1b" not in message
    assert message.endswith(" and 99800 more")
    assert len(message) < 10_000


def test_a_thousand_faults_are_counted_and_not_all_told() -> None:
    message = together([f"key-{number}: missing" for number in range(1000)])
    assert message.splitlines()[-2:] == ["key-24: missing", "and 975 more like these"]
    assert together(["one"]) == "one"
