"""Bring your own clients as files."""

import logging
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch

from fedmerge.core.errors import DataError, UsageError
from fedmerge.data.byo import FolderOptions, from_folder

HEADER = "height,width,label\n"
GOOD = HEADER + "".join(f"{index}.5,{index * index},{'cat' if index % 2 else 'dog'}\n" for index in range(10))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "north.csv").write_text(GOOD)
    return tmp_path


def write_npz(path, **arrays):
    np.savez(path, **({"x": np.arange(20.0).reshape(10, 2), "y": np.arange(10) % 2} | arrays))


def test_one_file_of_each_kind_is_one_federation(folder):
    inputs = np.arange(20.0).reshape(10, 2)
    write_npz(folder / "south.npz", y=np.array(["cat", "dog"] * 5))
    pd.DataFrame({"label": ["cow", "cat"] * 5, "width": inputs[:, 1], "height": inputs[:, 0]}).to_parquet(
        folder / "east.parquet"
    )
    data = from_folder(folder, seed=3)
    assert [client.name for client in data.clients] == ["east", "north", "south"]
    assert data.class_names == ("cat", "cow", "dog")
    assert data.source == f"{folder}, 3 clients"
    assert from_folder(FolderOptions(str(folder)), seed=3).sha256() == data.sha256()


def test_columns_are_matched_by_name_not_by_place(folder):
    (folder / "south.csv").write_text("label,width,height\ncat,100,1\ndog,200,2\n")
    south = from_folder(folder, validation=0, test=0).clients[1]
    assert south.train.inputs.tolist() == [[1.0, 100.0], [2.0, 200.0]]


def test_an_npz_may_bring_its_own_splits(tmp_path):
    write_npz(tmp_path / "a.npz", x_test=np.full((3, 2), 99.0), y_test=np.array([0, 1, 1]))
    client = from_folder(tmp_path).clients[0]
    assert client.test.inputs.tolist() == [[99.0, 99.0]] * 3
    assert len(client.train.targets) + len(client.validation.targets) == 10


def test_blank_lines_spaces_quotes_and_a_byte_order_mark_are_understood(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffx, label\r\n1, "a, b"\r\n\r\n 2 ,c\r\n'.encode())
    data = from_folder(tmp_path, validation=0, test=0)
    assert data.class_names == ("a, b", "c")
    assert data.clients[0].train.inputs.tolist() == [[1.0], [2.0]]


def test_options_reach_the_files(folder):
    (folder / "north.csv").write_text(GOOD.replace("label", "animal"))
    options = FolderOptions(str(folder), label_column="animal", standardise=True, class_names=("dog", "bird", "cat"))
    data = from_folder(options)
    assert data.class_names == ("dog", "bird", "cat")
    assert data.clients[0].train.inputs.mean(dim=0).abs().max() < 1e-6
    with pytest.raises(UsageError, match="got FolderOptions and test; put them into the options"):
        from_folder(options, test=0.5)


BAD_CSV = {
    "empty": ("", r"bad.csv has no rows below its header"),
    "header only": (HEADER, "bad.csv has no rows below its header"),
    "short row": (HEADER + "1,2,cat\n1,cat\n", "bad.csv, line 3: 2 cells; expected 3 as in the header"),
    "long row": (HEADER + "1,2,cat,4\n", "bad.csv, line 2: 4 cells; expected 3"),
    "no number": (HEADER + "1,2,cat\n\n1,tall,cat\n", "bad.csv, line 4, column 'width': got 'tall'; expected a number"),
    "thousands": (HEADER + "1_000,2,cat\n", "line 2, column 'height': got '1_000'"),
    "empty cell": (HEADER + ",2,cat\n", "line 2, column 'height': got ''; expected a number"),
    "nan": (HEADER + "1,nan,cat\n", "bad.csv, line 2, column 'width': got nan; expected a finite number"),
    "infinite": (HEADER + "1,-inf,cat\n", "line 2, column 'width': got -inf"),
    "empty label": (HEADER + "1,2, \n", "line 2, column 'label': the label is empty"),
    "other label column": ("height,width,labels\n1,2,cat\n", "unknown label column 'label'; did you mean 'labels'"),
    "two of a name": ("height,height,label\n1,2,cat\n", "two columns are called 'height'"),
    "other columns": ("height,depth,label\n1,2,cat\n", r"has not the columns of .*bad|has not the columns of .*north"),
    "only labels": ("label\ncat\n", "has only its label column"),
    "semicolons": (
        "height;width;label\n1,5;2;cat\n",
        r"bad.csv: its columns are separated by ';'; expected commas, and",
    ),
    "tabs": ("height\twidth\tlabel\n1\t2\tcat\n", r"its columns are separated by '\\t'; expected commas"),
    "open quote": (HEADER + '1,"2,cat\n', "bad.csv cannot be read .*; expected a CSV file"),
    "not text": (b"\xff\xfe\x00\x01", "bad.csv cannot be read .*; expected a CSV file in UTF-8"),
    "single row": (
        HEADER + "1,2,cat\n",
        "client 'bad' has 1 rows, 1 of them different: too few to give one to validation and",
    ),
    "same row": (HEADER + "1,2,cat\n" * 9, "client 'bad' has 9 rows, 1 of them different"),
}


@pytest.mark.parametrize("what", sorted(BAD_CSV))
def test_a_bad_csv_file_is_named_with_its_line(what, folder):
    content, message = BAD_CSV[what]
    (folder / "bad.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        from_folder(folder)


def test_a_number_among_texts_is_a_text_and_half_a_class_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x,label\n1,0\n2,1\n3,0.5\n")
    with pytest.raises(DataError, match=r"a.csv, line 4: label 0\.5; expected a class number"):
        from_folder(tmp_path)
    (tmp_path / "a.csv").write_text("x,label\n1,0\n2,1\n3,many\n")
    assert from_folder(tmp_path, validation=0, test=0).class_names == ("0", "1", "many")


class Runs:
    """What unpickling would execute."""

    def __reduce__(self):
        return pytest.fail, ("a file executed code",)


def test_an_npz_with_objects_is_refused_and_not_executed(tmp_path):
    write_npz(tmp_path / "a.npz", x=np.array([Runs()] * 10, dtype=object))
    with pytest.raises(DataError, match=r"a.npz cannot be read \(x\.npy holds Python objects"):
        from_folder(tmp_path)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-30])


