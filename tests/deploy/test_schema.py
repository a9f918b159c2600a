"""The form of data that all sites of a federation share."""

import sys

import numpy as np
import pandas as pd
import pytest
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.encoders import Letters
from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.core.options import build_options
from fedmerge.data.byo import from_arrays, from_folder
from fedmerge.data.form import TOKENS
from fedmerge.data.transform import standard_scale
from fedmerge.deploy.schema import DataSchema, schema_of_example, schema_of_form
from fedmerge.experiment.config import plain_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CLASSES = ("cat", "dog")


def written_and_read(schema):
    """Through the ``[data]`` table of a file."""
    faults = []
    table = tomllib.loads(tomli_w.dumps({"data": plain_options(schema)}))["data"]
    read = build_options(DataSchema, table, "data", faults)
    assert faults == []
    return read


def faults_of(**table):
    faults = []
    assert build_options(DataSchema, {"class_names": ["a", "b"], "shape": [2], **table}, "data", faults) is None
    return faults


# --- as a table of a file ---

NAMES = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
NUMBERS = st.floats(-1e6, 1e6, width=32)
POSITIVE = st.floats(2**-20, 2.0**20, width=32)


@given(data=st.data())
@settings(deadline=None)
def test_a_schema_survives_its_file(data):
    shape = data.draw(st.sampled_from([(1,), (3,), (2, 3), (3, 4, 5), (1, 2, 2)]))
    size = data.draw(st.sampled_from([1, int(np.prod(shape)), shape[0] if len(shape) == 3 else 1]))
    mean, std = (data.draw(st.lists(kind, min_size=size, max_size=size)) for kind in (NUMBERS, POSITIVE))
    scaled = data.draw(st.booleans())
    schema = DataSchema(
        class_names=tuple(data.draw(st.lists(NAMES, min_size=2, unique=True))),
        shape=shape,
        dtype=data.draw(st.sampled_from(["float32", "uint8"])) if len(shape) == 3 else "float32",
        scale=data.draw(st.sampled_from(["given", "pooled"])),
        mean=tuple(mean) if scaled else None,
        std=tuple(std) if scaled else None,
    )
    read = written_and_read(schema)
    assert read == schema
    if not schema.needs_moments:
        assert read.form.plain() == schema.form.plain()
        assert torch.broadcast_shapes(schema.form.mean.shape, shape) == shape


def test_what_is_left_out_has_no_scale():
    schema = written_and_read(DataSchema(CLASSES, (3,)))
    raw = np.array([[1.5, -2.0, 0.0]], dtype=np.float32)
    assert torch.equal(schema.form.scaled(raw), torch.from_numpy(raw))
    assert (schema.num_classes, schema.input_shape, schema.form.columns) == (2, (3,), None)


def test_channels_and_features_are_scaled_by_their_own_numbers():
    images = DataSchema(CLASSES, (2, 1, 2), "uint8", mean=(1.0, 2.0), std=(1.0, 4.0))
    pixels = np.array([[[[1, 2]], [[2, 6]]]], dtype=np.uint8)
    assert images.form.scaled(pixels).tolist() == [[[[0.0, 1.0]], [[0.0, 1.0]]]]
    grid = DataSchema(CLASSES, (2, 2), mean=(1.0, 2.0, 3.0, 4.0), std=(1.0, 1.0, 1.0, 2.0))
    assert grid.form.scaled(np.full((1, 2, 2), 8.0, np.float32)).tolist() == [[[7.0, 6.0], [5.0, 2.0]]]


