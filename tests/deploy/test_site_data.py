"""A site's own examples: the same bits as in a simulation, in the form that all sites share."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data.encoders import Letters
from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.data.byo import from_folder
from fedmerge.data.federated import ClientData, Examples
from fedmerge.data.partition import SPLITS
from fedmerge.data.transform import scale_of, standard_scale
from fedmerge.deploy.moments import Moments, moments, moments_from_plain, pooled
from fedmerge.deploy.schema import DataSchema, schema_of_example, schema_of_form
from fedmerge.deploy.site import SiteConfig, SiteData
from fedmerge.deploy.site_data import check_site_data, raw_client, site_client

SCHEMA = DataSchema(("cat", "dog"), (2,), columns=("height", "width"))
CSV = "height,width,label\n" + "".join(f"{i}.5,{i * i},{'cat' if i % 2 else 'dog'}\n" for i in range(10))


def site_at(name="a", **data):
    return SiteConfig(name, "localhost:9092", SiteData(**data))


def at_path(path, **data):
    return site_at(path.stem, path=str(path), **data)


def assert_same_client(one, other):
    """Same name and the same bits everywhere."""
    assert one.name == other.name
    for split in SPLITS:
        for mine, theirs in zip(getattr(one, split), getattr(other, split), strict=True):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert mine.numpy().tobytes() == theirs.numpy().tobytes()


def schema_like(data, **more):
    return schema_of_form(data.form, class_names=data.class_names, kind=data.kind, **more)


def assert_sites_are_clients(folder, seed, encoder=None, **options):
    """Every file of a folder, read as a site, is the client that a simulation makes of it."""
    data = from_folder(folder, seed=seed, encoder=encoder, **options)
    schema = schema_like(
        data,
        text_column=options.get("text_column"),
        label_column=options.get("label_column", "label"),
        validation=options.get("validation", 0.15),
        test=options.get("test", 0.15),
    )
    paths = sorted(folder.iterdir(), key=lambda path: path.stem)
    assert [path.stem for path in paths] == [client.name for client in data.clients]
    for path, client in zip(paths, data.clients, strict=True):
        assert_same_client(site_client(at_path(path), schema, seed=seed, encoder=encoder), client)
    return schema


# --- the same bits as in a simulation ---


def mixed_folder(folder, draw):
    """Files of each kind with columns in different orders, repeated rows, negative zeros and splits of their own."""
    columns = ["a", "b", "c"]
    names = np.array(["cat", "cow", "dog"])

    def rows(count):
        inputs = draw.normal(5, 3, (count, 3)).astype(np.float32)
        inputs[0] = inputs[1]
        inputs[2, 0] = -0.0
        return inputs, np.concatenate([names, names[draw.integers(3, size=count - 3)]])

    for name, order in (("east", [0, 1, 2]), ("north", [2, 0, 1])):
        inputs, labels = rows(20)
        frame = pd.DataFrame(inputs[:, order], columns=[columns[k] for k in order]).assign(label=labels)
        frame.to_csv(folder / f"{name}.csv", index=False)
        frame.iloc[::-1].to_parquet(folder / f"{name}-again.parquet")
    inputs, labels = rows(15)
    np.savez(folder / "south.npz", x=inputs, y=labels)
    np.savez(folder / "west.npz", x=inputs, y=labels, x_test=inputs[:3] + 1, y_test=labels[:3])


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_file_of_a_folder_is_the_client_of_a_simulation(tmp_path, seed, standardise):
    mixed_folder(tmp_path, np.random.default_rng(seed))
    schema = assert_sites_are_clients(tmp_path, seed, standardise=standardise)
    assert (schema.mean is None) != standardise


@given(
    seed=st.integers(0, 2**31),
    validation=st.sampled_from([0.0, 0.1, 0.3]),
    test=st.sampled_from([0.0, 0.15, 0.4]),
    sizes=st.lists(st.integers(6, 30), min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=25)
def test_for_every_seed_share_and_size(tmp_path_factory, seed, validation, test, sizes):
    folder = tmp_path_factory.mktemp("clients")
    draw = np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        np.savez(folder / f"c{number}.npz", x=draw.integers(0, 99, (size, 2)), y=np.arange(size) % 3)
    assert_sites_are_clients(folder, seed, validation=validation, test=test, standardise=True)


@pytest.mark.parametrize("standardise", [False, True])
def test_images_are_the_clients_of_a_simulation(tmp_path, standardise):
    draw = np.random.default_rng(3)
    for name in "ab":
        images = draw.integers(0, 256, (20, 3, 4, 5), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", x=images, y=np.arange(20) % 2)
    assert assert_sites_are_clients(tmp_path, 5, standardise=standardise).dtype == "uint8"


def test_float_images_are_too(tmp_path):
    draw = np.random.default_rng(3)
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", x=draw.normal(9, 2, (20, 2, 3, 3)), y=np.arange(20) % 2)
    assert len(assert_sites_are_clients(tmp_path, 5, standardise=True).mean) == 2


@pytest.mark.parametrize("kind", ["classes", "tags", "completions"])
def test_texts_are_the_clients_of_a_simulation(tmp_path, kind):
    labels = {
        "classes": ["x", "y", "x", "z"],
        "tags": ["N V", "V V", "N N", "V A"],
        "completions": ["b", "c", "d", "e"],
    }
    for name, texts in (("a", ["a b", "b c", "c d", "d e"]), ("b", ["f g", "g h", "h i", "i j"])):
        pd.DataFrame({"say": texts * 3, "note": 1, "label": labels[kind] * 3}).to_csv(tmp_path / f"{name}.csv")
    schema = assert_sites_are_clients(tmp_path, 2, Letters(kind), text_column="say")
    assert schema.kind == kind
    assert_sites_are_clients(tmp_path, 2, Letters(kind), text_column="say", validation=0.0)


def test_a_site_that_lacks_classes_numbers_them_as_all_do(tmp_path):
    (tmp_path / "a.csv").write_text("x,label\n1,2\n2,2\n3,2\n4,2\n")
    np.savez(tmp_path / "b.npz", x=np.arange(8.0)[:, None], y=[0, 1, 2, 3] * 2)
    assert_sites_are_clients(tmp_path, 0)


def test_a_folder_with_a_file_per_split_and_a_seed_that_does_not_matter_then(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.csv").write_text(CSV)
    one, other = (site_client(at_path(tmp_path), SCHEMA, seed=seed) for seed in (0, 1))
    assert_same_client(one, other)
    assert one.train.inputs.tolist() == [[i + 0.5, i * i] for i in range(10)]
    assert one.train.targets.tolist() == [1, 0] * 5


def test_the_cut_is_the_name_s_and_the_seed_s(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(40.0).reshape(20, 2), y=[0, 1] * 10)

    def test_rows(name, seed):
        return site_client(site_at(name, path=str(tmp_path / "a.npz")), SCHEMA, seed=seed).test.inputs.tolist()

    assert test_rows("a", 0) == test_rows("a", 0)
    assert test_rows("a", 0) != test_rows("b", 0)
    assert test_rows("a", 0) != test_rows("a", 1)


# --- numbers as names ---


def test_classes_called_by_other_numbers_are_meant_by_name(tmp_path):
    schema = DataSchema(("1", "2", "3"), (1,), validation=0, test=0)
    np.savez(tmp_path / "a.npz", x=[[1.0], [2.0]], y=[3, 1])
    (tmp_path / "b.csv").write_text("x,label\n1,3\n2,1\n")
    targets = [site_client(at_path(tmp_path / name), schema, seed=0).train.targets for name in ("a.npz", "b.csv")]
    assert [each.tolist() for each in targets] == [[2, 0], [2, 0]]


# --- the form that all sites share ---


def fault_of(site, schema=SCHEMA, encoder=None, kind=DataError):
    with pytest.raises(kind) as caught:
        site_client(site, schema, seed=0, encoder=encoder)
    return str(caught.value)


BAD_TABLES = {
    "a column of another name": (
        CSV.replace("width", "with"),
        "a.csv: unknown column 'with'; did you mean 'width'? Known: width; rename it as the federation does, or leave",
    ),
    "columns too many": (
        "height,width,age,sex,label\n1,2,3,4,cat\n",
        "a.csv: unknown column 'age'. Known: height, width (1 more are unknown alike); rename it",
    ),
    "a column missing": (
        "height,label\n1,cat\n",
        "a.csv has no column 'width'; every site has all columns of the federation: add it",
    ),
    "no label": (CSV.replace("label", "lable"), "a.csv: unknown label column 'label'; did you mean 'lable'?"),
    "a new class": (
        CSV.replace("cat", "cow", 1),
        "a.csv, line 3: unknown class 'cow'. Known: cat, dog",
    ),
    "a class number": (
        "height,width,label\n1,2,0\n3,4,7\n",
        "a.csv, line 3: label 7.0; expected 0..1, the classes named",
    ),
    "a text": (CSV.replace("4,dog", "tall,dog", 1), "a.csv, line 4, column 'width': got 'tall'; expected a number"),
    "nan": ("height,width,label\n1,nan,cat\n", "a.csv, line 2, column 'width': got nan; expected a finite number"),
    "infinite": ("height,width,label\n1,1e39,cat\n", "a.csv, line 2, column 'width': got 1e+39; expected a finite"),
    "a short line": ("height,width,label\n1,cat\n", "a.csv, line 2: 2 cells; expected 3 as in the header"),
    "no rows": ("height,width,label\n", "a.csv has no rows below its header"),
    "too few": ("height,width,label\n1,2,cat\n", "client 'a' has 1 rows, 1 of them different: too few to give one to"),
}


@pytest.mark.parametrize(("text", "fault"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_in_another_form_is_told_where_and_what_to_do(tmp_path, text, fault):
    (tmp_path / "a.csv").write_text(text)
    assert fault in fault_of(at_path(tmp_path / "a.csv"))


IMAGES = DataSchema(("a", "b"), (3, 4, 4), "uint8")
GREY = DataSchema(("a", "b"), (1, 4, 4), "uint8")
BAD_ARRAYS = {
    "another number of features": (SCHEMA, np.zeros((3, 5)), "inputs are float32 [5]; the federation has float32 [2]"),
    "images for numbers": (
        SCHEMA,
        np.zeros((3, 1, 2, 2)),
        "inputs are float32 [1, 2, 2]; the federation has float32 [2]",
    ),
    "other pixels": (
        IMAGES,
        np.zeros((3, 3, 5, 5), np.uint8),
        "inputs are uint8 [3, 5, 5]; the federation has uint8 [3, 4, 4], channels, height, width: scale this site's",
    ),
    "channels behind": (
        IMAGES,
        np.zeros((3, 4, 4, 3), np.uint8),
        "uint8 [4, 4, 3]; the federation has uint8 [3, 4, 4]",
    ),
    "colour for grey": (GREY, np.zeros((3, 3, 4, 4), np.uint8), "uint8 [3, 4, 4]; the federation has uint8 [1, 4, 4]"),
    "floats for images": (
        IMAGES,
        np.zeros((3, 3, 4, 4)),
        "float32 [3, 4, 4]; the federation has uint8 [3, 4, 4]; give whole numbers 0..255, (255 * x).round()",
    ),
    "bytes for floats": (
        SCHEMA,
        np.zeros((3, 2), np.uint8),
        "uint8 [2]; the federation has float32 [2]; give the floats",
    ),
    "texts for numbers": (SCHEMA, np.array([["a"]] * 3), "inputs are <U1 [3, 1]; expected numbers [n, features]"),
    "no rows": (SCHEMA, np.zeros((0, 2)), "has no rows; expected one to train on at least"),
}


@pytest.mark.parametrize(("schema", "inputs", "fault"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_in_another_form_are_told(tmp_path, schema, inputs, fault):
    np.savez(tmp_path / "a.npz", x=inputs, y=np.zeros(len(inputs), dtype=np.int64))
    told = fault_of(at_path(tmp_path / "a.npz"), schema)
    assert fault in told
    assert str(tmp_path / "a.npz") in told


def test_python_objects_are_never_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}, {}], dtype=object), y=[0, 1])
    assert "x.npy holds Python objects, which are never read" in fault_of(at_path(tmp_path / "a.npz"))


@given(content=st.binary(max_size=200), ending=st.sampled_from([".npz", ".csv", ".parquet"]))
@example(content=b"height,width,label\n1,2,cat\n\xff", ending=".csv")
@example(content=b"PK\x05\x06" + bytes(18), ending=".npz")
@example(content=b"PAR1PAR1", ending=".parquet")
@settings(deadline=None, max_examples=60)
def test_any_bytes_are_one_clear_message(tmp_path_factory, content, ending):
    path = tmp_path_factory.mktemp("site") / f"a{ending}"
    path.write_bytes(content)
    told = fault_of(at_path(path), kind=FedmergeError)
    assert str(path) in told or "client 'a'" in told


def test_a_table_without_names_for_columns_is_taken_in_its_order_with_a_word(tmp_path, caplog):
    (tmp_path / "a.csv").write_text(CSV)
    with caplog.at_level(logging.WARNING):
        site_client(at_path(tmp_path / "a.csv"), DataSchema(("cat", "dog"), (2,)), seed=0)
    assert "a.csv: the federation names no columns; those of the file are taken in its order" in caplog.text


def test_a_site_may_call_its_columns_of_labels_and_texts_otherwise(tmp_path):
    (tmp_path / "a.csv").write_text(CSV.replace("label", "pet"))
    assert site_client(at_path(tmp_path / "a.csv", label_column="pet"), SCHEMA, seed=0).num_train == 7
    (tmp_path / "b.csv").write_text("was,label\n" + "ab,cat\ncd,dog\nef,cat\n")
    texts = DataSchema(("cat", "dog"), (6,), "tokens", text_column="say", validation=0, test=0)
    client = site_client(at_path(tmp_path / "b.csv", text_column="was"), texts, seed=0, encoder=Letters())
    assert client.train.inputs[0].tolist() == [0, 1, -1, -1, -1, -1]


# --- texts ---

TEXTS = DataSchema(("x", "y"), (6,), "tokens", text_column="say")
TAGS = DataSchema(("N", "V"), (6,), "tokens", "tags", text_column="say", validation=0, test=0)


@pytest.mark.parametrize(
    ("schema", "text", "encoder", "fault"),
    [
        (TEXTS, "say,label\nab,x\ncd,q\n", Letters(), "a.csv, line 3: unknown class 'q'"),
        (TEXTS, "say,label\nab,x\n,y\n", Letters(), "a.csv, line 3, column 'say' is empty"),
        (TEXTS, "say,label\n12,x\nab,y\n", Letters(), "a.csv, line 2: got '12', in which no letter is known"),
        (TEXTS, "says,label\nab,x\n", Letters(), "a.csv: unknown column 'say'; did you mean 'says'?"),
        (TEXTS, "say,label\nab,x\ncd,y\n", None, "a.csv holds texts, which this network cannot read"),
        (
            TEXTS,
            "say,label\nab,x\ncd,y\n",
            Letters(length=4),
            "the encoder makes texts of 4 tokens; the federation has 6",
        ),
        (
            TEXTS,
            "say,label\nab,x\ncd,y\n",
            Letters("tags"),
            "the model reads texts for tags; the federation's data are c",
        ),
        (TAGS, "say,label\na b,N V\nc,Q\n", Letters("tags"), "a.csv, line 3: unknown tag 'Q'"),
        (TAGS, "say,label\na b,N V\nc,N V\n", Letters("tags"), "a.csv, line 3: 1 words and 2 tags"),
    ],
)
def test_texts_in_another_form_are_told(tmp_path, schema, text, encoder, fault):
    (tmp_path / "a.csv").write_text(text)
    assert fault in fault_of(at_path(tmp_path / "a.csv"), schema, encoder, FedmergeError)


def test_a_site_with_few_of_the_tags_numbers_them_as_all_do(tmp_path):
    (tmp_path / "a.csv").write_text("say,label\na,V\nb,V\n")
    client = site_client(at_path(tmp_path / "a.csv"), TAGS, seed=0, encoder=Letters("tags"))
    assert client.train.targets[:, 0].tolist() == [1, 1]


# --- a function of the site's own ---

FUNCTIONS = """
import numpy as np

