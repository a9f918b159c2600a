"""Letters through Flower's records: the same bits, and nothing of an announced size is made before it is checked."""

import json

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.core.errors import FedmergeError
from fedmerge.deploy.flower.wire import failure_records, letter_from, records_of
from fedmerge.deploy.messages import Answer, Letter, Order, answer_from, order_from, text_of

TENSORS = [
    torch.tensor([1.5, float("nan"), float("-inf"), -0.0]),
    torch.randn(2, 3, dtype=torch.float64).T,
    torch.tensor(7, dtype=torch.int64),
    torch.empty(0, 4),
    torch.tensor([True, False]),
    torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3),
    torch.randn(3).half(),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}")
def test_tensors_arrive_bit_for_bit(tensor):
    found = letter_from(records_of(Letter("{}", {"x": tensor})))
    assert found.text == "{}"
    got = found.tensors["x"]
    assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
    assert got.contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes()


def records(**changes):
    facts = {"dtype": "float32", "shape": (2,), "stype": "fedmerge.bytes", "data": b"\0" * 8, **changes}
    return RecordDict({"letter": ConfigRecord({"text": "{}"}), "tensors": ArrayRecord({"x": Array(**facts)})})


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (2**40,)},
        {"shape": (3,)},
        {"shape": (-2,)},
        {"shape": (2**31, 2**33)},
        {"shape": (1,) * 40},
        {"dtype": "object"},
        {"dtype": "float128"},
        {"stype": "numpy.ndarray"},
        {"data": b""},
        {"dtype": "bool", "shape": (8,), "data": b"\7" * 8},
    ],
)
def test_a_damaged_tensor_is_refused(changes):
    with pytest.raises(FedmergeError, match="tensor 'x'"):
        letter_from(records(**changes))


def test_other_records_are_no_letter():
    for content in ({}, {"letter": ConfigRecord({"text": 3})}, {"other": ConfigRecord({"text": "{}"})}):
        with pytest.raises(FedmergeError, match="holds no letter"):
            letter_from(RecordDict(content))


def test_a_failure_says_why():
    assert letter_from(failure_records("its data are gone")) == ("its data are gone", False)
    assert letter_from(failure_records("at work", busy=True)).busy
    assert len(letter_from(failure_records("x" * 10**6)).reason) <= 1100


ORDER = Order("round", "r", 3, 1, "site", {"a": 1}, train=True, rate=0.1, keep=(1, 2), form=("tensor",))
ANSWER = Answer("r", 3, 1, "site", 10, 2, 2)


def test_messages_come_back_as_they_were():
    assert order_from(text_of(ORDER)) == ORDER
    assert answer_from(text_of(ANSWER)) == ANSWER


def plain_values():
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2)
    )


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(sorted(json.loads(text_of(ANSWER)))), value=plain_values())
def test_a_changed_answer_is_read_or_refused_and_nothing_else(key, value):
    text, told = json.dumps({**json.loads(text_of(ANSWER)), key: value}), ""
    try:
        answer_from(text)
    except FedmergeError as error:
        told = str(error)
    assert told == "" or key in told or "JSON" in told


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_an_answer_or_refused(text):
    with pytest.raises(FedmergeError):
        answer_from(text)