BAD = {
    "one class": ({"class_names": ["a"]}, "data.class_names: got ('a',); expected 2 or more different names"),
    "a class twice": ({"class_names": ["a", "a"]}, "data.class_names: got ('a', 'a'); expected 2 or more different"),
    "no name": ({"class_names": ["a", " "]}, "data.class_names: got ('a', ' '); expected 2 or more different names"),
    "no shape": ({"shape": []}, "data.shape: got (); expected one size or more"),
    "nothing along an axis": ({"shape": [0]}, "data.shape: got [0]; expected a list of a whole number >= 1"),
    "a giant": (
        {"shape": [2**20, 2**20]},
        "data.shape: got (1048576, 1048576); expected one size or more, 268,435,456",
    ),
    "flat images": ({"dtype": "uint8"}, "data.shape: got (2,); expected channels, height, width for uint8 images"),
    "texts of two axes": (
        {"dtype": "tokens", "shape": [2, 2]},
        "data.shape: got (2, 2); expected the number of tokens",
    ),
    "too few columns": ({"columns": ["x"]}, "data.columns: got 1 for float32 inputs of shape [2]; expected a name"),
    "a column twice": ({"columns": ["x", "x"]}, "data.columns: got 2 for float32 inputs of shape [2]; expected a name"),
    "tags of numbers": ({"kind": "tags"}, "data.kind: got 'tags' for inputs of type float32; only texts"),
    "mean alone": ({"mean": [0.0]}, "data.mean: got one of mean and std; expected both or neither"),
    "three for two": ({"mean": [0.0] * 3, "std": [1.0] * 3}, "data.mean: got 3 numbers, and 3 of std; expected 1 or 2"),
    "uneven": ({"mean": [0.0] * 2, "std": [1.0]}, "data.mean: got 2 numbers, and 1 of std; expected 1 or 2 of each"),
    "no spread": ({"mean": [0.0], "std": [0.0]}, "data.std: got [0.0]; expected a list of a number > 0 or none"),
    "nan": ({"mean": [float("nan")], "std": [1.0]}, "data.mean: got [nan]; expected a list of a number or none"),
    "vanishing in float32": ({"mean": [0.0], "std": [1e-60]}, "data.mean: the form of the inputs is damaged: got std"),
    "beyond float32": ({"mean": [1e300], "std": [1.0]}, "data.mean: the form of the inputs is damaged: got mean"),
    "texts pooled": ({"dtype": "tokens", "scale": "pooled"}, "data.scale: texts have none"),
    "a text column of numbers": ({"text_column": "t"}, "data.text_column: got 't' for float32 inputs; leave it out"),
    "nothing to train on": ({"validation": 0.5, "test": 0.5}, "data: DataSchema: got validation = 0.5 and test = 0.5"),
    "an unknown option": ({"colums": ["x", "y"]}, "data: unknown option 'colums'; did you mean 'columns'?"),
    "an unknown type": (
        {"dtype": "float16"},
        "data.dtype: got 'float16'; expected one of 'float32', 'uint8', 'tokens'",
    ),
}


