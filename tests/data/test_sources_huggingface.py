"""Hugging Face data sets, from small ones that are made and saved here; the Hub is never asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.data.sources.huggingface import HuggingFace

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def library_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "library"))


def picture(grey: int, size: tuple[int, int] = (4, 4), mode: str = "L"):
    return Image.new("L", size, grey).convert(mode)


def saved(folder: Path, columns: dict, types: dict | None = None) -> str:
    table = datasets.Dataset.from_dict(columns)
    for name, feature in (types or {}).items():
        table = table.cast_column(name, feature)
    table.save_to_disk(folder / "saved")
    return str(folder / "saved")


PETS = {"label": datasets.ClassLabel(names=["cat", "dog"])}


def pets(**more) -> dict:
    return {"image": [picture(10), picture(20), picture(30)], "label": [1, 0, 1], **more}


# --- images ---


def test_the_only_image_and_class_label_columns_are_found(tmp_path):
    pool = HuggingFace(path=saved(tmp_path, pets(note=["x", "y", "z"]), PETS)).load()
    assert pool.inputs.shape == (3, 1, 4, 4)
    assert pool.inputs.dtype == np.uint8
    assert pool.inputs[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert [pool.class_names[k] for k in pool.targets] == ["dog", "cat", "dog"]
    assert pool.user is None
    assert pool.name == f"huggingface path={tmp_path}/saved"


def test_one_colour_image_makes_all_of_them_colour(tmp_path):
    images = [picture(10), picture(20, mode="RGB"), picture(30, mode="RGBA")]
    pool = HuggingFace(path=saved(tmp_path, {"image": images, "label": [0, 0, 1]}, PETS)).load()
    assert pool.inputs.shape == (3, 3, 4, 4)
    assert pool.inputs[:, :, 0, 0].tolist() == [[10] * 3, [20] * 3, [30] * 3]


def test_images_of_several_shapes_need_a_size(tmp_path):
    path = saved(tmp_path, {"image": [picture(10), picture(20, (8, 6))], "label": [0, 1]}, PETS)
    with pytest.raises(DataError, match=r"column 'image': images of 2 shapes, from \(4, 4\) to \(6, 8\).*set `size`"):
        HuggingFace(path=path).load()
    pool = HuggingFace(path=path, size=2).load()
    assert pool.inputs.shape == (2, 1, 2, 2)
    assert pool.inputs[:, 0, 0, 0].tolist() == [10, 20]


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    deep = Image.fromarray(np.full((4, 4), 1000, dtype=np.uint16))
    path = saved(tmp_path, {"image": [picture(1), deep], "label": [0, 1]}, PETS)
    with pytest.raises(DataError, match="column 'image', item 1: an image of mode 'I;16'; convert to 8 bits"):
        HuggingFace(path=path).load()


def test_users_and_domains_are_numbered_by_name(tmp_path):
    style = datasets.ClassLabel(names=["photo", "art"])
    columns = pets(writer=["w2", "w1", "w2"], style=[0, 1, 1])
    path = saved(tmp_path, columns, {**PETS, "style": style})
    pool = HuggingFace(path=path, user_column="writer", domain_column="style", label_column="label").load()
    assert [pool.user_names[u] for u in pool.user] == ["w2", "w1", "w2"]
    assert [pool.domain_names[d] for d in pool.domain] == ["photo", "art", "art"]


# --- numbers ---


def test_lists_of_numbers_and_text_labels_are_read_when_they_are_named(tmp_path):
    path = saved(tmp_path, {"x": [[1, 2], [3, 4]], "kind": ["b", "a"]})
    pool = HuggingFace(path=path, input_column="x", label_column="kind").load()
    assert pool.inputs.dtype == np.float32
    assert pool.inputs.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert pool.class_names == ("a", "b")
    assert pool.targets.tolist() == [1, 0]


def test_a_column_of_single_numbers_is_one_feature(tmp_path):
    pool = HuggingFace(path=saved(tmp_path, {"x": [0.5, 1.5], "y": [10, 9]}), input_column="x", label_column="y").load()
    assert pool.inputs.tolist() == [[0.5], [1.5]]
    assert (pool.class_names, pool.targets.tolist()) == (("9", "10"), [1, 0])  # in order of number, not of text


@pytest.mark.parametrize(("dtype", "kept"), [("uint8", np.uint8), ("int32", np.float32), ("float64", np.float32)])
def test_arrays_of_bytes_stay_images_and_others_become_float32(tmp_path, dtype, kept):
    values = np.arange(24).reshape(2, 3, 2, 2).astype(dtype)
    features = datasets.Features({"x": datasets.Array3D((3, 2, 2), dtype), "y": datasets.Value("int64")})
    datasets.Dataset.from_dict({"x": values, "y": [0, 1]}, features=features).save_to_disk(tmp_path / "saved")
    pool = HuggingFace(path=str(tmp_path / "saved"), input_column="x", label_column="y").load()
    np.testing.assert_array_equal(pool.inputs, values.astype(kept), strict=True)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1, 2], [3]], "column 'x': items are not numbers of one shape.*lists of numbers of one length"),
        (["one", " "], "column 'x', item 1: ' '; expected a text or a list of words"),
        (["one", None], "column 'x', item 1: None; expected a text or a list of words"),
        ([[1.0, 2.0], [3.0, None]], "item 1 has NaN"),
        ([[1.0, 2.0], [3.0, float("inf")]], "item 1 has NaN or infinite"),
    ],
)
def test_inputs_that_are_not_numbers_of_one_shape_are_refused(tmp_path, column, message):
    path = saved(tmp_path, {"x": column, "y": [0, 1]})
    with pytest.raises(DataError, match=message):
        HuggingFace(path=path, input_column="x", label_column="y").load()


def test_texts_stay_texts(tmp_path):
    columns = {"sentence": ["it rose", "it fell"], "label": [1, 0]}
    pool = HuggingFace(path=saved(tmp_path, columns, PETS), input_column="sentence").load()
    assert pool.is_text
    assert pool.inputs.tolist() == ["it rose", "it fell"]
    assert (pool.class_names, pool.targets.tolist(), pool.answers) == (("cat", "dog"), [1, 0], None)


def test_prompts_have_completions(tmp_path):
    columns = {"prompt": ["one", "two"], "completion": ["uno", "due"], "language": ["it", "es"]}
    options = {"input_column": "prompt", "answer_column": "completion"}
    path = saved(tmp_path, columns)
    bare = HuggingFace(path=path, **options).load()
    assert (bare.answers.tolist(), bare.class_names) == (["uno", "due"], ("text",))
    dealt = HuggingFace(path=path, **options, label_column="language").load()
    assert dealt.class_names == ("es", "it")


def test_words_have_tags_by_their_declared_names(tmp_path):
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"]))
    columns = {"tokens": [["Ann", "sleeps"], ["so", "does", "Bob"]], "ner": [[1, 0], [0, 0, 1]]}
    path = saved(tmp_path, columns, {"ner": tags})
    pool = HuggingFace(path=path, input_column="tokens", answer_column="ner").load()
    assert pool.inputs.tolist() == ["Ann sleeps", "so does Bob"]
    assert pool.answers.tolist() == ["B-PER O", "O O B-PER"]


def test_a_size_for_numbers_is_refused(tmp_path):
    path = saved(tmp_path, {"x": [[1, 2], [3, 4]], "y": [0, 1]})
    with pytest.raises(UsageError, match="column 'x': `size` is for images"):
        HuggingFace(path=path, input_column="x", label_column="y", size=8).load()


@pytest.mark.parametrize("labels", [[0.5, 1.0], ["a", None]])
def test_labels_that_are_no_classes_are_refused(tmp_path, labels):
    path = saved(tmp_path, {"x": [[1, 2], [3, 4]], "y": labels})
    with pytest.raises(DataError, match=r"column 'y', item \d: .*; expected a text or a whole number"):
        HuggingFace(path=path, input_column="x", label_column="y").load()


# --- what is never guessed ---


def test_columns_are_never_guessed_by_name(tmp_path):
    path = saved(tmp_path, {"image": [[1, 2]], "label": [0]})
    with pytest.raises(UsageError) as caught:
        HuggingFace(path=path, input_column="image").load()
    assert str(caught.value) == (
        "cannot tell the label_column: 0 columns are of type ClassLabel, expected one. Set `label_column` to one of: "
        "image: List(Value('int64')); label: Value('int64')"
    )


def test_two_columns_of_labels_must_be_chosen_between(tmp_path):
    path = saved(tmp_path, pets(coarse=[0, 0, 1]), {**PETS, "coarse": datasets.ClassLabel(names=["a", "b"])})
    with pytest.raises(
        UsageError, match=r"cannot tell the label_column: 2 columns.*label: ClassLabel.*coarse: ClassLab"
    ):
        HuggingFace(path=path).load()
    assert HuggingFace(path=path, label_column="coarse").load().targets.tolist() == [0, 0, 1]


@pytest.mark.parametrize("option_name", ["input_column", "label_column", "user_column", "domain_column"])
def test_an_unknown_column_is_refused(tmp_path, option_name):
    path = saved(tmp_path, pets(), PETS)
    with pytest.raises(UsageError, match=r"unknown column 'lable'; did you mean 'label'.*Known: image, label"):
        HuggingFace(path=path, **{option_name: "lable"}).load()


# --- splits and samples ---


@pytest.fixture
def two_splits(tmp_path):
    splits = {
        name: datasets.Dataset.from_dict({"x": [[n], [n + 1]], "y": labels}).cast_column("y", PETS["label"])
        for n, (name, labels) in enumerate({"train": [0, 1], "test": [1, -1]}.items())
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    return str(tmp_path / "splits")


def test_unlabelled_items_are_counted_and_refused(two_splits):
    with pytest.raises(DataError, match="1 of 4 items have no label; name labelled `splits`"):
        HuggingFace(path=two_splits, input_column="x").load()


def test_splits_are_chosen_by_name(two_splits):
    pool = HuggingFace(path=two_splits, input_column="x", splits=("train",)).load()
    assert pool.inputs.tolist() == [[0.0], [1.0]]
    with pytest.raises(UsageError, match=r"unknown split of .* 'tset'; did you mean 'test'"):
        HuggingFace(path=two_splits, input_column="x", splits=("train", "tset")).load()


def test_all_splits_are_pooled_in_their_order(tmp_path):
    for name, value in {"train": 1, "test": 2}.items():
        (tmp_path / f"{name}.csv").write_text(f"x,y\n{value},a\n{value},b\n")
    pool = HuggingFace(path=str(tmp_path), input_column="x", label_column="y").load()
    assert pool.inputs.tolist() == [[1.0], [1.0], [2.0], [2.0]]
    assert pool.targets.tolist() == [0, 1, 0, 1]


def test_splits_with_different_columns_are_not_pooled(tmp_path):
    parts = {"train": {"x": [1], "y": [0]}, "test": {"x": ["one"], "y": [0]}}
    tables = {name: datasets.Dataset.from_dict(columns) for name, columns in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "uneven")
    with pytest.raises(DataError, match="the splits train, test have different columns; name one in `splits`"):
        HuggingFace(path=str(tmp_path / "uneven"), input_column="x", label_column="y").load()


def test_a_sample_is_always_the_same_and_keeps_the_order(tmp_path):
    path = saved(tmp_path, {"x": list(range(100)), "y": [0, 1] * 50})
    chosen = HuggingFace(path=path, input_column="x", label_column="y", max_items=10)
    values = chosen.load().inputs[:, 0].tolist()
    assert len(set(values)) == 10
    assert values == sorted(values) == chosen.load().inputs[:, 0].tolist()
    assert values != list(range(10))


# --- places ---


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_single_files_are_read(tmp_path, kind):
    file = tmp_path / f"data.{kind}"
    getattr(datasets.Dataset.from_dict({"x": [1.5, 2.5], "y": ["a", "b"]}), f"to_{kind}")(str(file))
    pool = HuggingFace(path=str(file), input_column="x", label_column="y").load()
    assert pool.inputs.tolist() == [[1.5], [2.5]]


def test_a_folder_of_class_folders_with_images_is_read(tmp_path):
    for name, grey in {"cat": 10, "dog": 20}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        picture(grey).save(tmp_path / "images" / name / "0.png")
    pool = HuggingFace(path=str(tmp_path / "images")).load()
    assert {pool.class_names[k]: int(x.max()) for k, x in zip(pool.targets, pool.inputs, strict=True)} == {
        "cat": 10,
        "dog": 20,
    }


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "no such file or folder: ./nowhere"),
        ("data/of/mine", "no such file or folder: data/of/mine"),
        ("mine.csv", "no such file or folder: mine.csv"),
    ],
)
def test_a_local_path_that_is_not_there_is_not_looked_for_on_the_hub(path, message):
    with pytest.raises(UsageError) as caught:
        HuggingFace(path=path).load()
    assert str(caught.value) == message


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"")
    with pytest.raises(UsageError, match=r"x.pkl is not a kind of file that can be read; accepted: .arrow, .csv, "):
        HuggingFace(path=str(tmp_path / "x.pkl")).load()


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(FedmergeError, match=r"cannot load '.*x.parquet'"):
        HuggingFace(path=str(tmp_path / "x.parquet")).load()


def test_code_in_a_folder_is_not_run(tmp_path):
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(FedmergeError, match="cannot load"):
        HuggingFace(path=str(folder)).load()
    assert not (tmp_path / "ran").exists()


OFFLINE = """
from fedmerge.core.errors import FedmergeError
from fedmerge.data.sources.huggingface import HuggingFace
try:
    HuggingFace(path="uoft-cs/cifar100").load()
except FedmergeError as error:
    print(error)
"""


def test_an_offline_hub_says_how_to_go_on_without_it(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}  # read when the library is imported
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot load 'uoft-cs/cifar100' from the Hugging Face Hub: Couldn't reach")
    assert "Is this machine offline? Load the data set once on a machine that is not, save it with `save_to_disk`" in (
        done.stdout
    )
    assert done.stderr == ""


def test_progress_bars_of_the_library_are_off_and_come_back(tmp_path, capfd):
    (tmp_path / "x.csv").write_text("x,y\n1,a\n")
    HuggingFace(path=str(tmp_path / "x.csv"), input_column="x", label_column="y").load()
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()