def flip(path):
    """Another byte in the middle of x: the archive's checksum tells."""
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(bytes(content))


BAD_NPZ = {
    "empty file": (lambda path: path.write_bytes(b""), "a.npz cannot be read"),
    "not a zip": (lambda path: path.write_bytes(b"hello, world"), "a.npz cannot be read"),
    "cut off": (cut_off, "a.npz cannot be read"),
    "flipped bits": (flip, "a.npz cannot be read"),
    "no labels": (lambda path: np.savez(path, x=np.zeros((3, 2))), "a.npz has no array 'y'; it has x"),
    "half a test": (lambda path: write_npz(path, x_test=np.zeros((3, 2))), "has no array 'y_test'"),
    "unknown array": (lambda path: write_npz(path, z=np.zeros(3)), "unknown array 'z'"),
    "nan": (lambda path: write_npz(path, x=np.full((10, 2), np.nan)), "a.npz, row 0 from 0: got nan"),
    "nan in test": (
        lambda path: write_npz(path, x_test=np.full((1, 2), np.nan), y_test=np.array([0])),
        "a.npz, test, row 0 from 0: got nan",
    ),
    "an array without names": (lambda path: path.write_bytes(single_array()), "a single array under the name of an"),
    "other things in the zip": (lambda path: zipped(path, "x.txt"), "a.npz"),
}


def single_array():
    import io  # noqa: PLC0415 - only here

    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def zipped(path, name):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, "hello")


@pytest.mark.parametrize("what", sorted(BAD_NPZ))
def test_a_bad_npz_file_is_named(what, tmp_path):
    spoil, message = BAD_NPZ[what]
    write_npz(tmp_path / "a.npz")
    spoil(tmp_path / "a.npz")
    with pytest.raises(DataError, match=message):
        from_folder(tmp_path)


def test_a_bad_parquet_file_is_named(folder):
    (folder / "bad.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(DataError, match=r"bad.parquet cannot be read .*; expected a parquet file"):
        from_folder(folder)


def test_two_files_of_one_client_are_refused(folder):
    write_npz(folder / "north.npz")
    with pytest.raises(DataError, match="two files are called 'north' but for their ending"):
        from_folder(folder)


def test_other_files_are_left_alone_and_logged(folder, caplog):
    (folder / "README.md").write_text("hello")
    (folder / ".hidden.csv").write_text("not read")
    (folder / "more").mkdir()
    with caplog.at_level(logging.WARNING):
        assert len(from_folder(folder).clients) == 1
    assert "README.md, more" in caplog.text


def test_a_folder_without_clients_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no .npz, .csv, .parquet file; expected one per client"):
        from_folder(tmp_path)
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        from_folder(tmp_path / "nowhere")


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match=r"FolderOptions\.test: got 1\.5"):
        FolderOptions("x", test=1.5)
    with pytest.raises(UsageError, match="expected shares >= 0 whose sum is below 1"):
        FolderOptions("x", test=0.6, validation=0.4)


def test_inputs_are_float32_and_labels_int64(folder):
    train = from_folder(folder).clients[0].train
    assert (train.inputs.dtype, train.targets.dtype) == (torch.float32, torch.int64)


def test_numbers_in_npz_and_numbers_in_csv_are_the_same_labels(tmp_path):
    features = np.arange(24, dtype=np.float32).reshape(12, 2)
    labels = np.array([0, 1] * 6)
    np.savez(tmp_path / "a.npz", x=features, y=labels)
    frame = pd.DataFrame(features, columns=["u", "v"]).assign(label=labels)
    frame.to_csv(tmp_path / "b.csv", index=False)
    data = from_folder(tmp_path)
    counts = [sum(int((part.targets == 1).sum()) for part in (c.train, c.validation, c.test)) for c in data.clients]
    assert counts == [6, 6]
    assert data.class_names == ("0", "1")


def test_numbers_in_npz_and_names_in_csv_are_refused(tmp_path):
    features = np.arange(24, dtype=np.float32).reshape(12, 2)
    np.savez(tmp_path / "a.npz", x=features, y=np.array([0, 1] * 6))
    pd.DataFrame(features, columns=["u", "v"]).assign(label=["ill", "well"] * 6).to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(DataError, match=r"labels are numbers in .*a\.npz and texts in .*b\.csv"):
        from_folder(tmp_path)
