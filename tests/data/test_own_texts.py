"""Bring your own texts: lists, files with a column of texts, and clients with different tasks."""

import numpy as np
import pandas as pd
import pytest
import torch
from encoders import Letters, padded
from hypothesis import given
from hypothesis import strategies as st

import fedmerge
from fedmerge.core.errors import DataError, UsageError
from fedmerge.data.byo import FolderOptions, from_arrays, from_folder, from_texts
from fedmerge.data.encoding import NO_TARGET
from fedmerge.data.form import TOKENS
from fedmerge.data.own_texts import _joined, learned_from, tasks_by_label
from fedmerge.data.table import Table, text_table

WHOLE = {"validation": 0, "test": 0}
TEN = tuple("abcdefghij")


def two(ann=("yes", "no"), ben=("yes", "no")):
    """Two clients of ten texts each, labelled in turn."""
    return {name: (TEN, [labels[k % len(labels)] for k in range(10)]) for name, labels in (("ann", ann), ("ben", ben))}


# ---------------------------------------------------------------------------------------- lists


def test_texts_become_tokens_and_labels_numbers():
    data = from_texts({"ann": (["ab", "c"], ["yes", "no"]), "ben": (["d"], ["no"])}, Letters(), **WHOLE)
    assert data.class_names == ("no", "yes")
    assert data.clients[0].train.inputs.tolist() == [padded(0, 1), padded(2)]
    assert [client.train.targets.tolist() for client in data.clients] == [[1, 0], [0]]
    assert data.clients[0].train.inputs.dtype == torch.int64
    assert (data.kind, data.form.dtype, data.form.shape, data.source) == (
        "classes",
        TOKENS,
        (6,),
        "your texts, 2 clients",
    )
    assert (data.class_tasks, data.tasks, data.groups) == ((), None, None)


def test_from_texts_is_in_the_package():
    assert fedmerge.from_texts is from_texts


def test_absent_splits_are_cut_and_given_ones_kept():
    clients = {"ann": {"train": (TEN, [0, 1] * 5), "test": (["zz"], [1])}}
    (client,) = from_texts(clients, Letters()).clients
    assert client.test.inputs.tolist() == [padded(25, 25)]
    assert len(client.train.targets) + len(client.validation.targets) == 10
    assert len(client.validation.targets) > 0


def test_texts_with_the_same_tokens_are_on_one_side():
    """ "a!" and "a" are one row to the model, so they may not be trained and tested on."""
    texts = [letter + mark for letter in TEN for mark in ("", "!", "?")]
    (client,) = from_texts({"ann": (texts, [0, 1, 0] * 10)}, Letters()).clients
    sides = [set(map(tuple, getattr(client, split).inputs.tolist())) for split in ("train", "validation", "test")]
    assert sum(map(len, sides)) == 10
    assert not set.intersection(*sides)
    assert min(map(len, sides)) > 0


def test_the_cut_depends_on_the_seed_and_the_name():
    hashes = {from_texts({name: (TEN, [0, 1] * 5)}, Letters(), seed=seed).sha256() for name in "ab" for seed in (0, 1)}
    assert len(hashes) == 4


def test_tags_and_completions_have_targets_for_tokens():
    tagged = from_texts({"ann": (["a b", "c"], ["D N", "N"])}, Letters("tags"), **WHOLE)
    assert (tagged.kind, tagged.class_names) == ("tags", ("D", "N"))
    assert tagged.clients[0].train.targets.tolist() == [
        padded(0, 1, fill=NO_TARGET),
        padded(1, fill=NO_TARGET),
    ]
    completed = from_texts({"ann": (["ab", "c"], ["d", "e"])}, Letters("completions"), **WHOLE)
    assert (completed.kind, completed.class_names) == ("completions", ("text",))
    assert completed.clients[0].train.targets[0].tolist() == padded(NO_TARGET, NO_TARGET, 3, fill=NO_TARGET)


