"""One task for each client: sizes, sides, shares of classes, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from encoders import arrays_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import random_pool

from fedmerge.core.errors import DataError, UsageError
from fedmerge.data.deal import deal
from fedmerge.data.partition import SPLITS
from fedmerge.data.partitions.task import Task

SMALL = {"clients_per_task": 3, "train": 10, "validation": 5, "test": 8}


def pool_of(seed=0, *, tasks=3, per_task=120, classes=4, copies=1):
    """Tasks one after another; an item has `copies` rows of one task."""
    rng = np.random.default_rng(seed)
    n = tasks * per_task
    whole = random_pool(seed, n=n, num_classes=classes)
    return replace(
        whole,
        domain=np.repeat(np.arange(tasks), per_task),
        domain_names=tuple(f"task {k}" for k in range(tasks)),
        item=rng.permutation(n)[np.arange(n) // copies] if copies > 1 else None,
    )


pools = st.builds(
    pool_of,
    seed=st.integers(0, 2**32),
    tasks=st.integers(1, 4),
    classes=st.integers(2, 6),
    copies=st.sampled_from([1, 1, 2, 3]),
)
alphas = st.sampled_from([None, None, 0.5, 100.0])


def all_rows(partition, split):
    return np.concatenate([client.split(split) for client in partition.clients])


@settings(max_examples=30, deadline=None)
@given(pool=pools, seed=st.integers(0, 2**32), alpha=alphas)
def test_every_client_has_what_was_asked_for_of_one_task(pool, seed, alpha):
    partition = Task(**SMALL, alpha=alpha).split(pool, seed)
    assert len(partition.clients) == 3 * len(pool.domain_names)
    for number, client in enumerate(partition.clients):
        assert [len(client.split(split)) for split in SPLITS] == [10, 5, 8]
        rows = np.concatenate([client.split(split) for split in SPLITS])
        assert set(pool.domain[rows].tolist()) == {number // 3}
        assert client.group == number // 3
        assert client.name == f"task {number // 3}-{number % 3}"


@settings(max_examples=30, deadline=None)
@given(pool=pools, seed=st.integers(0, 2**32), alpha=alphas)
def test_nobody_shares_a_row_and_an_item_stays_on_one_side(pool, seed, alpha):
    partition = Task(**SMALL, alpha=alpha).split(pool, seed)
    rows = np.concatenate([all_rows(partition, split) for split in SPLITS])
    assert len(np.unique(rows)) == len(rows)
    if pool.item is not None:
        sides = [set(pool.item[all_rows(partition, split)].tolist()) for split in SPLITS]
        assert not sides[0] & sides[1]
        assert not sides[0] & sides[2]
        assert not sides[1] & sides[2]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), copies=st.integers(2, 4))
def test_an_item_of_several_tasks_stays_on_one_side_in_all_of_them(seed, copies):
    pool = random_pool(seed, n=480, copies=copies)  # every item has a row in each task
    partition = Task(**SMALL).split(pool, seed)
    sides = [set(pool.item[all_rows(partition, split)].tolist()) for split in SPLITS]
    assert not sides[0] & (sides[1] | sides[2])
    assert not sides[1] & sides[2]
    deal(pool, partition)


def test_without_items_all_of_a_task_can_be_dealt_out():
    pool = pool_of(tasks=2, per_task=3 * (10 + 5 + 8))
    partition = Task(**SMALL).split(pool, 0)
    rows = np.concatenate([all_rows(partition, split) for split in SPLITS])
    assert sorted(rows.tolist()) == list(range(len(pool)))


def test_a_task_does_not_depend_on_the_others():
    """The first of three tasks is dealt out as it is alone."""
    three = pool_of(copies=2)
    kept = three.domain == 0
    one = replace(
        three,
        inputs=three.inputs[kept],
        targets=three.targets[kept],
        user=None,
        domain=three.domain[kept],
        item=three.item[kept],
    )
    alone, first = Task(**SMALL).split(one, 7).clients, Task(**SMALL).split(three, 7).clients[:3]
    for left, right in zip(alone, first, strict=True):
        assert all(np.array_equal(left.split(split), right.split(split)) for split in SPLITS)


def class_shares(alpha):
    """Largest share of a class among a client's train rows, mean over many clients."""
    pool = pool_of(tasks=1, per_task=4000, classes=5)
    clients = Task(clients_per_task=20, train=60, validation=20, test=40, alpha=alpha).split(pool, 3).clients
    return [np.mean([np.bincount(pool.targets[c.split(s)]).max() / len(c.split(s)) for c in clients]) for s in SPLITS]


