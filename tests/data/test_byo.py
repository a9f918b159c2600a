"""Bring your own clients."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import Dataset, TensorDataset

from fedmerge.core.errors import DataError, UsageError
from fedmerge.data.byo import from_arrays, from_dataset, from_frame

SPLITS = ("train", "validation", "test")


def rows(n=20, *, features=3, seed=0, start=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, features)), (np.arange(n) + start) % 2


def sizes(data):
    return {client.name: tuple(len(getattr(client, split).targets) for split in SPLITS) for client in data.clients}


def all_inputs(client):
    return torch.cat([getattr(client, split).inputs for split in SPLITS])


# ---- laws


@settings(max_examples=40, deadline=None)
@given(
    values=hnp.arrays(np.int8, st.tuples(st.integers(8, 60), st.integers(1, 2)), elements=st.integers(0, 5)),
    seed=st.integers(0, 2**32),
)
def test_identical_rows_of_a_client_land_on_one_side(values, seed):
    values = np.concatenate([values, [[7] * values.shape[1], [8] * values.shape[1], [9] * values.shape[1]]])
    data = from_arrays({"a": (values.astype(float), np.arange(len(values)) % 2)}, seed=seed)
    sides = [{tuple(row) for row in getattr(data.clients[0], split).inputs.tolist()} for split in SPLITS]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(6, 80), validation=st.floats(0, 0.4), test=st.floats(0, 0.4), seed=st.integers(0, 2**32))
def test_every_row_is_used_once_and_wanted_splits_have_rows(n, validation, test, seed):
    inputs, labels = rows(n)
    data = from_arrays({"a": (inputs, labels)}, validation=validation, test=test, seed=seed)
    used = sorted(all_inputs(data.clients[0]).tolist())
    assert used == sorted(torch.tensor(inputs, dtype=torch.float32).tolist())
    train, val, tst = sizes(data)["a"]
    assert train > 0
    assert (val > 0) == (validation > 0)
    assert (tst > 0) == (test > 0)


def test_clients_are_ordered_by_name_however_they_are_given():
    first = from_arrays({"b": rows(seed=1), "a": rows(seed=2)})
    second = from_arrays({"a": rows(seed=2), "b": rows(seed=1)})
    assert [client.name for client in first.clients] == ["a", "b"]
    assert first.sha256() == second.sha256()


def test_a_new_client_does_not_change_the_split_of_the_others():
    alone = from_arrays({"b": rows(seed=1)})
    joined = from_arrays({"b": rows(seed=1), "a": rows(seed=2)})
    assert torch.equal(alone.clients[0].test.inputs, joined.clients[1].test.inputs)


def test_same_seed_is_same_split_and_another_seed_another():
    hashes = [from_arrays({"a": rows(40)}, seed=seed).sha256() for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_minus_zero_is_zero():
    inputs = np.array([[0.0], [-0.0]] * 5 + [[1.0], [2.0]])
    client = from_arrays({"a": (inputs, [0, 1] * 6)}).clients[0]
    assert len({split for split in SPLITS if 0.0 in getattr(client, split).inputs}) == 1


# ---- arrays


def test_twenty_rows_are_cut_into_fourteen_three_three():
    assert sizes(from_arrays({"a": rows(20)})) == {"a": (14, 3, 3)}


def test_a_list_of_clients_is_named_by_number():
    assert [client.name for client in from_arrays([rows()] * 11).clients][8:] == ["client-08", "client-09", "client-10"]


def test_clients_may_bring_their_own_splits():
    own = from_arrays(
        {"a": (rows(9), rows(2, seed=1), rows(4, seed=2)), "b": {"train": rows(10), "test": rows(5, seed=1)}}
    )
    assert sizes(own) == {"a": (9, 2, 4), "b": (8, 2, 5)}  # of ten rows, 8.5 are to stay: the ninth


def test_rows_that_a_client_brings_on_both_sides_are_logged(caplog):
    with caplog.at_level(logging.WARNING):
        from_arrays({"a": {"train": rows(10), "validation": rows(4, seed=1), "test": rows(3)}})
    assert "client 'a': 3 of its test rows are among its train rows" in caplog.text


def test_text_labels_are_numbered_in_sorted_order():
    data = from_arrays({"a": (rows(4)[0], ["dog", "cat", "dog", "cow"])}, validation=0, test=0)
    assert data.class_names == ("cat", "cow", "dog")
    assert data.clients[0].train.targets.tolist() == [2, 0, 2, 1]


def test_class_names_decide_the_numbers_of_texts():
    data = from_arrays({"a": (rows(3)[0], ["b", "a", "b"])}, validation=0, test=0, class_names=("c", "b", "a"))
    assert data.class_names == ("c", "b", "a")
    assert data.clients[0].train.targets.tolist() == [1, 2, 1]


def test_class_names_that_are_numbers_are_names():
    data = from_arrays({"a": (rows(3)[0], ["0", "1", "1"])}, validation=0, test=0, class_names=("1", "0"))
    assert data.clients[0].train.targets.tolist() == [1, 0, 0]


def test_texts_that_are_all_numbers_are_class_numbers():
    """Sorted as texts, 10 would come before 2."""
    data = from_arrays({"a": (rows(11)[0], [str(k) for k in range(11)])}, validation=0, test=0)
    assert data.clients[0].train.targets.tolist() == list(range(11))


def test_classes_that_nobody_has_may_be_named():
    data = from_arrays({"a": (rows(4)[0], [0, 2, 0, 2])}, validation=0, test=0, class_names=("x", "y", "z"))
    assert data.num_classes == 3


def test_tensors_lists_and_other_number_types_become_float32():
    inputs, labels = rows(10)
    hashes = {
        from_arrays({"a": (kind, label)}).sha256()
        for kind, label in [
            (inputs.astype(np.float32), labels),
            (torch.tensor(inputs, dtype=torch.float32, requires_grad=True), torch.tensor(labels)),
            (inputs.astype(np.float32).tolist(), labels.astype(float).tolist()),
        ]
    }
    assert len(hashes) == 1


def test_uint8_images_are_normalised_over_all_train_rows():
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 4), dtype=np.uint8)
    data = from_arrays({"a": (images[:20], [0, 1] * 10), "b": (images[20:], [0, 1] * 10)})
    train = torch.cat([client.train.inputs for client in data.clients])
    assert train.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (train.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_standardise_uses_the_train_rows_of_all_clients():
    """Train values 0 and 2 at one client, 4 and 6 at the other: mean 3, deviation sqrt(5); 3 becomes 0."""

    def client(*values):
        return ([[float(v), 7.0] for v in values], [0, 1]), ([[3.0, 7.0]], [0]), ([[8.0, 7.0]], [1])

    data = from_arrays({"a": client(0, 2), "b": client(4, 6)}, standardise=True)
    assert data.clients[0].validation.inputs.tolist() == [[0.0, 0.0]]  # the second column is constant
    torch.testing.assert_close(data.clients[1].test.inputs, torch.tensor([[5 / 5**0.5, 0.0]]))


def test_inputs_are_not_scaled_unless_asked():
    data = from_arrays({"a": ([[5.0], [7.0]], [0, 1])}, validation=0, test=0)
    assert data.clients[0].train.inputs.tolist() == [[5.0], [7.0]]


BAD_CLIENTS = {
    "ragged": (([[1.0], [1.0, 2.0]], [0, 1]), "'a', train: inputs are not an array"),
    "objects": ((np.array([[None], [1]]), [0, 1]), "inputs are Python objects"),
    "texts": (([["x"], ["y"]], [0, 1]), r"inputs are <U1 \[2, 1\]; expected numbers"),
    "one number per row": (([1.0, 2.0], [0, 1]), r"inputs are float64 \[2\]; expected numbers \[n, features\]"),
    "nan": (([[1.0], [np.nan]], [0, 1]), "client 'a', train, row 1 from 0: got nan; expected a finite number"),
    "too large for float32": (([[1.0], [1e300]], [0, 1]), r"row 1 from 0: got 1e\+300"),
    "missing label": (([[1.0], [2.0]], [0]), r"labels of shape \[1\] for 2 inputs"),
    "one-hot labels": (([[1.0], [2.0]], [[0, 1], [1, 0]]), r"labels of shape \[2, 2\]"),
    "negative label": (([[1.0], [2.0]], [0, -1]), "row 1 from 0: label -1; expected a class number from 0"),
    "half a label": (([[1.0], [2.0]], [0.5, 1]), "row 0 from 0: label 0.5"),
    "nan label": (([[1.0], [2.0]], [0, np.nan]), "row 1 from 0: label nan"),
    "gap": (([[1.0], [2.0]], [0, 7]), "labels go up to 7 but no row anywhere has label 1.*class_names"),
    "one class": (([[1.0], [2.0]], [0, 0]), "every row has the class '0'; expected two classes"),
    "single row": (([[1.0]], [0]), "every row has the class|client 'a' has 1 rows"),
    "too few different rows": (
        ([[1.0]] * 3, [0, 1, 0]),
        "has 3 rows, 1 of them different: too few to give one to valid",
    ),
    "not a pair": ((1, 2, 3, 4), r"client 'a', train: got a tuple; expected \(inputs, labels\)"),
    "unknown split": ({"train": rows(), "validate": rows()}, "unknown split 'validate'; did you mean 'validation'"),
    "no train": ({"test": rows()}, "client 'a' has no train rows"),
    "flat uint8": ((np.eye(9, dtype=np.uint8), [0, 1, 0] * 3), "uint8 inputs of shape .* expected images"),
}


@pytest.mark.parametrize("what", sorted(BAD_CLIENTS))
def test_a_client_that_cannot_be_used_is_named(what):
    client, message = BAD_CLIENTS[what]
    with pytest.raises(DataError, match=message):
        from_arrays({"a": client})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            rows(features=4),
            r"client 'b', train: inputs are float32 \[4\]; expected float32 \[3\] as in client 'a', train$",
        ),
        ((rows()[0], ["x", "y"] * 10), "labels are numbers in client 'a', train and texts in client 'b', train"),
        ((rows(2)[0], [0, 1]), "client 'b' has 2 rows, 2 of them different: too few to give one to"),
    ],
)
def test_clients_that_do_not_fit_together_are_named(other, message):
    with pytest.raises(DataError, match=message):
        from_arrays({"a": rows(), "b": other})


@pytest.mark.parametrize(
    ("first", "then", "hint"),
    [
        (np.uint8, np.float32, r"give whole numbers 0..255, \(255 \* x\).round\(\).astype\('uint8'\) for x in 0..1$"),
        (np.float32, np.uint8, "give the floats that those were made into, scaled alike$"),
    ],
)
def test_images_of_two_types_are_told_how_to_become_one(first, then, hint):
    images, labels = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4)), [0, 1] * 10
    with pytest.raises(DataError, match=hint):
        from_arrays({"a": (images.astype(first), labels), "b": (images.astype(then), labels)})


def test_an_unknown_text_label_is_named():
    with pytest.raises(
        DataError, match=r"client 'a', train, row 1 from 0: unknown class 'dgo'; did you mean 'dog'\? Known"
    ):
        from_arrays({"a": ([[1.0], [2.0]], ["dog", "dgo"])}, class_names=("cat", "dog"))


def test_a_class_number_beyond_the_names_is_named():
    with pytest.raises(DataError, match=r"row 1 from 0: label 2; expected 0\.\.1, the classes named"):
        from_arrays({"a": ([[1.0], [2.0]], [0, 2])}, class_names=("cat", "dog"))


def test_names_that_are_one_text_are_refused():
    with pytest.raises(DataError, match="two clients have one name"):
        from_arrays({1: rows(), "1": rows()})


@pytest.mark.parametrize("name", ["a\nb", "a\x00", "\udcff"])
def test_names_that_no_file_can_hold_are_refused(name):
    with pytest.raises(DataError, match="expected a name of printable characters"):
        from_arrays({name: rows()})


def test_no_clients_and_shares_without_training_are_refused():
    with pytest.raises(DataError, match="no clients at all"):
        from_arrays({})
    with pytest.raises(UsageError, match=r"validation = 0\.5 and test = 0.5; expected shares"):
        from_arrays({"a": rows()}, validation=0.5, test=0.5)
    with pytest.raises(UsageError, match="validation = nan"):
        from_arrays({"a": rows()}, validation=float("nan"))


# ---- datasets and frames


def test_a_dataset_is_split_by_user():
    inputs, labels = (
        torch.tensor(part, dtype=kind) for part, kind in zip(rows(30), (torch.float32, torch.int64), strict=True)
    )
    dataset = TensorDataset(inputs, labels)
    by_list = from_dataset(dataset, ["odd" if index % 2 else "even" for index in range(30)], test=0)
    by_function = from_dataset(dataset, lambda index: ("even", "odd")[index % 2], test=0)
    assert by_list.sha256() == by_function.sha256()
    assert sorted(all_inputs(by_list.clients[1]).tolist()) == sorted(inputs[1::2].tolist())


class Pictures(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_pil_images_become_channel_first():
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 5, 3), dtype=np.uint8)
    dataset = Pictures(*((image.fromarray(picture), index % 2) for index, picture in enumerate(pixels)))
    data = from_dataset(dataset, [0] * 8, validation=0, test=0)
    assert data.input_shape == (3, 4, 5)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    normalised = (expected - expected.mean(dim=(0, 2, 3), keepdim=True)) / expected.std(
        dim=(0, 2, 3), keepdim=True, correction=0
    )
    torch.testing.assert_close(data.clients[0].train.inputs, normalised, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("dataset", "users", "message"),
    [
        (Pictures(([1.0], 0), ([2.0], 1)), ["a"], "users has 1 entries for 2 items"),
        (Pictures(([1.0], 0), [2.0]), ["a", "a"], r"item 1: got a list; expected a pair \(input, label\)"),
        (Pictures(([1.0], 0), ([2.0, 3.0], 1)), ["a", "a"], "client 'a': inputs are not an array"),
        (iter([([1.0], 0)]), ["a"], "has no length"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(dataset, users, message):
    with pytest.raises(DataError, match=message):
        from_dataset(dataset, users)


def frame(n=12):
    inputs, labels = rows(n, features=2)
    return pd.DataFrame({"site": [f"s{i % 2}" for i in range(n)], "x0": inputs[:, 0], "y": labels, "x1": inputs[:, 1]})


def test_a_frame_is_split_by_its_user_column():
    given_frame = frame()
    data = from_frame(given_frame, "site", "y", validation=0, test=0)
    assert [client.name for client in data.clients] == ["s0", "s1"]
    mine = given_frame[given_frame.site == "s1"]
    expected = torch.tensor(mine[["x0", "x1"]].to_numpy(), dtype=torch.float32)
    assert sorted(data.clients[1].train.inputs.tolist()) == sorted(expected.tolist())


def test_users_that_look_alike_as_texts_are_one_client():
    given_frame = frame().assign(site=[1, "1"] * 6)
    assert sizes(from_frame(given_frame, "site", "y", validation=0, test=0)) == {"1": (12, 0, 0)}


BAD_FRAMES = {
    "no user column": (lambda f: f.drop(columns="site"), "has 0 columns called 'site'; expected one among x0, y, x1"),
    "no label column": (lambda f: f.drop(columns="y"), "unknown label column 'y'"),
    "no user": (lambda f: f.assign(site=[None, *["a"] * 11]), "row 0 from 0: no user in column 'site'"),
    "text column": (lambda f: f.assign(x1="high"), "client 's0', column 'x1' holds .*; expected numbers"),
    "missing number": (lambda f: f.assign(x0=[*range(11), None]), "client 's1', row 11 from 0, column 'x0': got nan"),
    "missing label": (
        lambda f: f.assign(y=[*[0, 1] * 5, 0, None]),
        "client 's1', row 11 from 0, column 'y': the label is mis",
    ),
    "no inputs": (lambda f: f[["site", "y"]], "has only its label column"),
    "two of a name": (lambda f: f.set_axis(["site", "x", "y", "x"], axis=1), "two columns are called 'x'"),
}


@pytest.mark.parametrize("what", sorted(BAD_FRAMES))
def test_a_frame_that_cannot_be_used_is_refused(what):
    change, message = BAD_FRAMES[what]
    with pytest.raises(DataError, match=message):
        from_frame(change(frame()), "site", "y")


def test_nullable_and_categorical_columns_are_understood():
    given_frame = frame().astype({"x0": "Float64", "y": "Int64", "site": "category"})
    assert from_frame(given_frame, "site", "y").sha256() == from_frame(frame(), "site", "y").sha256()
