"""Replies are checked before any state is touched; states are trees of tensors that can be saved."""

from dataclasses import dataclass

import jaxtyping
import pytest
import torch

from fedmerge.algorithms.fedavg import FedAvg
from fedmerge.core.errors import FedmergeError
from fedmerge.core.protocol import Federation, Update, deliver, stack, state_tensors, take, tree_bytes, with_tensors

ALGORITHM = FedAvg()
STATE = ALGORITHM.init(lambda j: torch.zeros(2), Federation(4, 2, (0, 2), ((0, 2),)), 0)


def hand_over(clients, delta, counts):
    return deliver(ALGORITHM, STATE, torch.tensor(clients), Update(torch.tensor(delta)), torch.tensor(counts))


GOOD = [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("clients", "delta", "counts", "message"),
    [
        ([1, 1], GOOD, [3, 4], r"a client replied twice in one round: \[1, 1\]"),
        ([1, 2], GOOD[:1], [3, 4], "expected one reply from each of the 2 clients"),
        ([1, 2], GOOD, [3], "expected one reply from each of the 2 clients"),
        ([1, 2], GOOD, [3, 0], r"number of examples must be positive; got \[3, 0\]"),
        ([1, 2], GOOD, [-3, 1], "number of examples must be positive"),
        (
            [3, 0],
            [[1.0, float("nan")], [2.0, 2.0]],
            [3, 4],
            r"clients \[3\] sent NaN or infinite values.*learning rate",
        ),
        ([3, 0], [[1.0, float("inf")], [float("nan"), 2.0]], [3, 4], r"clients \[0, 3\] sent NaN"),
    ],
)
def test_a_reply_that_cannot_be_used_is_refused(clients, delta, counts, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own shape check would be first
    with pytest.raises(FedmergeError, match=message):
        hand_over(clients, delta, counts)
    assert STATE.models.tolist() == [[0.0, 0.0]]


def test_replies_arrive_in_client_order_with_their_counts():
    """(3·1 + 1·5) / 4 = 2 whichever comes first."""
    straight, crossed = (
        hand_over([0, 2], [[1.0, 1.0], [5.0, 5.0]], [3, 1]),
        hand_over([2, 0], [[5.0] * 2, [1.0] * 2], [1, 3]),
    )
    assert straight.models.tolist() == crossed.models.tolist() == [[-2.0, -2.0]]


def test_tensors_of_a_state_go_out_and_in_by_name():
    named = state_tensors(STATE)
    assert set(named) == {"models", "velocity"}
    back = with_tensors(STATE, {name: tensor + 1 for name, tensor in named.items()})
    assert back.models.tolist() == [[1.0, 1.0]]
    assert STATE.models.tolist() == [[0.0, 0.0]]


def test_a_saved_state_without_a_tensor_is_refused():
    with pytest.raises(FedmergeError, match="the saved state has no 'velocity'; it holds models"):
        with_tensors(STATE, {"models": STATE.models})


def test_a_saved_state_of_another_dtype_is_refused():
    wrong = {**state_tensors(STATE), "models": STATE.models.double()}
    with pytest.raises(FedmergeError, match=r"'models' is torch.float64; expected torch.float32"):
        with_tensors(STATE, wrong)


def test_a_state_of_anything_but_tensors_is_a_programming_error():
    @dataclass(frozen=True)
    class Wrong:
        count: int

    with pytest.raises(TypeError, match="state field count is a int; states hold tensors only"):
        state_tensors(Wrong(3))


def test_bytes_of_a_tree_by_hand():
    """2 floats of 4 bytes, 3 of 8, one index of 8; what is not a tensor does not travel."""
    assert tree_bytes((torch.zeros(2), {"a": torch.zeros(3).double()}, torch.tensor(1), "x")) == 8 + 24 + 8


def test_taking_from_a_stack_gives_the_parts_back():
    parts = [(torch.tensor([1.0]), torch.tensor(2)), (torch.tensor([3.0]), torch.tensor(4))]
    assert [take(stack(parts), k) for k in range(2)] == parts
