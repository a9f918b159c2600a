"""What outputs are held against: one class, a class among those of its task, and one class per token."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fedmerge.data.encoding import NO_TARGET
from fedmerge.training import FunctionalTask, ModuleTask
from fedmerge.training.objective import CLASSES, TOKENS, classes_of_tasks
from small_federation import small

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
TASKS = ("a", "b", "a", "c", "b", "a")
"""Six classes: 0, 2 and 5 are of one task, 1 and 4 of another, 3 is alone."""


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs_like(values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------- classes


def test_a_class_among_all_is_plain_cross_entropy():
    outputs, targets = numbers(5, 6), torch.tensor([0, 5, 2, 2, 1])
    torch.testing.assert_close(CLASSES.losses(outputs, targets), -outputs.log_softmax(1)[range(5), targets], **CLOSE)
    assert CLASSES.right(outputs, targets).tolist() == (outputs.argmax(1) == targets).double().tolist()


# ---------------------------------------------------------------------------------------- classes of tasks


@pytest.mark.parametrize("target", range(6))
def test_it_is_cross_entropy_over_the_columns_of_the_targets_task(target):
    objective, outputs = classes_of_tasks(TASKS), numbers(1, 6)
    columns = [k for k in range(6) if TASKS[k] == TASKS[target]]
    wanted = functional.cross_entropy(outputs[:, columns], torch.tensor([columns.index(target)]), reduction="none")
    torch.testing.assert_close(objective.losses(outputs, torch.tensor([target])), wanted, **CLOSE)
    best = columns[int(outputs[0, columns].argmax())]
    assert objective.right(outputs, torch.tensor([target])).tolist() == [float(best == target)]


def test_one_task_is_no_task():
    outputs, targets = numbers(4, 3), torch.tensor([0, 2, 1, 1])
    objective = classes_of_tasks(["only"] * 3)
    assert torch.equal(objective.losses(outputs, targets), CLASSES.losses(outputs, targets))
    assert torch.equal(objective.right(outputs, targets), CLASSES.right(outputs, targets))


def test_classes_of_other_tasks_get_no_gradient():
    outputs, targets = numbers(3, 6).requires_grad_(), torch.tensor([0, 4, 3])
    classes_of_tasks(TASKS).losses(outputs, targets).sum().backward()
    slopes = outputs.grad
    assert slopes is not None
    for row, target in enumerate(targets.tolist()):
        own = [TASKS[k] == TASKS[target] for k in range(6)]
        assert (slopes[row][~torch.tensor(own)] == 0).all()
    assert (slopes[0, [0, 2, 5]] != 0).all()
    assert slopes[2].tolist() == [0.0] * 6  # a task of one class has nothing to learn


def test_classes_of_tasks_by_hand():
    """Among (log 3, 0) the first class has 3/4; the largest output belongs to another task and does not count."""
    objective, outputs = classes_of_tasks(["x", "x", "y"]), outputs_like([[math.log(3), 0.0, 9.0]] * 2)
    targets = torch.tensor([0, 1])
    torch.testing.assert_close(objective.losses(outputs, targets), outputs_like([math.log(4 / 3), math.log(4)]))
    assert objective.right(outputs, targets).tolist() == [1.0, 0.0]


def test_ties_go_to_the_first_class_of_the_task():
    right = classes_of_tasks(["x", "y", "y"]).right
    assert right(outputs_like([[5.0, 1.0, 1.0]] * 2), torch.tensor([1, 2])).tolist() == [1.0, 0.0]


def test_an_output_of_another_task_may_be_anything():
    objective, targets = classes_of_tasks(["x", "x", "y"]), torch.tensor([0])
    plain, wild = outputs_like([[1.0, 2.0, 0.0]]), outputs_like([[1.0, 2.0, 1e300]])
    assert torch.equal(objective.losses(plain, targets), objective.losses(wild, targets))


def test_both_forms_of_a_task_learn_the_same_from_classes_of_tasks():
    """The closed form for perceptrons is plain cross-entropy, and may not be taken here."""
    federation, objective = small(), classes_of_tasks(["x", "y", "x"])
    parts = (federation.network(), federation.layout, federation.descent)
    steps = federation.batches([0], 1)[0]
    one, other = (
        kind(*parts, objective=objective).train(federation.draw(0), steps) for kind in (ModuleTask, FunctionalTask)
    )
    torch.testing.assert_close(one, other, **CLOSE)
    plain = ModuleTask(*parts).train(federation.draw(0), steps)
    assert float((one - plain).abs().max()) > 1e-3


# ---------------------------------------------------------------------------------------- tokens

NO = NO_TARGET


def token_case(data, num_classes=4):
    B, L = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    entries = st.lists(st.sampled_from([NO, *range(num_classes)]), min_size=L, max_size=L)
    targets = torch.tensor(data.draw(st.lists(entries, min_size=B, max_size=B)))
    return numbers(B, L, num_classes, seed=data.draw(st.integers(0, 99))), targets


@given(st.data())
def test_an_examples_loss_is_the_mean_over_its_tokens_that_count(data):
    outputs, targets = token_case(data)
    losses, right = TOKENS.losses(outputs, targets), TOKENS.right(outputs, targets)
    for row, own in enumerate(targets):
        counts = own != NO
        if counts.any():
            wanted = functional.cross_entropy(outputs[row][counts], own[counts])
            share = (outputs[row][counts].argmax(1) == own[counts]).double().mean()
        else:
            wanted = share = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(losses[row], wanted, **CLOSE)
        torch.testing.assert_close(right[row], share, **CLOSE)


@given(st.data())
def test_padding_behind_the_outputs_changes_nothing(data):
    """Outputs may end where the longest example of the batch does; what is left of the targets is padding."""
    outputs, targets = token_case(data)
    longer = torch.cat([targets, torch.full((len(targets), 3), NO)], dim=1)
    assert torch.equal(TOKENS.losses(outputs, longer), TOKENS.losses(outputs, targets))
    assert torch.equal(TOKENS.right(outputs, longer), TOKENS.right(outputs, targets))


def test_every_example_counts_the_same_however_many_tokens_it_has():
    """Losses log 4/3 and log 4 of one example, log 4 alone of another: means, not sums."""
    odds = [math.log(3.0), 0.0]
    outputs = outputs_like([[odds, odds], [odds, odds]])
    targets = torch.tensor([[0, 1], [1, NO]])
    wanted = outputs_like([(math.log(4 / 3) + math.log(4)) / 2, math.log(4)])
    torch.testing.assert_close(TOKENS.losses(outputs, targets), wanted)
    assert TOKENS.right(outputs, targets).tolist() == [0.5, 0.0]


def test_tokens_that_do_not_count_get_no_gradient():
    outputs = numbers(2, 3, 4).requires_grad_()
    TOKENS.losses(outputs, torch.tensor([[1, NO, 3], [NO, NO, NO]])).sum().backward()
    slopes = outputs.grad
    assert slopes is not None
    assert (slopes[0, 1] == 0).all()
    assert (slopes[1] == 0).all()
    assert (slopes[0, [0, 2]] != 0).all()