def test_a_small_alpha_gives_a_client_few_classes_on_all_sides():
    """Of five classes the largest has at least a fifth; with Dirichlet(0.1) about four fifths."""
    few, even, none = class_shares(0.1), class_shares(1000.0), class_shares(None)
    assert min(few) > 0.7
    assert max(even) < 0.4
    assert max(none) < 0.4


def test_a_clients_three_sides_have_the_same_shares_of_classes():
    pool = pool_of(tasks=1, per_task=6000, classes=5)
    sizes = {"train": 300, "validation": 300, "test": 300}
    for client in Task(clients_per_task=4, **sizes, alpha=0.3).split(pool, 1).clients:
        train, validation, test = (np.bincount(pool.targets[client.split(s)], minlength=5) / 300 for s in SPLITS)
        assert max(np.abs(train - validation).max(), np.abs(train - test).max()) < 0.12  # 3 deviations are 0.12


def test_sides_that_were_not_asked_for_are_empty():
    for client in Task(clients_per_task=2, train=10, validation=0, test=0).split(pool_of(copies=2), 0).clients:
        assert (len(client.train), len(client.validation), len(client.test)) == (10, 0, 0)


def test_tasks_without_names_are_numbered():
    pool = replace(pool_of(tasks=2), domain_names=())
    assert [client.name for client in Task(**SMALL).split(pool, 0).clients][::3] == ["task-0-0", "task-1-0"]


def test_texts_with_answers_are_dealt_out():
    numbers = pool_of(tasks=2)
    texts = arrays_of(f"text {k}" for k in range(len(numbers)))
    pool = replace(numbers, inputs=texts, answers=texts)
    partition = Task(**SMALL).split(pool, 0)
    assert partition.pool_sha256 == pool.sha256()
    assert len(partition.clients) == 6


def test_a_pool_without_tasks_is_refused():
    with pytest.raises(DataError, match=r"toy has no tasks \(domains\); take a source that has, or another kind"):
        Task().split(replace(pool_of(), domain=None, domain_names=()), 0)


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        (1, "asked for 180 items, task 'task 0' of toy has 120; take fewer clients_per_task"),
        (2, r"asked for 90 train items, task 'task 0' of toy has 60 for that side \(120 in all; near-copies of one"),
    ],
)
def test_a_task_that_is_too_small_is_named_with_numbers(copies, message):
    with pytest.raises(DataError, match=message):
        Task(clients_per_task=3, train=30, validation=10, test=20).split(pool_of(copies=copies), 0)


def test_shares_of_classes_that_cannot_be_met_are_refused():
    """Three clients that all want one class, of which there are not enough."""
    pool = pool_of(tasks=1, per_task=120, classes=6)
    with pytest.raises(DataError, match=r"task 'task 0': the classes that a client drew have too few .* raise alpha"):
        Task(clients_per_task=3, train=20, validation=10, test=10, alpha=1e-4).split(pool, 0)


@pytest.mark.parametrize("option", [{"clients_per_task": 0}, {"train": 0}, {"test": -1}, {"alpha": 0.0}], ids=str)
def test_options_out_of_range_are_refused(option):
    (name,) = option
    with pytest.raises(UsageError, match=f"Task.{name}"):
        Task(**option)
