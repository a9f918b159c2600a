"""Names: who is filed under them, and what one is told about a wrong one."""

from dataclasses import dataclass

import pytest

from fedmerge.core.errors import DataError, FedmergeError, UsageError, unknown_name
from fedmerge.core.options import check_options, option
from fedmerge.core.registry import Registry


def shapes():
    registry = Registry("shape")

    @registry.register("square", citation="Euclid")
    @dataclass(frozen=True)
    class Square:
        """Four equal sides.

        And more.
        """

        side: float = option(1.0, above=0)

        def __post_init__(self):
            check_options(self)

    @registry.register("circle")
    @dataclass(frozen=True)
    class Circle:
        """Round."""

    return registry, Square


def test_entries_are_found_by_name_in_alphabetical_order():
    registry, square = shapes()
    assert list(registry) == ["circle", "square"]
    assert "square" in registry
    assert "ellipse" not in registry
    entry = registry["square"]
    assert (entry.cls, entry.citation, entry.summary) == (square, "Euclid", "Four equal sides.")


def test_an_unknown_name_suggests_the_nearest():
    registry, _ = shapes()
    with pytest.raises(UsageError, match=r"unknown shape 'sqare'; did you mean 'square'\? Known: circle, square"):
        registry["sqare"]


def test_a_name_is_taken_once():
    registry, square = shapes()
    with pytest.raises(ValueError, match="two shapes are called 'circle': Circle and Square"):
        registry.register("circle")(square)


def test_only_dataclasses_are_filed():
    registry, _ = shapes()
    with pytest.raises(TypeError, match="str must be a dataclass: its fields are its options"):
        registry.register("text")(str)


def test_an_instance_knows_its_name():
    registry, square = shapes()
    assert registry.name_of(square()) == "square"
    assert registry.name_of(3) == "int"


def test_a_table_becomes_an_instance():
    registry, square = shapes()
    table, faults = {"name": "square", "side": 2}, []
    assert registry.build(table, "shape", faults) == square(2.0)
    assert not faults
    assert table == {"name": "square", "side": 2}


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({"name": "squar"}, "shape.name: unknown shape 'squar'; did you mean 'square'? Known: circle, square"),
        ({"side": 1}, "shape.name: missing; known: circle, square"),
        ({"name": 5}, "shape.name: unknown shape 5. Known: circle, square"),
        ({"name": ["square"]}, "shape.name: unknown shape ['square']"),
        ({"name": "square", "side": 0}, "shape.side: got 0; expected a number > 0"),
        ({"name": "square", "sid": 1}, "shape: unknown option 'sid'; did you mean 'side'?"),
    ],
)
def test_a_wrong_table_is_a_fault(table, fault):
    registry, _ = shapes()
    faults = []
    assert registry.build(table, "shape", faults) is None
    assert len(faults) == 1
    assert faults[0].startswith(fault)


def test_a_name_like_no_other_gets_no_suggestion():
    assert unknown_name("method", "zzz", ["fedavg", "local"]) == "unknown method 'zzz'. Known: fedavg, local"


def test_every_error_a_user_can_mend_is_one_family():
    assert issubclass(UsageError, FedmergeError)
    assert issubclass(DataError, FedmergeError)