def test_all_clients_share_the_names_of_tags():
    data = from_texts({"ann": (["a"], ["V"]), "ben": (["b"], ["N"])}, Letters("tags"), **WHOLE)
    assert data.class_names == ("N", "V")
    assert [int(client.train.targets[0, 0]) for client in data.clients] == [1, 0]


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ((["a", 3.5], [0, 1]), "client 'ann', train, row 1 from 0: got a float; expected a text"),
        ((["a", "b"], [0]), r"client 'ann', train: labels of shape \[1\] for 2 texts; expected one label for each"),
        ((["a", "b"], [[0], [1]]), r"labels of shape \[2, 1\] for 2 texts"),
        (
            (["a", " "], [0, 1]),
            "client 'ann', train, row 1 from 0, column 'text' is empty; expected a text in every row",
        ),
        ((["a", "b"], ["x", ""]), "client 'ann', train, row 1 from 0, column 'label' is empty"),
        ((["a", "b"], [0.0, np.nan]), "row 1 from 0, column 'label': the label is missing; expected a class"),
        ((["a", "b"], [0, 0.5]), "client 'ann', train, row 1 from 0: label 0.5; expected a class number from 0"),
        ((["a", "!"], [0, 1]), "client 'ann', train, row 1 from 0: got '!', in which no letter is known"),
        ((["a", "b"], ["x", "x"]), "your texts: every row has the class 'x'; expected two classes at least"),
        ((["a", "b"], [0, None]), "client 'ann', train: labels are Python objects"),
        ("ab", r"client 'ann', train: got a str; expected \(inputs, labels\)"),
        ({"tarin": (["a"], [0])}, "client 'ann': unknown split 'tarin'; did you mean 'train'"),
    ],
)
def test_what_cannot_be_used_is_named(client, message):
    with pytest.raises(DataError, match=message):
        from_texts({"ann": client}, Letters(), **WHOLE)


def test_a_tag_too_few_is_named_with_its_client_and_row():
    with pytest.raises(DataError, match="client 'ann', train, row 1 from 0: 2 words and 1 tags"):
        from_texts({"ann": (["a", "b c"], ["N", "N"])}, Letters("tags"), **WHOLE)


def test_a_class_that_was_not_named_is_refused():
    with pytest.raises(DataError, match="client 'ann', train, row 1 from 0: unknown class 'no'"):
        from_texts(two(), Letters(), class_names=("yes", "maybe"), **WHOLE)


def test_numbers_go_on_as_they_are_whatever_the_model_reads():
    table = Table("toy", np.zeros((2, 3), dtype=np.float32), np.array([0, 1]))
    found = learned_from([table], Letters(), None)
    assert (found.are_tokens, found.kind, found.class_names) == (False, "classes", ("0", "1"))
    assert found.inputs[0] is table.inputs


def test_texts_without_a_language_model_are_refused():
    with pytest.raises(DataError, match="client 'ann' holds texts, which this network cannot read"):
        learned_from([text_table("client 'ann'", ["a", "b"], [0, 1])], None, None)


# ---------------------------------------------------------------------------------------- tasks by label


@given(st.lists(st.sets(st.integers(0, 8), min_size=1), min_size=1, max_size=8))
def test_joined_sets_are_disjoint_and_no_set_is_parted(sets):
    parts = _joined(sets)
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(set.union(*sets))
    assert all(sum(own <= part for part in parts) == 1 for own in sets)
    assert parts == sorted(parts, key=min)


@given(st.lists(st.sets(st.integers(0, 8), min_size=1), min_size=1, max_size=8))
def test_joined_sets_are_no_larger_than_they_must_be(sets):
    """Every part is one set, or falls apart into sets that are linked one by one."""
    for part in _joined(sets):
        members = [own for own in sets if own <= part]
        reached = members[0]
        for _ in members:
            reached = reached.union(*(own for own in members if own & reached))
        assert reached == part


def test_clients_without_a_common_label_have_different_tasks():
    data = from_texts(two(ann=("good", "bad"), ben=("ham", "spam")), Letters(), tasks="by-label")
    assert data.class_names == ("bad", "good", "ham", "spam")
    assert data.class_tasks == ("bad / good", "bad / good", "ham / spam", "ham / spam")
    assert data.tasks == ("bad / good", "ham / spam")
    assert data.groups == (0, 1)


