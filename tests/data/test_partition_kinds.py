"""What sets each kind of partition apart, and what it says when it cannot be done."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import random_pool

from fedmerge.core.errors import DataError, UsageError
from fedmerge.data.partitions import PARTITIONS
from fedmerge.data.partitions._stock import draw_counts
from fedmerge.data.partitions.dirichlet import spread_classes
from fedmerge.data.sides import apportion, item_sides

SIZES = {"train": 12, "validation": 6, "test": 12}


def split(kind, pool=None, seed=0, **options):
    return PARTITIONS[kind].cls(**options).split(pool or random_pool(), seed)


def classes_of(client, pool):
    return set(pool.targets[np.concatenate([client.train, client.validation, client.test])].tolist())


def groups_of(partition):
    return [client.group for client in partition.clients]


def test_groups_stand_in_contiguous_blocks_of_nearly_equal_size():
    assert groups_of(split("permuted", clients=7, groups=3, **SIZES)) == [0, 0, 0, 1, 1, 2, 2]


def test_every_group_has_its_own_permutation_of_all_labels():
    clients = split("permuted", clients=6, groups=6, **SIZES).clients
    assert len({client.relabel for client in clients}) == 6
    assert all(sorted(client.relabel) == [0, 1, 2, 3, 4] for client in clients)


def test_two_classes_have_two_permutations_and_both_are_used():
    pool = random_pool(num_classes=2)
    assert {client.relabel for client in split("permuted", pool, clients=2, groups=2, **SIZES).clients} == {
        (0, 1),
        (1, 0),
    }
    with pytest.raises(DataError, match="asked for 3 groups with different labels; 2 classes have only 2 permutations"):
        split("permuted", pool, clients=3, groups=3, **SIZES)


def test_five_rotation_groups_are_four_quarters_and_a_negative():
    clients = split("rotations", clients=5, **SIZES).clients
    assert [(c.rotation, c.invert) for c in clients] == [(0, False), (90, False), (180, False), (270, False), (0, True)]


def test_four_rotation_groups_invert_nothing():
    assert not any(client.invert for client in split("rotations", clients=4, groups=4, **SIZES).clients)


def test_continuous_rotations_give_every_client_its_own_angle_and_no_group():
    clients = split("rotations", clients=20, continuous=True, **SIZES).clients
    angles = [client.rotation for client in clients]
    assert len(set(angles)) == 20
    assert 0 <= min(angles) < 60
    assert 120 < max(angles) < 180
    assert {client.group for client in clients} == {None}


def test_clients_of_a_class_cluster_know_only_its_classes():
    pool = random_pool(n=4000, num_classes=10)
    partition = split("class-clusters", pool, clients=8, groups=2, classes_per_group=3, **SIZES)
    for group in (0, 1):
        members = [classes_of(client, pool) for client in partition.clients if client.group == group]
        assert len(set().union(*members)) == 3


def test_a_class_that_runs_out_is_replaced_and_logged(caplog):
    pool = random_pool(n=400, num_classes=4)
    with caplog.at_level(logging.WARNING):
        partition = split(
            "class-clusters", pool, clients=12, groups=3, classes_per_group=4, train=24, validation=3, test=5
        )
    assert all(len(client.train) == 24 for client in partition.clients)
    assert "no items are left of" in caplog.text


def test_pathological_clients_have_equal_parts_of_their_classes():
    pool = random_pool(num_classes=6)
    for client in split("pathological", pool, clients=9, classes_per_client=3, **SIZES).clients:
        counts = np.bincount(pool.targets[client.train], minlength=6)
        assert sorted(counts.tolist()) == [0, 0, 0, 4, 4, 4]  # 12 train items over 3 classes
        assert len(classes_of(client, pool)) == 3


def test_pathological_uses_all_classes_equally_often():
    pool = random_pool(num_classes=6)
    known = [
        classes_of(client, pool)
        for client in split("pathological", pool, clients=9, classes_per_client=2, **SIZES).clients
    ]
    assert [sum(k in classes for classes in known) for k in range(6)] == [3] * 6  # 9 clients x 2 classes / 6


def test_clients_of_a_domain_share_its_test_and_nothing_else():
    pool = random_pool(copies=4)
    partition = split("domain", pool, clients_per_domain=3)
    assert groups_of(partition) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [client.name for client in partition.clients[2:4]] == ["style 0-2", "style 1-0"]
    for client in partition.clients:
        first = partition.clients[3 * client.group]
        assert (client.test == first.test).all()
        assert (pool.domain[np.concatenate([client.train, client.test])] == client.group).all()
    assert len({(len(client.train), len(client.validation)) for client in partition.clients}) == 1


def test_user_clients_are_the_users_with_enough_items():
    pool = random_pool()
    sizes = np.bincount(pool.user)
    floor = int(np.sort(sizes)[3])  # three users have fewer items, unless some have equally many
    clients = split("user", pool, min_examples=floor).clients
    assert [client.name for client in clients] == [f"writer {u}" for u in np.flatnonzero(sizes >= floor)]
    for client in clients:
        user = int(client.name.split()[1])
        assert len(client.train) + len(client.validation) + len(client.test) == sizes[user]


def test_max_clients_draws_some_of_the_users():
    assert len(split("user", max_clients=4).clients) == 4


def test_small_alpha_gives_fewer_classes_per_client_than_large_alpha():
    pool = random_pool(n=4000, num_classes=10)

    def mean_classes(alpha):
        clients = split("dirichlet", pool, clients=10, alpha=alpha, **SIZES).clients
        return np.mean([len(classes_of(client, pool)) for client in clients])

    assert mean_classes(0.1) + 3 < mean_classes(100.0)


def test_a_dirichlet_draw_places_every_item():
    used = np.array([[10, 0, 7], [3, 1, 2], [5, 5, 5]])
    counts = spread_classes(used, 4, 0.3, np.random.default_rng(0))
    assert (counts.sum(axis=2) == used).all()
    assert counts.min() >= 0


def test_rounding_favours_no_client():
    """Cutting off decimals would give the last of 50 clients an item of nearly every one of the 100 classes."""
    rng = np.random.default_rng(0)
    used = np.full((1, 100), 40)
    last = np.mean([np.count_nonzero(spread_classes(used, 50, 0.1, rng)[0, :, -1]) for _ in range(20)])
    first = np.mean([np.count_nonzero(spread_classes(used, 50, 0.1, rng)[0, :, 0]) for _ in range(20)])
    assert abs(last - first) < 5


IMPOSSIBLE = {
    "iid": ({"clients": 50}, "asked for 15200 items, toy has 1200; take fewer clients"),
    "permuted": ({}, "asked for 15200 items, toy has 1200"),
    "rotations": ({}, "asked for 15200 items, toy has 1200"),
    "class-clusters": ({"classes_per_group": 9}, "asked for 9 classes per group; toy has 5"),
    "pathological": ({"clients": 10}, r"asked for \d+ items of class '.', toy has \d+ \(\d classes are short\)"),
    "dirichlet": ({"total": 100}, "100 items of toy are dealt out; 50 clients with at least 20 need 1000"),
    "quantity": ({"total": 0.5}, "600 items of toy are dealt out; 50 clients with at least 20 need 1000"),
    "user": ({"min_examples": 1000}, r"at least 1000 items; the largest of toy has \d+; lower min_examples"),
    "domain": ({"clients_per_domain": 400}, r"400 clients with train items of their own in each domain; domain 'style"),
}


@pytest.mark.parametrize("kind", sorted(IMPOSSIBLE))
def test_a_request_that_cannot_be_met_says_what_is_asked_and_what_is_there(kind):
    options, message = IMPOSSIBLE[kind]
    with pytest.raises(DataError, match=message):
        split(kind, **options)


def test_dirichlet_gives_up_after_a_bounded_number_of_draws():
    with pytest.raises(
        DataError, match=r"in the fairest of 1000 draws a client has \d+ of 300 items \(Dirichlet alpha 0.01\)"
    ):
        split("dirichlet", clients=20, alpha=0.01, total=300, min_examples=14)


def test_items_with_copies_are_counted_per_side():
    """1,250 are asked for; the 1,200 that there are go to the sides as 480 : 480 : 240, in items of four rows."""
    message = r"asked for 500 train items, toy has 48\d for that side \(1200 in all; near-copies"
    with pytest.raises(DataError, match=message):
        split("iid", random_pool(copies=4), clients=10, train=50, validation=50, test=25)


@pytest.mark.parametrize(("kind", "column"), [("user", "users"), ("domain", "domains")])
def test_a_pool_without_users_or_domains_is_refused(kind, column):
    pool = random_pool()
    object.__setattr__(pool, kind, None)
    with pytest.raises(DataError, match=f"toy has no (natural )?{column}; take a source that has"):
        split(kind, pool)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("permuted", {"clients": 3, "groups": 4}, "got 4 groups for 3 clients"),
        ("rotations", {"groups": 6}, "Rotations.groups: got 6"),
        ("rotations", {"groups": 2, "continuous": True}, "give one of them"),
        ("pathological", {"train": 2, "classes_per_client": 3}, "got 2 items for 3 classes per client"),
        ("dirichlet", {"total": 1.5}, "Dirichlet.total: got 1.5"),
        ("dirichlet", {"alpha": float("nan")}, "Dirichlet.alpha"),
        ("domain", {"validation": 0.5, "test": 0.5}, "expected shares >= 0 whose sum is below 1"),
        ("user", {"min_examples": 2}, "User.min_examples: got 2"),
    ],
)
def test_options_that_contradict_each_other_are_refused(kind, options, message):
    with pytest.raises(UsageError, match=message):
        PARTITIONS[kind].cls(**options)


@settings(max_examples=100, deadline=None)
@given(
    items=st.lists(st.integers(0, 30), min_size=1, max_size=120),
    shares=st.tuples(st.floats(0.1, 1), st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 99),
)
def test_rows_of_an_item_go_to_one_side_and_every_wanted_side_gets_one(items, shares, seed):
    item = np.array(items)
    sides = item_sides(item, np.zeros_like(item), shares, np.random.default_rng(seed))
    assert all(len(np.unique(sides[item == one])) == 1 for one in np.unique(item))
    wanted = {side for side, share in enumerate(shares) if share > 0}
    assert set(sides.tolist()) <= wanted
    if len(np.unique(item)) >= len(wanted):
        assert set(sides.tolist()) == wanted


def test_ten_rows_split_seven_one_two():
    """0.7, 0.15, 0.15 of ten single items: cuts after 7 and 8.5, and the ninth item's middle, 8.5, is not before it."""
    sides = item_sides(np.arange(10), np.zeros(10, dtype=int), (0.7, 0.15, 0.15), np.random.default_rng(0))
    assert np.bincount(sides).tolist() == [7, 1, 2]


