"""Options say what is wrong with them, all of it at once, and convert only what loses nothing."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.core.errors import UsageError
from fedmerge.core.options import accepted_text, build_options, check_options, option, option_fields, range_text


@dataclass(frozen=True)
class Inner:
    """A table inside a table."""

    depth: int = 1


@dataclass(frozen=True)
class Example:
    """One field of every kind."""

    rate: float = option(0.1, above=0, at_most=1, help="a rate")
    steps: int | None = option(None, at_least=1)
    widths: tuple[int, ...] = option((4,), at_least=1, below=100)
    kind: Literal["a", "b", 3] = option("a")
    name: str = option("x")
    loud: bool = option(False)
    extra: dict[str, Any] | None = option(None)
    inner: Inner = option(Inner())
    anything: Any = option(None)

    def __post_init__(self):
        check_options(self)
        if self.name == self.kind:
            raise UsageError("Example.name: must not be the kind\nExample.kind: must not be the name")


@dataclass(frozen=True)
class Needy:
    """A field without a default."""

    path: str = option(help="where")
    size: int = option(at_least=2)

    def __post_init__(self):
        check_options(self)


WRONG = [
    ({"rate": float("nan")}, "rate: got nan; expected a number > 0 and <= 1"),
    ({"rate": float("inf")}, "rate: got inf; expected a number > 0 and <= 1"),
    ({"rate": 0}, "rate: got 0; expected a number > 0 and <= 1"),
    ({"rate": 1.5}, "rate: got 1.5; expected"),
    ({"rate": True}, "rate: got True; expected a number"),
    ({"rate": "0.1"}, "rate: got '0.1'; expected a number"),
    ({"rate": None}, "rate: got None; expected a number"),
    ({"rate": 10**400}, "; expected a number > 0 and <= 1"),
    ({"steps": 2.0}, "steps: got 2.0; expected a whole number >= 1 or none"),
    ({"steps": True}, "steps: got True; expected a whole number >= 1 or none"),
    ({"steps": 0}, "steps: got 0; expected a whole number >= 1 or none"),
    ({"widths": 4}, "widths: got 4; expected a list of a whole number >= 1 and < 100"),
    ({"widths": [4, 0]}, "widths: got [4, 0]; expected a list of a whole number >= 1 and < 100"),
    ({"widths": [4, 100]}, "widths: got [4, 100]; expected"),
    ({"widths": [4, 1.5]}, "widths: got [4, 1.5]; expected"),
    ({"widths": "44"}, "widths: got '44'; expected a list"),
    ({"kind": "c"}, "kind: got 'c'; expected one of 'a', 'b', 3"),
    ({"kind": 3.0}, "kind: got 3.0; expected one of 'a', 'b', 3"),
    ({"name": 7}, "name: got 7; expected a text"),
    ({"loud": 1}, "loud: got 1; expected true or false"),
    ({"extra": [1]}, "extra: got [1]; expected"),
    ({"inner": 3}, "inner: got 3; expected a table"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_refused_with_what_is_accepted(values, message):
    with pytest.raises(UsageError) as refusal:
        Example(**values)
    assert message in str(refusal.value)
    faults = []
    assert build_options(Example, values, "here", faults) is None
    assert len(faults) == 1
    assert message in faults[0]


def test_every_fault_is_told_at_once():
    with pytest.raises(UsageError) as refusal:
        Example(rate=-1, steps=0, kind="z")
    assert [line.split(":")[0] for line in str(refusal.value).splitlines()] == [
        "Example.rate",
        "Example.steps",
        "Example.kind",
    ]


def test_a_whole_number_is_a_number():
    made = Example(rate=1)
    assert made.rate == 1.0
    assert type(made.rate) is float


def test_a_list_becomes_a_tuple():
    assert Example(widths=[1, 2]).widths == (1, 2)


def test_defaults_pass_their_own_checks():
    made = Example()
    assert (made.steps, made.widths, made.extra, made.inner) == (None, (4,), None, Inner())


@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_every_number_in_the_range_is_accepted_as_it_is(value):
    assert Example(rate=value).rate == value


@given(st.one_of(st.floats(max_value=0), st.floats(min_value=1, exclude_min=True), st.just(float("nan"))))
def test_no_number_outside_the_range_is_accepted(value):
    with pytest.raises(UsageError):
        Example(rate=value)


def test_a_table_with_unknown_options_names_the_nearest():
    faults = []
    assert build_options(Example, {"raet": 0.1, "stepz": 3, "rate": 2.0}, "method", faults) is None
    assert len(faults) == 3
    assert faults[0].startswith("method: unknown option 'raet'; did you mean 'rate'? Known: anything, extra")
    assert "did you mean 'steps'?" in faults[1]
    assert faults[2].startswith("method.rate: got 2.0")


def test_a_table_without_required_options_names_them():
    faults = []
    assert build_options(Needy, {"size": 1}, "model", faults) is None
    assert faults == [
        "model.size: got 1; expected a whole number >= 2",
        "model.path: missing; expected a text",
    ]


def test_rules_between_fields_are_faults_of_the_table():
    faults = ["an earlier one"]
    assert build_options(Example, {"name": "a"}, "method", faults) is None
    assert faults[1:] == [
        "method.name: must not be the kind",
        "method.kind: must not be the name",
    ]


def test_a_good_table_is_built_even_after_faults_elsewhere():
    faults = ["an earlier one"]
    assert build_options(Needy, {"path": "p", "size": 2}, "model", faults) == Needy("p", 2)
    assert faults == ["an earlier one"]


def test_the_text_of_a_range_by_hand():
    assert range_text({"above": 0, "below": 2}) == "> 0 and < 2"
    assert range_text({}) == ""


def test_the_texts_of_all_kinds_of_fields():
    texts = {name: accepted_text(*pair) for name, pair in option_fields(Example).items()}
    assert texts == {
        "rate": "a number > 0 and <= 1",
        "steps": "a whole number >= 1 or none",
        "widths": "a list of a whole number >= 1 and < 100",
        "kind": "one of 'a', 'b', 3",
        "name": "a text",
        "loud": "true or false",
        "extra": "a table or none",
        "inner": "a table",
        "anything": "anything",
    }


@dataclass(frozen=True)
class Wider:
    """Unions of several types, plain and inside a list."""

    size: int | str | None = option(None, at_least=1)
    pairs: tuple[tuple[float, ...], ...] = option(((1, 2),), above=0)
    names: tuple[str | int, ...] = option(())

    def __post_init__(self):
        check_options(self)


def test_unions_take_the_first_type_that_fits():
    assert [Wider(size=value).size for value in (3, "large", None)] == [3, "large", None]
    assert accepted_text(*option_fields(Wider)["size"]) == "a whole number or a text >= 1 or none"
    with pytest.raises(UsageError, match=r"Wider.size: got 2.5"):
        Wider(size=2.5)


def test_lists_may_hold_several_types():
    assert Wider(names=["a", 2]).names == ("a", 2)
    assert accepted_text(*option_fields(Wider)["names"]) == "a list of a text or a whole number"
    with pytest.raises(UsageError, match=r"Wider.names: got \[None\]"):
        Wider(names=[None])


def test_ranges_reach_into_nested_lists():
    assert Wider(pairs=[[1, 2], [3]]).pairs == ((1.0, 2.0), (3.0,))
    with pytest.raises(UsageError, match=r"Wider.pairs: got \[\[1, 0\]\]"):
        Wider(pairs=[[1, 0]])


def test_help_stands_beside_the_field():
    assert next(field for field in fields(Example) if field.name == "rate").metadata["help"] == "a rate"