def test_labels_join_clients_through_others():
    clients = two(ann=("a", "b"), ben=("c", "d")) | {"cid": (TEN, ["b", "c"] * 5), "dan": (TEN, ["x", "y"] * 5)}
    data = from_texts(clients, Letters(), tasks="by-label")
    assert data.tasks == ("a / b", "a / b", "a / b", "x / y")
    assert data.groups == (0, 0, 0, 1)


def test_labels_of_every_split_count():
    """Ann meets ham in her test alone, which makes one task of both."""
    clients = two(ann=("good", "bad"), ben=("ham", "spam"))
    clients["ann"] = {"train": clients["ann"], "test": (["zz"], ["ham"])}
    data = from_texts(clients, Letters(), tasks="by-label")
    assert (data.class_tasks, data.tasks) == ((), None)


def test_a_class_that_nobody_has_is_of_no_task():
    names = ("bad", "good", "ham", "odd", "spam")
    data = from_texts(two(("good", "bad"), ("ham", "spam")), Letters(), tasks="by-label", class_names=names)
    assert data.class_tasks == ("bad / good", "bad / good", "ham / spam", "unused", "ham / spam")


def test_one_task_unless_told_otherwise():
    data = from_texts(two(("good", "bad"), ("ham", "spam")), Letters())
    assert (data.class_tasks, data.tasks, data.groups) == ((), None, None)


def test_tags_have_no_tasks_by_label():
    data = from_texts({"ann": (["a"], ["V"]), "ben": (["b"], ["N"])}, Letters("tags"), tasks="by-label", **WHOLE)
    assert tasks_by_label(data) is data
    assert data.tasks is None


def test_numbers_have_tasks_by_label_too():
    rows = np.arange(20.0).reshape(10, 2)
    data = tasks_by_label(from_arrays({"ann": (rows, ["a", "b"] * 5), "ben": (rows, ["c", "d"] * 5)}))
    assert data.tasks == ("a / b", "c / d")


# ---------------------------------------------------------------------------------------- files

TEXT = "id,text,label\n" + "".join(
    f'{k},"{letter}, {letter}",{"no" if k % 2 else "yes"}\n' for k, letter in enumerate(TEN)
)


def frame(**changes):
    columns = {"id": range(10), "text": [f"{letter}, {letter}" for letter in TEN], "label": ["yes", "no"] * 5}
    return pd.DataFrame({**columns, **changes})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "north.csv").write_text(TEXT)
    return tmp_path


def read(folder, encoder=None, **options):
    return from_folder(folder, encoder=encoder or Letters(), text_column="text", **options)


def test_files_of_both_kinds_hold_the_same_texts(folder):
    frame().to_parquet(folder / "south.parquet")
    north, south = read(folder, **WHOLE).clients
    assert north.train.inputs.tolist() == south.train.inputs.tolist() == [padded(k, k) for k in range(10)]
    assert north.train.targets.tolist() == south.train.targets.tolist() == [1, 0] * 5


def test_a_folder_is_what_the_same_lists_are(folder):
    texts, labels = [f"{letter}, {letter}" for letter in TEN], ["yes", "no"] * 5
    assert read(folder, seed=4).sha256() == from_texts({"north": (texts, labels)}, Letters(), seed=4).sha256()


def test_further_columns_do_not_count(folder):
    without = read(folder).sha256()
    (folder / "north.csv").write_text(TEXT.replace("id,", "id,").replace("\n1,", "\nanything,"))
    assert read(folder).sha256() == without


def test_options_reach_the_files(folder):
    (folder / "north.csv").write_text(TEXT.replace("text,label", "says,kind"))
    options = FolderOptions(str(folder), label_column="kind", text_column="says", class_names=("yes", "no"))
    assert from_folder(options, encoder=Letters()).class_names == ("yes", "no")


def test_tasks_by_label_reach_the_clients(folder):
    (folder / "south.csv").write_text(TEXT.replace("yes", "ham").replace("no", "spam"))
    assert read(folder, tasks="by-label").tasks == ("no / yes", "ham / spam")
    assert read(folder).tasks is None


