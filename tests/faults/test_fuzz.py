"""A few thousand spoiled inputs: nothing but our own errors leaves a reader.

`benchmarks/faults/fuzz.py` tries a million.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "faults"))

import fuzz
import mutations
import targets
import typos

from fedmerge.core.errors import FedmergeError
from fedmerge.core.randomness import generator

pytestmark = pytest.mark.no_cover  # thousands of cases through a few lines, which other tests cover
CASES = 150
"""For each reader; a block of the long run, so that a failure here is one there."""
LEAST_RIGHT = 0.95
"""Of slips of one letter, the share that must be answered with the name that was meant."""
TARGETS = targets.all_targets()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nothing_but_our_own_errors_leaves_a_reader(target: targets.Target) -> None:
    tally = fuzz.fuzz(target, CASES, seed=1)
    assert tally.escaped == {}
    assert tally.unsafe == 0
    assert tally.cases == tally.refused + tally.accepted == CASES
    assert tally.refused > CASES // 10


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_examples_themselves_are_accepted(target: targets.Target) -> None:
    """Otherwise their changes would be refused for a reason of their own."""
    for example in target.examples:
        target.read((example, []) if "words" in target.name else _as_read(target, example))


def _as_read(target: targets.Target, example: object) -> object:
    return targets.tomli_w.dumps(example).encode() if "TOML" in target.name else example


def test_a_changed_value_or_key_is_told_by_its_name() -> None:
    (tables,) = [target for target in TARGETS if target.names_keys]
    tally = fuzz.fuzz(tables, 500, seed=1)
    assert tally.named > LEAST_RIGHT * tally.changes > 0


def test_an_error_of_another_kind_is_seen() -> None:
    """The harness itself can fail a reader."""

    def careless(content: bytes) -> int:
        return content.index(b"l") + 1 // (len(content) % 3)

    tally = fuzz.fuzz(targets.Target("careless", (b"hello",), mutations.changed_bytes, careless), 300, seed=1)
    kinds = {text.split(":")[0] for text in tally.escaped}
    assert kinds == {"ValueError", "ZeroDivisionError"}


def test_a_message_that_a_terminal_would_obey_is_seen() -> None:
    class RawError(FedmergeError):
        def __str__(self) -> str:
            return "\x1b[2J"

    def raw(content: bytes) -> None:
        raise RawError(content)

    tally = fuzz.fuzz(targets.Target("raw", (b"x",), mutations.changed_bytes, raw), 5, seed=1)
    assert (tally.refused, tally.unsafe) == (5, 5)


def test_the_same_seed_gives_the_same_cases() -> None:
    def case(seed: int) -> bytes:
        return mutations.changed_bytes(generator(seed, "fuzz"), b"some content that is long enough" * 10)

    assert case(3) == case(3)
    assert len({case(seed) for seed in range(20)}) > 15


@pytest.mark.parametrize("kind", ["commands", "methods", "sources", "partitions", "networks", "training options"])
def test_slips_of_one_letter_are_answered_with_the_right_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth slip; the long run takes them all."""
    all_slips = typos.slips_of
    monkeypatch.setattr(typos, "slips_of", lambda name: set(sorted(all_slips(name))[::5]))
    found = typos.answers(typos.kinds_of_names()[kind])
    assert found.right >= LEAST_RIGHT * found.slips