def pair():
    return [[i + 0.5, i * i] for i in range(10)], ["cat" if i % 2 else "dog" for i in range(10)]

def splits(times=1):
    return pair(), ([[times, times]], ["cat"]), ([[2.0, 2.0]], ["dog"])

def named():
    return {"train": pair(), "test": ([[2.0, 2.0]], ["dog"])}

def backwards():
    images = np.arange(96, dtype=np.uint8).reshape(2, 3, 4, 4)[::-1]
    images.flags.writeable = False
    return {split: (images, [0, 1]) for split in ("train", "validation", "test")}

def texts():
    return ["ab", "cd", "ef"], ["x", "y", "x"]

def failing():
    raise RuntimeError("the disk is gone")

def wrong():
    return None

def ragged():
    return [[1.0], [1.0, 2.0]], [0, 1]

def with_nan():
    return [[1.0, 2.0], [float("nan"), 1.0]], [0, 1]

number = 3
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "load.py").write_text(FUNCTIONS)
    return lambda name, **options: site_at(python=f"{tmp_path}/load.py:{name}", options=options or None)


def test_a_function_s_pair_is_cut_as_a_file_is(tmp_path, functions):
    (tmp_path / "a.csv").write_text(CSV)
    assert_same_client(
        site_client(functions("pair"), SCHEMA, seed=4), site_client(at_path(tmp_path / "a.csv"), SCHEMA, seed=4)
    )


