"""JSON from elsewhere has one meaning or none."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.core.strict_json import MOST_DEPTH, parse_json, parse_json_table, read_bounded

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(plain)
def test_what_json_writes_is_read_alike(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
        ('{"x": {"\\u001b": 1, "\\u001b": 3}}', r"the key '\\x1b' stands twice"),
        ("NaN", "got NaN"),
        ("[-Infinity]", "got -Infinity"),
        (str(2**64), "got 18446744073709551616, which no 64 bits can hold"),
        (str(-(2**63) - 1), "which no 64 bits can hold"),
        (f'{{"a": [1{"0" * 400}]}}', "which no 64 bits can hold"),
        ("[1e999]", "got 1e999, which is beyond any number"),
        ("[" * 100_000, "nested more than 32 deep"),
        ("9" * 5000, "Exceeds the limit"),
        ("", "Expecting value"),
        (r'["\ud800"]', "surrogates not allowed"),
        (r'{"\udfff": 1}', "surrogates not allowed"),
        (b"\xff", "can't decode byte"),
        (b"\xff\xfe{\x00}\x00", "can't decode byte"),
    ],
)
def test_what_has_no_meaning_or_two_is_refused(text: str | bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_json(text)


@pytest.mark.parametrize("kind", ["[{}]", '{{"a": {}}}'])
def test_the_depth_is_bounded_exactly(kind: str) -> None:
    def nested(depth: int) -> str:
        text = "0"
        for _ in range(depth):
            text = kind.format(text)
        return text

    parse_json(nested(MOST_DEPTH + 1))
    with pytest.raises(ValueError, match="nested more than"):
        parse_json(nested(MOST_DEPTH + 2))


@pytest.mark.parametrize("text", ["[]", "5", "null", '"{}"'])
def test_a_table_is_an_object(text: str) -> None:
    with pytest.raises(ValueError, match="expected a JSON object"):
        parse_json_table(text)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(10**12)  # a sparse file
    with pytest.raises(ValueError, match="it has 1,000,000,000,000 bytes; expected 10 at most"):
        read_bounded(path, 10)
    path.write_bytes(b"x" * 10)
    assert read_bounded(path, 10) == b"x" * 10


def test_a_pipe_is_read_to_its_end_and_a_stream_without_one_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"rounds = 1",))
    writer.start()
    assert read_bounded(tmp_path / "pipe", 100) == b"rounds = 1"
    writer.join()
    with pytest.raises(ValueError, match="expected 100 at most"):
        read_bounded(Path("/dev/zero"), 100)
