"""Laws that every registered kind of partition keeps."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import random_pool

from fedmerge.core.errors import DataError
from fedmerge.data.deal import deal
from fedmerge.data.partition import SPLITS, Partition
from fedmerge.data.partitions import PARTITIONS

KINDS = list(PARTITIONS)
SMALL = {"clients": 6, "train": 12, "validation": 6, "test": 12, "alpha": 0.5, "min_examples": 9}
SMALL |= {"classes_per_group": 3, "clients_per_domain": 3, "clients_per_task": 2}
SHARES = {"validation": 0.2, "test": 0.3}


def small(kind, **options):
    """The kind with options that suit a small pool, as far as it has them."""
    cls = PARTITIONS[kind].cls
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    table = SMALL | ({} if "train" in fields else SHARES) | options
    return cls(**{name: value for name, value in table.items() if name in fields})


def rows_by_split(partition):
    return {split: np.concatenate([client.split(split) for client in partition.clients]) for split in SPLITS}


pools = st.builds(
    random_pool,
    seed=st.integers(0, 2**32),
    n=st.integers(900, 1500),
    num_classes=st.integers(3, 8),
    copies=st.sampled_from([1, 1, 2, 5]),
)
seeds = st.integers(0, 2**32)
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@settings(max_examples=15, deadline=None)
@given(pool=pools, seed=seeds)
def test_an_item_has_one_role_in_the_whole_federation(kind, pool, seed):
    rows = rows_by_split(small(kind).split(pool, seed))
    item = np.arange(len(pool)) if pool.item is None else pool.item
    train, validation, test = (set(item[rows[split]].tolist()) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


@each_kind
@settings(max_examples=15, deadline=None)
@given(pool=pools, seed=seeds)
def test_a_row_is_dealt_out_once_except_the_shared_test_of_domains(kind, pool, seed):
    rows = rows_by_split(small(kind).split(pool, seed))
    once = np.concatenate([rows["train"], rows["validation"]] + ([] if kind == "domain" else [rows["test"]]))
    assert len(np.unique(once)) == len(once)


@each_kind
@settings(max_examples=10, deadline=None)
@given(pool=pools, seed=seeds)
def test_same_seed_is_same_partition_and_another_seed_another(kind, pool, seed):
    first, again, other = (small(kind).split(pool, s).sha256() for s in (seed, seed, seed + 1))
    assert first == again
    assert first != other


@each_kind
@settings(max_examples=5, deadline=None)
@given(pool=pools, seed=seeds)
def test_a_saved_partition_is_read_back_whole(kind, pool, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("partition") / "partition.json"
    partition = small(kind).split(pool, seed)
    partition.save(path)
    loaded = Partition.load(path)
    assert loaded.sha256() == partition.sha256()
    assert deal(pool, loaded).sha256() == deal(pool, partition).sha256()
    loaded.save(path)
    assert Partition.load(path).sha256() == partition.sha256()


@each_kind
@settings(max_examples=5, deadline=None)
@given(pool=pools, seed=seeds)
def test_dealt_labels_are_the_pools_after_relabelling(kind, pool, seed):
    partition = small(kind).split(pool, seed)
    for part, client in zip(partition.clients, deal(pool, partition).clients, strict=True):
        names = part.relabel or range(len(pool.class_names))
        for split in SPLITS:
            expected = [names[pool.targets[row]] for row in part.split(split)]
            assert getattr(client, split).targets.tolist() == expected


@each_kind
def test_every_split_that_was_asked_for_has_items(kind):
    for client in small(kind).split(random_pool(copies=2), 0).clients:
        assert min(len(client.split(split)) for split in SPLITS) > 0


@each_kind
def test_a_split_that_was_not_asked_for_is_empty(kind):
    for client in small(kind, validation=0).split(random_pool(copies=2), 0).clients:
        assert len(client.validation) == 0
        assert len(client.test) > 0


@each_kind
@settings(max_examples=25, deadline=None)
@given(
    pool=st.builds(random_pool, n=st.integers(3, 60), num_classes=st.integers(1, 20), copies=st.sampled_from([1, 3])),
    clients=st.integers(1, 30),
    alpha=st.sampled_from([1e-3, 0.1, 100.0]),
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
)
def test_a_request_ends_with_a_partition_or_a_message_with_numbers(kind, pool, clients, alpha, sizes):
    sized = dict(zip(SPLITS, sizes, strict=True)) if "train" in PARTITIONS[kind].cls.__dataclass_fields__ else SHARES
    table = {
        "clients": clients,
        "clients_per_domain": clients,
        "clients_per_task": clients,
        "alpha": alpha,
        "min_examples": 3,
        "groups": 1,
    }
    try:
        partition = small(kind, **table, **sized, classes_per_group=2, classes_per_client=1).split(pool, 0)
    except DataError as error:
        assert any(letter.isdigit() for letter in str(error))  # noqa: PT017 - either outcome is right
    else:
        assert min(len(client.train) for client in partition.clients) > 0


def per_client(partition):
    return np.array([[len(client.split(split)) for split in SPLITS] for client in partition.clients])


@pytest.mark.parametrize("kind", ["iid", "permuted", "class-clusters", "rotations", "pathological"])
@settings(max_examples=10, deadline=None)
@given(pool=pools, seed=seeds)
def test_clients_of_even_kinds_have_exactly_what_was_asked_for(kind, pool, seed):
    assert (per_client(small(kind).split(pool, seed)) == [12, 6, 12]).all()


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
@settings(max_examples=20, deadline=None)
@given(pool=pools, seed=seeds, floor=st.integers(3, 20))
def test_clients_of_uneven_kinds_keep_the_floor(kind, pool, seed, floor):
    assert per_client(small(kind, min_examples=floor).split(pool, seed)).sum(axis=1).min() >= floor


@pytest.mark.parametrize("copies", [1, 2])
def test_all_of_a_pool_can_be_dealt_out_by_quantity(copies):
    pool = random_pool(n=600, copies=copies)
    dealt = per_client(small("quantity", total=540).split(pool, 3))
    assert dealt.sum() == 540
    assert len(set(dealt.sum(axis=1).tolist())) > 1


def test_dirichlet_without_copies_deals_out_the_whole_pool():
    pool = random_pool(n=900)
    assert per_client(small("dirichlet", total=1.0).split(pool, 0)).sum() == 900


def test_iid_deals_out_the_whole_pool_if_it_fits_exactly():
    pool = random_pool(n=6 * (12 + 6 + 12))
    rows = np.concatenate(list(rows_by_split(small("iid").split(pool, 0)).values()))
    assert sorted(rows.tolist()) == list(range(180))