def test_a_function_may_give_splits_and_take_options(functions):
    client = site_client(functions("splits", times=7), SCHEMA, seed=0)
    assert client.validation.inputs.tolist() == [[7.0, 7.0]]
    assert len(client.train.targets) == 10
    assert site_client(functions("named"), SCHEMA, seed=0).test.inputs.tolist() == [[2.0, 2.0]]


def test_arrays_that_torch_cannot_take_over_are_copied(functions):
    client = site_client(functions("backwards"), IMAGES, seed=0)
    assert client.test.inputs[1].flatten().tolist() == list(map(float, range(48)))


def test_a_function_may_give_texts(functions):
    schema = DataSchema(("x", "y"), (6,), "tokens", validation=0, test=0)
    assert site_client(functions("texts"), schema, seed=0, encoder=Letters()).train.targets.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("failing", r"load.py:failing failed: RuntimeError: the disk is gone"),
        ("wrong", r"load.py:wrong', train: got a NoneType; expected \(inputs, labels\)"),
        ("ragged", r"load.py:ragged', train: inputs are not an array"),
        ("with_nan", r"load.py:with_nan', train, row 1 from 0: got nan; expected a finite number"),
        ("number", r"data.python '.*load.py:number' is a int, which cannot be called"),
        ("piar", r"unknown name in .*load.py 'piar'; did you mean 'pair'"),
    ],
)
def test_a_function_that_does_not_serve_is_told(functions, name, fault):
    with pytest.raises(FedmergeError, match=fault):
        site_client(functions(name), SCHEMA, seed=0)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"no such file: .*nothing.py"):
        site_client(site_at(python=f"{tmp_path}/nothing.py:load"), SCHEMA, seed=0)