@pytest.mark.parametrize(("table", "fault"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_told(table, fault):
    assert any(line.startswith(fault) for line in faults_of(**table)), faults_of(**table)


def test_rules_between_options_are_told_together():
    faults = faults_of(class_names=["a"], columns=["x"], mean=[0.0])
    assert [fault.partition(":")[0] for fault in faults] == ["data.class_names", "data.columns", "data.mean"]


# --- a scale that is still to be found ---


def test_a_pooled_scale_is_unknown_until_it_is_given():
    schema = DataSchema(CLASSES, (2,), scale="pooled")
    assert schema.needs_moments
    with pytest.raises(UsageError, match="the scale of the inputs is not known yet"):
        schema.form  # noqa: B018
    found = schema.with_scale([1.0, 2.0], [3.0, 4.0])
    assert not found.needs_moments
    assert found.form.mean.tolist() == [1.0, 2.0]
    assert found.scale == "pooled"


@pytest.mark.parametrize(
    ("schema", "inputs", "targets"),
    [
        (DataSchema(CLASSES, (3, 2, 2), "uint8"), ((0, 3, 2, 2), torch.float32), (0,)),
        (DataSchema(CLASSES, (7,), TOKENS), ((0, 7), torch.int64), (0,)),
        (DataSchema(("text",), (7,), TOKENS, "completions"), ((0, 7), torch.int64), (0, 7)),
    ],
)
def test_a_server_knows_sites_without_their_examples(schema, inputs, targets):
    data = schema.without_examples(["a", "b"])
    assert [client.name for client in data.clients] == ["a", "b"]
    assert data.input_shape == schema.shape
    assert (data.class_names, data.kind) == (schema.class_names, schema.kind)
    for examples in (data.clients[0].train, data.clients[1].test):
        assert (tuple(examples.inputs.shape), examples.inputs.dtype) == inputs
        assert tuple(examples.targets.shape) == targets


# --- from an example ---


def test_the_schema_of_a_table_has_its_columns_and_classes(tmp_path):
    (tmp_path / "a.csv").write_text("w,pet,h\n1,dog,10\n3,cat,10\n")
    schema = schema_of_example(tmp_path / "a.csv", label_column="pet", validation=0.2, test=0.1)
    assert schema == DataSchema(CLASSES, (2,), label_column="pet", columns=("w", "h"), validation=0.2, test=0.1)
    scaled = schema_of_example(tmp_path / "a.csv", label_column="pet", standardise=True)
    assert (scaled.mean, scaled.std) == ((2.0, 10.0), (1.0, 1.0))  # a column that is the same everywhere becomes 0


def test_classes_that_the_example_lacks_are_given(tmp_path):
    (tmp_path / "a.csv").write_text("x,label\n1,dog\n3,dog\n")
    with pytest.raises(DataError, match=r"every row has the class 'dog'; expected two classes at least. Give class_"):
        schema_of_example(tmp_path / "a.csv")
    assert schema_of_example(tmp_path / "a.csv", class_names=CLASSES).class_names == CLASSES
    with pytest.raises(DataError, match=r"a.csv, line 2: unknown class 'dog'"):
        schema_of_example(tmp_path / "a.csv", class_names=("cat", "cow"))


def test_images_are_scaled_per_channel_of_the_example(tmp_path):
    images = np.zeros((2, 2, 3, 3), dtype=np.uint8)
    images[1, 0] = 10
    np.savez(tmp_path / "a.npz", x=images, y=[0, 1])
    schema = schema_of_example(tmp_path / "a.npz")
    assert (schema.shape, schema.dtype) == ((2, 3, 3), "uint8")
    assert (schema.mean, schema.std) == ((5.0, 0.0), (5.0, 1.0))
    assert schema_of_example(tmp_path / "a.npz", scale="pooled").needs_moments


def test_a_parquet_example_is_scaled_as_its_rows_are_elsewhere(tmp_path):
    rows = np.random.default_rng(0).normal(5, 3, (20, 3)).astype(np.float32)
    pd.DataFrame(rows, columns=["a", "b", "c"]).assign(label=[0, 1] * 10).to_parquet(tmp_path / "a.parquet")
    scale = standard_scale(rows)
    form = schema_of_example(tmp_path / "a.parquet", standardise=True).form
    assert torch.equal(form.mean, scale.mean)
    assert torch.equal(form.std, scale.std)


def test_texts_are_as_long_as_their_encoder_makes_them(tmp_path):
    (tmp_path / "a.csv").write_text("say,label\nab,dog\nc,cat\n")
    schema = schema_of_example(tmp_path / "a.csv", text_column="say", encoder=Letters(length=4))
    assert schema == DataSchema(CLASSES, (4,), TOKENS, text_column="say")
    assert schema.form.dtype == TOKENS
    with pytest.raises(UsageError, match="holds texts, which have no scale"):
        schema_of_example(tmp_path / "a.csv", text_column="say", encoder=Letters(), scale="pooled")
    with pytest.raises(DataError, match="holds texts, which this network cannot read"):
        schema_of_example(tmp_path / "a.csv", text_column="say")


def test_tags_are_the_example_s(tmp_path):
    (tmp_path / "a.csv").write_text("say,label\na b,N V\nc,N\n")
    schema = schema_of_example(tmp_path / "a.csv", text_column="say", encoder=Letters("tags", 4))
    assert (schema.class_names, schema.kind, schema.shape) == (("N", "V"), "tags", (4,))


@pytest.mark.parametrize("standardise", [False, True])
def test_the_form_of_a_simulated_federation_makes_a_schema(tmp_path, standardise):
    (tmp_path / "a.csv").write_text("x,y,label\n" + "".join(f"{i},{i * i},{i % 2}\n" for i in range(20)))
    data = from_folder(tmp_path, standardise=standardise)
    schema = written_and_read(schema_of_form(data.form, class_names=data.class_names))
    assert schema.form.plain() == data.form.plain()
    assert (schema.mean is None) != standardise


def test_one_feature_alone_has_a_scale_of_one_number(tmp_path):
    (tmp_path / "a.csv").write_text("x,label\n" + "".join(f"{i},{i % 2}\n" for i in range(20)))
    data = from_folder(tmp_path, standardise=True)
    schema = written_and_read(schema_of_form(data.form, class_names=data.class_names))
    assert schema.form.plain() == data.form.plain()
    assert schema.form.mean.shape == (1,)


def test_images_of_a_simulated_federation_too():
    pixels = np.arange(40 * 9, dtype=np.int64).reshape(40, 1, 3, 3).astype(np.uint8)
    data = from_arrays({"a": (pixels, np.arange(40) % 2)})
    assert written_and_read(schema_of_form(data.form, class_names=data.class_names)).form.plain() == data.form.plain()


@pytest.mark.parametrize("name", ["nothing.csv", "a.txt", "empty"])
def test_what_is_no_example_is_one_message(tmp_path, name):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FedmergeError, match=name):
        schema_of_example(tmp_path / name)