def test_completions_are_read_from_the_label_column(folder):
    data = read(folder, Letters("completions"), **WHOLE)
    assert data.kind == "completions"
    assert data.clients[0].train.inputs[0].tolist() == padded(0, 0, 24, 4, 18)  # "a, a" then "yes"


BAD_CSV = {
    "no text column": ("id,label\n1,yes\n", "bad.csv: unknown column 'text'"),
    "no label column": ("id,text\n1,a\n", "bad.csv: unknown column 'label'"),
    "text column twice": ("text,text,label\na,b,yes\n", "bad.csv: 2 columns are called 'text'; expected one"),
    "short row": (TEXT + "11,k\n", "bad.csv, line 12: 2 cells; expected 3 as in the header"),
    "long row": (TEXT + "11,k,yes,no\n", "bad.csv, line 12: 4 cells; expected 3"),
    "no text": (TEXT + "11, ,yes\n", "bad.csv, line 12, column 'text' is empty; expected a text in every row"),
    "no label": (TEXT + "11,k,\n", "bad.csv, line 12, column 'label' is empty; expected a text in every row"),
    "no letter": (TEXT + "\n\n11,!,yes\n", "bad.csv, line 14: got '!', in which no letter is known"),
    "header only": ("id,text,label\n", "bad.csv has no rows below its header"),
    "open quote": (TEXT + '11,"k,yes\n', "bad.csv cannot be read"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_csv_file_that_cannot_be_used_is_named_with_its_line(tmp_path, case):
    text, message = BAD_CSV[case]
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


BAD_PARQUET = {
    "no text column": ({"text": None}, "bad.parquet, row 0 from 0, column 'text' is empty"),
    "a text missing": ({"text": ["a", None, *TEN[2:]]}, "bad.parquet, row 1 from 0, column 'text' is empty"),
    "a label missing": ({"label": ["yes", "no", None, *["no"] * 7]}, "bad.parquet, row 2 from 0, column 'label' is"),
    "a number missing": ({"label": [0, 1, np.nan, *[1] * 7]}, "row 2 from 0, column 'label': the label is missing"),
    "no letter": ({"text": ["a", "b", "?", *TEN[3:]]}, "bad.parquet, row 2 from 0: got '.', in which no letter"),
}


@pytest.mark.parametrize("case", BAD_PARQUET)
def test_a_parquet_file_that_cannot_be_used_is_named_with_its_row(tmp_path, case):
    changes, message = BAD_PARQUET[case]
    frame(**changes).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_columns_of_any_type_are_read_as_texts(tmp_path):
    """Categories, and numbers of which one is missing, are no texts to pandas."""
    labels = pd.Categorical(["yes", "no"] * 5)
    frame(text=pd.Categorical(TEN), label=labels).to_parquet(tmp_path / "a.parquet")
    (client,) = read(tmp_path, **WHOLE).clients
    assert client.train.inputs.tolist() == [padded(k) for k in range(10)]
    assert client.train.targets.tolist() == [1, 0] * 5
    frame(text=[1.5, *[np.nan] * 9]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1 from 0, column 'text' is empty"):
        read(tmp_path)


def test_labels_may_be_numbers_in_one_file_and_texts_in_another(folder):
    (folder / "north.csv").write_text(TEXT.replace("yes", "1").replace("no", "0"))
    frame(label=[1, 0] * 5).to_parquet(folder / "south.parquet")
    north, south = read(folder, **WHOLE).clients
    assert north.train.targets.tolist() == south.train.targets.tolist() == [1, 0] * 5


def test_texts_in_npz_files_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 2)), y=np.arange(2))
    with pytest.raises(DataError, match=r"a.npz: texts are read from .csv and .parquet files"):
        read(tmp_path)


def test_a_folder_of_texts_without_a_language_model_is_refused(folder):
    with pytest.raises(DataError, match=r"north.csv holds texts, which this network cannot read"):
        from_folder(folder, text_column="text")


def test_texts_have_no_scale():
    with pytest.raises(UsageError, match=r"FolderOptions.standardise: got true for texts, which have no scale"):
        FolderOptions("clients", text_column="text", standardise=True)