# --- data sets in Hugging Face's formats ---


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "library"))
    return library


def saved(library, folder, **splits):
    made = {name: library.Dataset.from_dict(columns) for name, columns in splits.items()}
    for name, table in made.items():
        if all(isinstance(label, int) for label in table["label"]):
            made[name] = table.cast_column("label", library.ClassLabel(names=["dog", "cat"]))
    library.DatasetDict(made).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def test_splits_of_a_data_set_are_a_site_s_and_classes_go_by_name(tmp_path, datasets):
    rows = {"x": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]}
    path = saved(
        datasets, tmp_path, train=rows, held={"x": [[5.0, 6.0]], "label": [1]}, odd={"x": [[0.0, 0.0]], "label": [0]}
    )
    site = site_at(
        huggingface=path, splits=("train",), validation_splits=("held",), test_splits=("held",), input_column="x"
    )
    client = site_client(site, SCHEMA, seed=0)
    assert client.train.inputs.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert client.train.targets.tolist() == [1, 0]  # the data set calls them dog, cat; the federation cat, dog
    assert client.test.inputs.tolist() == [[5.0, 6.0]]


def test_without_splits_all_rows_are_cut_as_those_of_a_file(tmp_path, datasets):
    (tmp_path / "a.csv").write_text(CSV)
    frame = pd.read_csv(tmp_path / "a.csv")
    path = saved(
        datasets, tmp_path, all={"x": frame[["height", "width"]].values.tolist(), "label": frame["label"].tolist()}
    )
    site = site_at(huggingface=path, input_column="x", label_column="label")
    assert_same_client(site_client(site, SCHEMA, seed=3), site_client(at_path(tmp_path / "a.csv"), SCHEMA, seed=3))


