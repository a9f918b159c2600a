"""The gate for replies, alone: what an update of several tensors is called, and which of several faults is told."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fedmerge.core.replies import (
    LARGEST,
    Expected,
    Refusal,
    Reply,
    admit,
    check_of,
    fault_of,
    named_tensors,
    reasons_text,
    stacked_updates,
    template_of,
)


class Pair(NamedTuple):
    first: Tensor
    rest: dict[str, Tensor]


def pair(scale: float = 1.0) -> Pair:
    """Three tensors, of which one counts and one is empty."""
    numbers = torch.tensor([[1.0, -2.0]]) * scale
    return Pair(numbers, {"steps": torch.tensor(3), "none": torch.empty(0)})


TENSORS = named_tensors(pair())
EXPECTED = Expected("r", 1, frozenset({4, 7}), template_of(pair()))
GOOD = Reply("r", 1, 7, 5, TENSORS)


def told(reply: Reply, expected: Expected = EXPECTED) -> tuple[str, str]:
    """Reason and detail of a refusal."""
    found = fault_of(reply, expected)
    assert found is not None
    return found.reason, found.detail


def with_tensors(**changes: object) -> Reply:
    return replace(GOOD, tensors={**TENSORS, **{name.replace("_", "."): value for name, value in changes.items()}})


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("update", "names"),
    [
        (torch.zeros(1), ["update"]),
        ((torch.zeros(1), torch.zeros(2)), ["0", "1"]),
        ({"a": [torch.zeros(1)], "b": torch.zeros(1)}, ["a.0", "b"]),
        (Pair(torch.zeros(1), {"k": torch.zeros(1)}), ["first", "rest.k"]),
    ],
)
def test_tensors_are_called_by_the_way_to_them(update: Any, names: list[str]) -> None:
    assert list(named_tensors(update)) == names
    assert list(template_of(update).forms) == names


def test_an_update_comes_back_out_of_its_names() -> None:
    back = EXPECTED.template.update_of(dict(reversed(TENSORS.items())))
    assert isinstance(back, Pair)
    assert back.first is TENSORS["first"]
    assert back.rest == {name: TENSORS[f"rest.{name}"] for name in ("steps", "none")}


def test_one_name_for_two_tensors_is_refused_at_once() -> None:
    twice = {"a.b": torch.zeros(1), "c": torch.zeros(1), "a": {"b": torch.zeros(2)}}
    with pytest.raises(ValueError, match=r"^two tensors of an update have the same name: \['a.b', 'c'\]$"):
        template_of(twice)


def test_updates_are_stacked_tensor_by_tensor_in_the_order_of_the_replies() -> None:
    replies = [replace(GOOD, client=i, tensors=named_tensors(pair(scale))) for i, scale in ((4, 2.0), (7, -1.0))]
    stacked = stacked_updates(replies, EXPECTED.template)
    assert stacked.first.tolist() == [[[2.0, -4.0]], [[-1.0, 2.0]]]
    assert stacked.rest["steps"].tolist() == [3, 3]
    assert stacked.rest["none"].shape == (2, 0)


# ---------------------------------------------------------------- several faults, several tensors


def test_an_update_of_several_tensors_is_admitted() -> None:
    assert admit([GOOD], EXPECTED) == ((GOOD,), ())


def test_nothing_is_late_unless_it_is_said() -> None:
    assert EXPECTED.late == frozenset()
    assert fault_of(replace(GOOD, client=4), EXPECTED) is None
    assert told(replace(GOOD, client=4), replace(EXPECTED, late=frozenset({4})))[0] == "late"


def test_a_run_may_believe_fewer_examples() -> None:
    few = replace(EXPECTED, most_examples=5)
    assert fault_of(GOOD, few) is None
    assert told(replace(GOOD, num_examples=6), few) == ("count", "got 6 examples; expected a whole number, 1..5")


def test_the_first_fault_in_the_order_of_the_checks_is_told() -> None:
    """Every reply has the faults of all later ones too."""
    late = replace(EXPECTED, late=frozenset({7}), further=lambda _: "the method's own")
    nan = {"first": torch.full((1, 2), torch.nan)}
    bad = replace(GOOD, run="x", round=9, client=1, num_examples=0, tensors=nan)
    reasons = [told(bad, late)[0]]
    for better in ({"run": "r"}, {"round": 1}, {"client": 7}):
        bad = replace(bad, **better)
        reasons.append(told(bad, late)[0])
    in_time = replace(late, late=frozenset())
    reasons.append(told(bad, in_time)[0])
    bad = replace(bad, num_examples=1)
    reasons.append(told(bad, in_time)[0])
    reasons.append(told(replace(bad, tensors={**TENSORS, **nan}), in_time)[0])
    assert reasons == ["run", "round", "client", "late", "count", "names", "values"]
    assert told(GOOD, in_time) == ("values", "the method's own")


def test_one_bad_tensor_among_good_ones_is_named() -> None:
    assert told(with_tensors(rest_none=torch.empty(0, 1))) == ("shape", "rest.none: got shape [0, 1]; expected [0]")
    assert told(with_tensors(rest_steps=torch.tensor(3.0)))[1] == "rest.steps: got torch.float32; expected torch.int64"
    both = with_tensors(first=torch.zeros(3), rest_none=torch.zeros(3))
    assert told(both) == ("shape", "first: got shape [3]; expected [1, 2]")


def test_missing_names_are_told_with_all_that_are_wanted() -> None:
    wanted = "first, rest.steps, rest.none"
    assert told(replace(GOOD, tensors={"first": TENSORS["first"]})) == (
        "names",
        f"got tensors ['first']; expected {wanted}",
    )
    assert told(replace(GOOD, tensors={**TENSORS, 2: 0, 10: 0}))[1] == (
        f"got tensors ['10', '2', 'first', 'rest.none', 'rest.steps']; expected {wanted}"
    )


def test_a_foreign_value_is_cut_at_80_letters() -> None:
    detail = told(replace(GOOD, run="x" * 500))[1]
    assert detail == "got run '" + "x" * 76 + "...; expected 'r'"


# ---------------------------------------------------------------- values


def alone(tensor: Tensor) -> str | None:
    """The reason that a reply of this one tensor is refused for, where its form is right."""
    expected = replace(EXPECTED, template=template_of(tensor))
    found = fault_of(replace(GOOD, tensors={"update": tensor}), expected)
    return None if found is None else found.reason


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1.001 * LARGEST, -1.001 * LARGEST])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_bad_number_is_enough_wherever_it_is(bad: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for place in range(torch.Size(shape).numel()):
        tensor = torch.zeros(shape, dtype=dtype)
        tensor.view(-1)[place] = bad * 1.01
        assert alone(tensor) == "values"
    assert alone(torch.zeros(shape, dtype=dtype)) is None


def test_the_largest_number_is_10_to_the_12() -> None:
    assert alone(torch.tensor([1e12, -1e12], dtype=torch.float64)) is None
    assert alone(torch.tensor([1e12 + 0.5], dtype=torch.float64)) == "values"
    assert alone(torch.tensor([-1e12 - 0.5], dtype=torch.float64)) == "values"


def test_whole_numbers_and_empty_tensors_have_no_bad_values() -> None:
    assert alone(torch.tensor([2**62, -(2**62)])) is None
    assert alone(torch.tensor([True, False])) is None
    assert alone(torch.empty(3, 0)) is None


def test_a_tensor_with_a_history_is_only_looked_at() -> None:
    leaf = torch.ones(2, requires_grad=True)
    assert alone(2 * leaf) is None
    assert leaf.grad is None


# ---------------------------------------------------------------- a method's own demands


class Demanding:
    """Wants its number to be 3."""

    def check_reply(self, tensors: Mapping[str, Tensor]) -> str | None:
        return None if int(tensors["rest.steps"]) == 3 else f"steps: got {int(tensors['rest.steps'])}; expected 3"


def test_a_method_is_asked_about_replies_of_the_right_form() -> None:
    check = check_of(Demanding())
    expected = replace(EXPECTED, further=check)
    assert fault_of(GOOD, expected) is None
    odd = with_tensors(rest_steps=torch.tensor(2))
    assert fault_of(odd, expected) == Refusal(7, "values", "steps: got 2; expected 3")
    assert fault_of(odd, EXPECTED) is None


def test_a_method_without_demands_has_none() -> None:
    assert check_of(object()) is None


def test_a_method_is_not_asked_about_anything_else() -> None:
    expected = replace(EXPECTED, further=lambda _: pytest.fail("asked"))
    assert told(with_tensors(rest_steps=None), expected)[0] == "malformed"
    assert told(replace(GOOD, tensors=[7]), expected) == (
        "malformed",
        "got [7] for the update; expected tensors by name",
    )
    assert told(replace(GOOD, num_examples=0), expected)[0] == "count"


# ---------------------------------------------------------------- many


def test_refusals_stay_in_the_order_of_arrival_and_name_whom_they_can() -> None:
    replies = [replace(GOOD, run="x"), replace(GOOD, client=True), GOOD, replace(GOOD, client=4), GOOD]
    admitted, refusals = admit(iter(replies), EXPECTED)
    assert [reply.client for reply in admitted] == [4, 7]
    assert [(refusal.client, refusal.reason) for refusal in refusals] == [
        (7, "run"),
        (None, "client"),
        (7, "duplicate"),
    ]
    assert refusals[2].detail == "this client's reply of this round is there already"


def test_the_most_frequent_reason_comes_first_and_equals_as_they_came() -> None:
    reasons: list[Any] = ["late", "count", "run", "run", "count", "run"]
    assert reasons_text(Refusal(None, reason, "") for reason in reasons) == "3 run, 2 count, 1 late"
    assert reasons_text(Refusal(None, reason, "") for reason in ("shape", "names")) == "1 shape, 1 names"
    assert reasons_text([]) == ""
