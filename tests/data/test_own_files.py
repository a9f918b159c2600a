"""One client's examples from one path: files of splits, and images in folders of classes."""

import logging
import struct
import zlib

import numpy as np
import pytest

from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.data.npz import MOST_BYTES
from fedmerge.data.own_files import tables_of_path

Image = pytest.importorskip("PIL.Image")

CSV = "x,label\n1,a\n2,b\n"


def read(path, **options):
    return tables_of_path(path, "label", **options)


def picture(path, grey=0, size=(3, 2), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).convert(mode).save(path)


# --- tables ---


def test_a_file_for_each_split(tmp_path):
    (tmp_path / "train.csv").write_text(CSV)
    (tmp_path / "test.csv").write_text("label,x\nb,9\n")
    np.savez(tmp_path / "validation.npz", x=[[7.0]], y=["a"])
    tables = read(tmp_path)
    assert {split: table.inputs.tolist() for split, table in tables.items()} == {
        "train": [[1.0], [2.0]],
        "validation": [[7.0]],
        "test": [[9.0]],
    }


def test_one_file_may_bring_all_splits(tmp_path):
    np.savez(tmp_path / "train.npz", x=[[1.0]], y=[0], x_test=[[2.0]], y_test=[1])
    assert set(read(tmp_path)) == set(read(tmp_path / "train.npz")) == {"train", "test"}


def test_files_that_are_no_split_are_told(tmp_path, caplog):
    (tmp_path / "train.csv").write_text(CSV)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert set(read(tmp_path)) == {"train"}
    assert "not read, because they are no split: notes.txt" in caplog.text
    assert ".hidden" not in caplog.text


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({}, r"has no train.npz/train.csv/train.parquet and no sub-folders of images; it has nothing"),
        ({"a.csv": CSV}, r"it has a.csv. Call its files train, validation and test, or give one file"),
        ({"test.csv": CSV}, r"has no train.npz/train.csv/train.parquet"),
        ({"train.csv": "x,label\n1,a\noops,a\n"}, r"train.csv, line 3, column 'x': got 'oops'; expected a number"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, files, fault):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=fault):
        read(tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text(CSV)
    np.savez(tmp_path / "train.npz", x=[[1.0]], y=[0])
    with pytest.raises(DataError, match="has train rows in two files; expected one file for each split"):
        read(tmp_path)


def test_a_file_with_splits_beside_another_is_refused(tmp_path):
    np.savez(tmp_path / "train.npz", x=[[1.0]], y=[0], x_test=[[2.0]], y_test=[1])
    (tmp_path / "test.csv").write_text(CSV)
    with pytest.raises(DataError, match=r"train.npz brings train, test, and other files stand beside it"):
        read(tmp_path)


def test_what_is_not_there_or_has_another_ending_is_a_fault_of_the_request(tmp_path):
    with pytest.raises(UsageError, match=r"no such file or folder: .*no.csv"):
        read(tmp_path / "no.csv")
    (tmp_path / "a.cvs").write_text(CSV)
    with pytest.raises(UsageError, match=r"a.cvs: unknown file ending '.cvs'; did you mean '.csv'?"):
        read(tmp_path / "a.cvs")
    (tmp_path / "a.csv").write_text(CSV)
    with pytest.raises(UsageError, match="got size = 4, which is for folders of images"):
        read(tmp_path / "a.csv", size=4)


# --- images ---


def test_images_are_labelled_by_their_folder_and_ordered_by_name(tmp_path):
    for name, grey in (("dog/b.png", 30), ("dog/a.bmp", 20), ("cat/z.png", 10)):
        picture(tmp_path / name, grey)
    table = read(tmp_path)["train"]
    assert table.inputs.shape == (3, 1, 2, 3)
    assert table.inputs.dtype == np.uint8
    assert table.inputs[:, 0, 1, 2].tolist() == [10, 20, 30]
    assert table.labels.tolist() == ["cat", "dog", "dog"]


def test_images_may_be_split_already(tmp_path):
    picture(tmp_path / "train" / "cat" / "1.png", 1)
    picture(tmp_path / "test" / "dog" / "2.png", 2)
    tables = read(tmp_path)
    assert {split: (table.inputs[0, 0, 0, 0], table.labels[0]) for split, table in tables.items()} == {
        "train": (1, "cat"),
        "test": (2, "dog"),
    }


def test_one_colour_image_makes_all_of_them_colour(tmp_path):
    picture(tmp_path / "cat" / "1.png", 10)
    picture(tmp_path / "cat" / "2.png", 20, mode="RGB")
    inputs = read(tmp_path)["train"].inputs
    assert inputs[:, :, 0, 0].tolist() == [[10] * 3, [20] * 3]


def test_size_scales_images_of_several_shapes(tmp_path):
    picture(tmp_path / "cat" / "1.png", 10, (3, 2))
    picture(tmp_path / "cat" / "2.png", 20, (5, 4))
    with pytest.raises(DataError, match=r"2.png is 4 x 5 pixels \(height, width\); expected 2 x 3 as .*1.png; set `si"):
        read(tmp_path)
    assert read(tmp_path, size=2)["train"].inputs[:, 0].tolist() == [[[10] * 2] * 2, [[20] * 2] * 2]


def png_of(width, height):
    """A PNG that says it is this large and holds next to nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.png", b"no picture", r"a.png cannot be read \(cannot identify image file"),
        ("a.png", png_of(9, 9), r"a.png cannot be read"),
        ("a.png", png_of(9000, 9000), r"a.png cannot be read \(it says that it has 9000 x 9000 pixels"),
        ("a.png", png_of(60000, 60000), r"a.png cannot be read \(Image size"),
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"a.png cannot be read \(cannot identify"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", r"a.eps is no image that can be read; accepted: .png"),
        ("a.pickle", b"cos\nsystem\n", r"a.pickle is no image that can be read"),
    ],
)
def test_damaged_and_hostile_images_are_one_message(tmp_path, name, content, fault):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / name).write_bytes(content)
    with pytest.raises(DataError, match=fault):
        read(tmp_path)


def test_more_images_than_memory_holds_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmerge.data.own_files.MOST_BYTES", 11)
    for number in range(2):
        picture(tmp_path / "cat" / f"{number}.png")  # 6 bytes each
    with pytest.raises(DataError, match=r"2 images like 0.png are too many to hold"):
        read(tmp_path)
    assert MOST_BYTES > 2**30


def test_folders_of_splits_and_of_classes_are_not_mixed(tmp_path):
    picture(tmp_path / "train" / "cat" / "1.png")
    picture(tmp_path / "tset" / "cat" / "1.png")
    with pytest.raises(DataError, match="unknown split 'tset'; did you mean 'test'"):
        read(tmp_path)


def test_a_folder_of_empty_folders_has_no_images(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match=r"has no images in sub-folders of classes; expected .png"):
        read(tmp_path)


def test_deep_images_are_refused_by_name(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.full((4, 4), 1000, dtype=np.uint16)).save(tmp_path / "cat" / "deep.png")
    with pytest.raises(FedmergeError, match=r"deep.png, item 0: an image of mode 'I;16'; convert to 8 bits"):
        read(tmp_path)