def test_train_rows_alone_are_drawn_from_a_large_data_set(tmp_path, datasets):
    rows = {"x": [[float(i), 0.0] for i in range(9)], "label": [0, 1, 0] * 3}
    path = saved(datasets, tmp_path, train=rows, test=rows)
    site = site_at(huggingface=path, splits=("train",), test_splits=("test",), input_column="x", max_items=5)
    client = site_client(site, DataSchema(("dog", "cat"), (2,), validation=0), seed=0)
    assert (len(client.train.targets), len(client.test.targets)) == (5, 9)


def test_texts_of_a_data_set_have_their_answers(tmp_path, datasets):
    path = saved(datasets, tmp_path, train={"say": ["a b", "c"], "tags": [["N", "V"], ["V"]], "label": ["q", "q"]})
    site = site_at(huggingface=path, answer_column="tags")
    assert site_client(site, TAGS, seed=0, encoder=Letters("tags")).train.targets[:, 0].tolist() == [0, 1]
    with pytest.raises(UsageError, match=r"data.answer_column: missing; the federation learns tags"):
        site_client(site_at(huggingface=path, label_column="label"), TAGS, seed=0, encoder=Letters("tags"))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ({"splits": ("tain",), "input_column": "x"}, "unknown split of .*saved 'tain'; did you mean 'train'"),
        ({"input_column": "y"}, "unknown column 'y'"),
        ({}, "cannot tell the input_column"),
    ],
)
def test_a_data_set_that_is_not_as_said_is_told(tmp_path, datasets, data, fault):
    path = saved(datasets, tmp_path, train={"x": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]})
    with pytest.raises(UsageError, match=fault):
        site_client(site_at(huggingface=path, **data), SCHEMA, seed=0)