@given(total=st.integers(0, 1000), shares=st.lists(st.floats(0.01, 10), min_size=1, max_size=20))
def test_apportioned_parts_sum_up_and_are_within_one_of_exact(total, shares):
    counts = apportion(total, shares)
    assert counts.sum() == total
    assert np.abs(counts - total * np.array(shares) / sum(shares)).max() < 1 + 1e-6


@given(
    available=st.lists(st.integers(0, 9), min_size=3, max_size=8),
    total=st.integers(0, 60),
    seed=st.integers(0, 99),
)
def test_drawn_counts_stay_within_the_stock_or_there_is_none(available, total, seed):
    stock = np.array(available)
    counts = draw_counts(np.full(len(stock), 1 / len(stock)), total, stock, np.random.default_rng(seed))
    if total > stock.sum():
        assert counts is None
    else:
        assert counts.sum() == total
        assert (counts <= stock).all()


def test_a_domain_uses_all_of_its_items_but_what_does_not_divide():
    """Each of the four domains draws the same 300 items: 0.25 of them, 75, are for the test, class by class."""
    pool = random_pool(copies=4)
    clients = split("domain", pool, clients_per_domain=7).clients
    for first in clients[::7]:
        assert abs(len(first.test) - 75) <= 3
        used = 7 * (len(first.train) + len(first.validation)) + len(first.test)
        assert 300 - 2 * 6 <= used <= 300
        assert set(pool.item[first.test]) == set(pool.item[clients[0].test])