# --- images in folders ---


def test_images_in_folders_of_classes_and_grey_among_colour(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, grey in (("b/1.png", 40), ("a/1.png", 20), ("a/2.png", 30)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.new("L", (8, 6), grey).save(tmp_path / name)
    schema = DataSchema(("a", "b"), (3, 4, 4), "uint8", mean=(10.0,) * 3, std=(10.0,) * 3, validation=0, test=0)
    client = site_client(at_path(tmp_path, size=4), schema, seed=0)
    assert client.train.inputs[:, :, 0, 0].tolist() == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert client.train.targets.tolist() == [0, 0, 1]
    (tmp_path / "b").rename(tmp_path / "c")
    assert "unknown class 'c'" in fault_of(at_path(tmp_path, size=4), schema)


# --- one scale for all sites ---


def client_of(rows):
    inputs = torch.from_numpy(rows)
    nothing = Examples(inputs[:0], torch.zeros(0, dtype=torch.int64))
    return ClientData("a", Examples(inputs, torch.zeros(len(rows), dtype=torch.int64)), nothing, nothing)


def assert_pooled(parts, scale, tolerance):
    mean, std = pooled([moments(client_of(part)) for part in parts])
    spread = scale.std.flatten().double()
    assert ((torch.tensor(mean).double() - scale.mean.flatten()).abs() / spread).max() <= tolerance
    assert (torch.tensor(std).double() / spread - 1).abs().max() <= tolerance


@given(
    rows=arrays.arrays(
        np.float32,
        st.tuples(st.integers(3, 12), st.integers(1, 4)),
        elements=st.integers(-999, 999).map(lambda value: value / 8),
    ),
    cuts=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    power=st.integers(-6, 6),
)
@settings(deadline=None)
def test_sums_of_sites_give_the_scale_of_all_rows(rows, cuts, power):
    rows = rows * np.float32(10.0**power)
    parts = [part for part in np.split(rows, sorted(cuts)) if len(part)]
    assert_pooled(parts, standard_scale(rows), 1e-6)


def test_a_large_mean_beside_a_small_spread_loses_nothing():
    draw = np.random.default_rng(0)
    rows = (1e6 + draw.normal(0, 1, (300, 3))).astype(np.float32)
    plain = np.sqrt((rows.astype(np.float64) ** 2).mean(axis=0) - rows.mean(axis=0, dtype=np.float64) ** 2)
    scale = standard_scale(rows)
    mean, std = pooled([moments(client_of(part)) for part in np.split(rows, [10, 100])])
    assert np.abs(np.array(std) / scale.std.numpy() - 1).max() < 1e-6
    assert np.abs(plain / scale.std.numpy() - 1).max() > 1e-6  # what sums of plain squares would have given
    assert mean == tuple(scale.mean.tolist())


def test_images_are_pooled_by_channel():
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (30, 3, 4, 5), dtype=np.uint8)
    assert_pooled(np.split(images, [3, 20]), scale_of(images, "images"), 1e-6)
    floats = draw.normal(3, 2, (30, 2, 4, 4)).astype(np.float32)
    assert_pooled(np.split(floats, [1, 2]), standard_scale(floats), 1e-6)


def test_two_sites_by_hand():
    one, two = np.array([[0.0], [2.0]], np.float32), np.array([[7.0]], np.float32)
    first, second = moments(client_of(one)), moments(client_of(two))
    assert (first.count, first.total.tolist(), first.squares.tolist()) == (2, [2.0], [(0 - 1) ** 2 + (2 - 1) ** 2])
    assert (second.count, second.total.tolist(), second.squares.tolist()) == (1, [7.0], [0.0])
    mean, std = pooled([first, second])
    assert mean == (3.0,)  # (0 + 2 + 7) / 3
    assert std == (float(np.float32(np.sqrt((9 + 1 + 16) / 3))),)


def test_a_feature_that_is_the_same_everywhere_becomes_zero():
    rows = np.full((5, 1), 0.1, dtype=np.float32)
    mean, std = pooled([moments(client_of(part)) for part in np.split(rows, [2])])
    assert (mean, std) == ((float(np.float32(0.1)),), (1.0,))


def test_a_federation_with_a_pooled_scale_is_a_simulation_that_standardises(tmp_path):
    mixed_folder(tmp_path, np.random.default_rng(11))
    data = from_folder(tmp_path, seed=6, standardise=True)
    schema = DataSchema(data.class_names, (3,), columns=data.form.columns, scale="pooled")
    sites = [at_path(path) for path in sorted(tmp_path.iterdir(), key=lambda path: path.stem)]
    with pytest.raises(UsageError, match="the scale of the inputs is not known yet"):
        site_client(sites[0], schema, seed=6)
    found = schema.with_scale(*pooled([moments(raw_client(site, schema, seed=6)) for site in sites]))
    for site, client in zip(sites, data.clients, strict=True):
        mine = site_client(site, found, seed=6)
        torch.testing.assert_close(mine.train.inputs, client.train.inputs, rtol=1e-5, atol=1e-5)
        assert torch.equal(mine.test.targets, client.test.targets)


def test_raw_examples_are_the_numbers_of_the_file(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    schema = DataSchema(("cat", "dog"), (2,), columns=("height", "width"), mean=(5.0,), std=(2.0,))
    raw, scaled = (make(at_path(tmp_path / "a.csv"), schema, seed=0) for make in (raw_client, site_client))
    assert torch.equal(scaled.train.inputs, (raw.train.inputs - 5) / 2)


GOOD = Moments(2, np.array([2.0, 3.0]), np.array([1.0, 0.0]))


def test_moments_survive_a_message():
    read = moments_from_plain(json.loads(json.dumps(GOOD.plain())))
    assert (read.count, read.total.tolist(), read.squares.tolist()) == (2, [2.0, 3.0], [1.0, 0.0])


BAD_MOMENTS = {
    "no table": 3,
    "a key missing": {"count": 1, "total": [1.0]},
    "texts": {"count": 1, "total": ["a"], "squares": [1.0]},
    "ragged": {"count": 1, "total": [[1.0], [1.0, 2.0]], "squares": [1.0]},
    "no rows": {"count": 0, "total": [1.0], "squares": [1.0]},
    "true": {"count": True, "total": [1.0], "squares": [1.0]},
    "half a row": {"count": 0.5, "total": [1.0], "squares": [1.0]},
    "nan": {"count": 1, "total": [float("nan")], "squares": [1.0]},
    "infinite": {"count": 1, "total": [1.0], "squares": [float("inf")]},
    "negative squares": {"count": 1, "total": [1.0], "squares": [-1.0]},
    "nothing": {"count": 1, "total": [], "squares": []},
    "uneven": {"count": 1, "total": [1.0], "squares": [1.0, 2.0]},
    "a number too large": {"count": 1, "total": [10**400], "squares": [1.0]},
    "beyond what networks take": {"count": 1, "total": [1e300], "squares": [1.0]},
}


@pytest.mark.parametrize("plain", BAD_MOMENTS.values(), ids=BAD_MOMENTS)
def test_moments_that_are_none_are_refused(plain):
    with pytest.raises(DataError, match="a site's moments are damaged"):
        moments_from_plain(plain)


def test_moments_of_other_features_are_refused_by_site():
    other = Moments(1, np.array([1.0]), np.array([0.0]))
    with pytest.raises(
        DataError, match=r"the moments of site 1 from 0 are damaged: total has shape \[1\]; expected \[2\]"
    ):
        pooled([GOOD, other])
    with pytest.raises(DataError, match="no moments at all"):
        pooled([])


def test_texts_and_clients_without_rows_have_no_moments():
    with pytest.raises(DataError, match="client 'a' has texts, which have no scale"):
        moments(client_of(np.zeros((2, 3), dtype=np.int64)))
    with pytest.raises(DataError, match="client 'a' has no train rows"):
        moments(client_of(np.zeros((0, 3), dtype=np.float32)))


# --- what a site is told before the first round ---


def test_a_site_that_fits_is_told_what_it_has(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    schema = schema_of_example(tmp_path / "a.csv", standardise=True)
    found = check_site_data(at_path(tmp_path / "a.csv"), schema, 0)
    assert all(finding.ok for finding in found)
    assert [finding.name for finding in found] == ["data", "classes", "units"]
    assert "7 train, 1 validation, 2 test examples" in found[0].detail
    assert found[1].detail.startswith("2 of 2 classes to train on: cat ")


def test_a_site_that_does_not_fit_is_told_why_and_nothing_is_raised(tmp_path):
    (tmp_path / "a.csv").write_text(CSV.replace("4,dog", "tall,dog", 1))
    (found,) = check_site_data(at_path(tmp_path / "a.csv"), SCHEMA, 0)
    assert (found.name, found.ok) == ("data", False)
    assert "a.csv, line 4, column 'width': got 'tall'" in found.detail
    (found,) = check_site_data(site_at(path="/nowhere/a.csv"), SCHEMA, 0)
    assert "no such file or folder" in found.detail


def test_numbers_in_other_units_are_doubted(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    schema = DataSchema(("cat", "dog"), (2,), columns=("height", "width"), mean=(500.0, 30.0), std=(20.0, 30.0))
    found = check_site_data(at_path(tmp_path / "a.csv"), schema, 0)[-1]
    assert (found.name, found.ok) == ("units", False)
    assert found.detail.startswith("the mean of 'height' is -2")
    assert "is it in other units here?" in found.detail


def test_what_numbers_stand_for_is_told_where_classes_have_names(tmp_path):
    (tmp_path / "a.csv").write_text(CSV.replace("cat", "1").replace("dog", "0"))
    found = check_site_data(at_path(tmp_path / "a.csv"), SCHEMA, 0)
    assert [finding.name for finding in found][:3] == ["data", "classes", "labels"]
    assert found[2].ok
    assert "numbers, taken as places in class_names: 0 = 'cat', 1 = 'dog'; write the names" in found[2].detail
    numbered = replace(SCHEMA, class_names=("0", "1"))
    assert "labels" not in [finding.name for finding in check_site_data(at_path(tmp_path / "a.csv"), numbered, 0)]


def test_one_class_alone_is_worth_a_word(tmp_path):
    (tmp_path / "a.csv").write_text(CSV.replace("dog", "cat"))
    found = check_site_data(at_path(tmp_path / "a.csv"), SCHEMA, 0)
    assert found[1].detail == "1 of 2 classes to train on: cat 7; one class alone teaches a network to say nothing else"


def test_a_scale_that_is_still_to_be_found_does_not_keep_a_site_from_being_checked(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    schema = DataSchema(("cat", "dog"), (2,), columns=("height", "width"), scale="pooled")
    assert [finding.name for finding in check_site_data(at_path(tmp_path / "a.csv"), schema, 0)] == ["data", "classes"]


# --- every message starts a fresh process ---


def test_reading_a_table_brings_no_library_that_it_does_not_need(tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    program = f"""
import sys
from fedmerge.deploy.schema import DataSchema
from fedmerge.deploy.site import SiteConfig, SiteData
from fedmerge.deploy.site_data import site_client
heavy = {{"pandas", "sklearn", "scipy", "datasets", "transformers", "PIL", "flwr", "rich", "cryptography"}}
print(sorted(heavy & set(sys.modules)))
schema = DataSchema(("cat", "dog"), (2,), columns=("height", "width"))
site_client(SiteConfig("a", "localhost:1", SiteData(path={str(tmp_path / "a.csv")!r})), schema, seed=0)
print(sorted(heavy & set(sys.modules)))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.split("\n")[0] == "[]"
    assert told.stdout.split("\n")[1] == "[]"
