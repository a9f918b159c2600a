"""The partition file, and dealing a pool out by it."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pools import random_pool

from fedmerge.core.errors import DataError
from fedmerge.data.deal import deal
from fedmerge.data.federated import ClientData, Examples, FederatedData, check_federation
from fedmerge.data.partition import ClientPart, Partition
from fedmerge.data.partitions import PARTITIONS
from fedmerge.data.pool import Pool
from fedmerge.data.transform import scale_of, turn


def rows(*numbers):
    return np.array(numbers, dtype=np.int64)


def part(name="a", train=(0, 1), validation=(2,), test=(3,), **traits):
    return ClientPart(name, rows(*train), rows(*validation), rows(*test), **traits)


def partition(*clients, pool=None):
    pool = pool or random_pool()
    return Partition("by hand", 0, {"note": "x"}, pool.name, pool.sha256(), len(pool), clients or (part(),))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "partition.json"
    partition(part(group=1, relabel=(1, 0, 2, 3, 4), rotation=90.0), part("b", (5,), (), ())).save(path)
    return path


def test_the_file_is_canonical_json_with_its_hash(saved):
    text = saved.read_text()
    plain = json.loads(text)
    assert text == json.dumps(plain, sort_keys=True, separators=(",", ":")) + "\n"
    assert plain["sha256"] == Partition.load(saved).sha256()
    assert [path.name for path in saved.parent.iterdir()] == ["partition.json"]


TAMPERED = {
    "another row": (lambda p: p["clients"][0]["train"].__setitem__(0, 7), "it says sha256"),
    "another seed": (lambda p: p.update(seed=1), "it says sha256"),
    "no hash": (lambda p: p.pop("sha256"), "it says sha256 None"),
    "a row below zero": (lambda p: p["clients"][0]["train"].__setitem__(0, -1), "expected 0..1199"),
    "a row beyond the pool": (lambda p: p["clients"][0]["test"].__setitem__(0, 1200), "expected 0..1199"),
    "a row beyond int64": (lambda p: p["clients"][0]["test"].__setitem__(0, 2**80), "which no 64 bits can hold"),
    "half a row": (
        lambda p: p["clients"][0]["train"].__setitem__(0, 1.5),
        "'a', train: expected a list of whole numbers",
    ),
    "true for a row": (lambda p: p["clients"][0]["train"].__setitem__(0, True), "expected a list of whole numbers"),
    "a row on two sides": (lambda p: p["clients"][0]["test"].__setitem__(0, 0), "row 0 is used for train and for test"),
    "a side at another client": (lambda p: p["clients"][1]["train"].append(3), "row 3 is used for train and for test"),
    "a row twice": (lambda p: p["clients"][0]["train"].append(0), "a row stands twice in its train rows"),
    "no train rows": (lambda p: p["clients"][0].update(train=[]), "nothing to train on"),
    "no permutation": (lambda p: p["clients"][0].update(relabel=[0, 0, 1, 2, 3]), "not a permutation"),
    "an endless angle": (
        lambda p: p["clients"][0].update(rotation=float("inf")),
        "got Infinity; expected finite numbers",
    ),
    "no number in the options": (lambda p: p["options"].update(alpha=float("nan")), "got NaN; expected finite numbers"),
    "one name twice": (lambda p: p["clients"][1].update(name="a"), "two clients are called 'a'"),
    "no clients": (lambda p: p.update(clients=[]), "no clients"),
    "clients of another type": (lambda p: p.update(clients="ab"), "no clients|clients: got"),
    "a client of another type": (lambda p: p["clients"].append(3), "a client is 3"),
    "a missing field": (lambda p: p.pop("pool_size"), "pool_size: missing"),
    "a field too many": (lambda p: p.update(colour="red"), "unknown option 'colour'"),
    "a text for the seed": (lambda p: p.update(seed="0"), "seed: got '0'; expected a whole number"),
    "another format": (lambda p: p.update(format="fedmerge partition 9"), "its format is not 'fedmerge partition 1'"),
}


@pytest.mark.parametrize("what", sorted(TAMPERED))
def test_a_tampered_file_is_refused(what, saved):
    tamper, message = TAMPERED[what]
    plain = json.loads(saved.read_text())
    tamper(plain)
    saved.write_text(json.dumps(plain))
    with pytest.raises(DataError, match=message) as caught:
        Partition.load(saved)
    assert "partition.json is not a whole partition file" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_not_a_json_object_is_refused(content, tmp_path):
    path = tmp_path / "partition.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a whole partition file"):
        Partition.load(path)


def test_every_cut_off_file_is_refused(saved):
    whole = saved.read_bytes()
    for end in range(0, len(whole) - 1, 7):
        saved.write_bytes(whole[:end])
        with pytest.raises(DataError):
            Partition.load(saved)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_any_other_byte_is_refused_unless_it_means_the_same(place, byte, saved):
    whole = bytearray(saved.read_bytes())
    at = int(place * (len(whole) - 1))  # the last byte is the line's end
    if byte != whole[at]:
        whole[at] = byte
        other = saved.with_name("other.json")
        other.write_bytes(whole)
        try:
            assert Partition.load(other).plain() == Partition.load(saved).plain()  # 90e0 is 90.0
        except DataError as error:
            assert "other.json is not a whole partition file" in str(error)  # noqa: PT017 - either outcome is right


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json: no such partition file"):
        Partition.load(tmp_path / "nowhere.json")


def test_another_pool_is_refused():
    with pytest.raises(DataError, match=r"the partition was made for 'toy' with sha256 .* Give the same source"):
        deal(random_pool(1), partition(pool=random_pool(0)))


def test_near_copies_on_two_sides_are_refused():
    pool = random_pool(copies=2)  # rows 0 and 1 are one item, 2 and 3 another
    deal(pool, partition(part(train=(0, 1), validation=(2, 3), test=(4,)), pool=pool))
    with pytest.raises(DataError, match=r"item 1 is used for validation and for test \(1 such\)"):
        deal(pool, partition(part(train=(0, 1), validation=(2,), test=(3,)), pool=pool))


def test_a_permutation_of_another_number_of_classes_is_refused():
    with pytest.raises(DataError, match="relabels 2 classes; toy has 5"):
        deal(random_pool(), partition(part(relabel=(1, 0))))


def images(values):
    return np.array(values, dtype=np.uint8).reshape(-1, 1, 2, 2)


def test_images_are_normalised_by_what_is_trained_on():
    """Train pixels are four 0 and four 102: mean 51, deviation 51. The white test image is (255 - 51) / 51 = 4."""
    pool = Pool("four", images([[0] * 4, [102] * 4, [51] * 4, [255] * 4]), np.array([0, 1, 0, 1]), ("a", "b"))
    client = deal(pool, partition(part(), pool=pool)).clients[0]
    assert client.train.inputs.unique().tolist() == [-1, 1]
    assert client.validation.inputs.unique().tolist() == [0]
    assert client.test.inputs.unique().tolist() == [4]


def test_channels_are_normalised_apart_and_constant_ones_become_zero():
    pixels = np.zeros((4, 2, 2, 2), dtype=np.uint8)
    pixels[:, 0] = 9
    pixels[1::2, 1] = 10
    pool = Pool("two channels", pixels, np.array([0, 1, 0, 1]), ("a", "b"))
    train = deal(pool, partition(part(), pool=pool)).clients[0].train.inputs
    assert train[:, 0].unique().tolist() == [0]
    assert train[:, 1].unique().tolist() == [-1, 1]


def test_float_inputs_stay_as_they_are():
    inputs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    pool = Pool("floats", inputs, np.array([0, 1, 0, 1]), ("a", "b"))
    assert torch.equal(deal(pool, partition(part(), pool=pool)).clients[0].train.inputs, torch.from_numpy(inputs[:2]))


def test_uint8_inputs_that_are_no_images_are_refused():
    pool = Pool("flat", np.zeros((4, 3), dtype=np.uint8), np.array([0, 1, 0, 1]), ("a", "b"))
    with pytest.raises(DataError, match=r"flat: uint8 inputs of shape \(2, 3\); expected images"):
        deal(pool, partition(part(), pool=pool))


SCALE = scale_of(images([[0, 0, 0, 0]]), "zeros")


def test_a_quarter_turn_is_counter_clockwise_and_exact():
    r"""The upper right pixel, 2, moves to the upper left."""
    turned = turn(torch.from_numpy(images([[1, 2, 3, 4]])), 90.0, invert=False, scale=SCALE)
    assert turned.tolist() == [[[[2, 4], [1, 3]]]]
    assert turned.dtype == torch.uint8


def test_four_quarters_and_minus_three_are_whole_turns():
    image = torch.from_numpy(images([[1, 2, 3, 4]]))
    assert torch.equal(turn(image, 360.0, invert=False, scale=SCALE), image)
    assert torch.equal(turn(image, -270.0, invert=False, scale=SCALE), turn(image, 90.0, invert=False, scale=SCALE))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_interpolated_turns_agree_with_exact_ones(degrees):
    image = torch.from_numpy(random_pool(shape=(2, 7, 7)).inputs[:3])
    exact = turn(image, float(degrees), invert=False, scale=SCALE).float()
    near = turn(image, degrees + 1e-4, invert=False, scale=SCALE)
    assert (exact - near).abs().max() < 0.1


def test_corners_are_filled_with_the_background():
    white = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    scale = scale_of(white.numpy(), "white")
    assert turn(white, 45.0, invert=False, scale=scale).unique().tolist() == [255]


def test_a_negative_of_uint8_is_255_minus_x():
    assert turn(torch.from_numpy(images([[0, 1, 254, 255]])), 0.0, invert=True, scale=SCALE).flatten().tolist() == [
        255,
        254,
        1,
        0,
    ]


def test_a_negative_of_floats_stays_in_their_range():
    """The train range is -1..3, so x becomes 2 - x."""
    scale = scale_of(np.array([-1.0, 0.0, 3.0, 1.0], dtype=np.float32).reshape(1, 1, 2, 2), "floats")
    assert turn(torch.tensor([[[[-1.0, 0.0], [3.0, 1.0]]]]), 0.0, invert=True, scale=scale).flatten().tolist() == [
        3,
        2,
        -1,
        1,
    ]


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 2, 3), "2x3 pixels cannot be turned by 90"), ((6,), "cannot be turned or")]
)
def test_what_cannot_be_turned_is_refused(shape, message):
    pool = random_pool(shape=shape)
    object.__setattr__(pool, "inputs", pool.inputs.astype(np.float32))
    with pytest.raises(DataError, match=message):
        deal(pool, partition(part(rotation=90.0), pool=pool))


def test_groups_are_known_only_if_every_client_has_one():
    both = deal(random_pool(), partition(part(group=0), part("b", (4, 5), (), (), group=1)))
    assert both.groups == (0, 1)
    assert deal(random_pool(), partition(part(group=0), part("b", (4, 5), (), ()))).groups is None


def test_the_source_line_names_pool_kind_and_clients():
    data = deal(
        random_pool(), PARTITIONS["iid"].cls(clients=10, train=60, validation=20, test=30).split(random_pool(), 0)
    )
    assert data.input_shape == (1, 4, 4)
    assert data.source == "toy, iid over 10 clients"


def examples(n=2, *, targets=None, inputs=None):
    inputs = torch.zeros(n, 3) if inputs is None else inputs
    return Examples(inputs, torch.arange(n) % 2 if targets is None else torch.tensor(targets))


def federation(**splits):
    own = {"train": examples(), "validation": examples(), "test": examples()} | splits
    return FederatedData((ClientData("a", examples(), examples(), examples()), ClientData("b", **own)), ("x", "y"))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": examples(0)}, "client 'b' has no train examples"),
        ({"test": examples(targets=[0, 2])}, "client 'b', test: labels run from 0 to 2; expected 0..1 for 2 classes"),
        ({"train": examples(inputs=torch.tensor([[0.0] * 3, [0, np.nan, 0]]))}, "'b', train: example 1 has NaN"),
        (
            {"validation": examples(inputs=torch.zeros(2, 4))},
            r"'b', validation: inputs are torch.float32 \[4\]; expected",
        ),
        ({"test": examples(3, targets=[0])}, "3 inputs and 1 labels"),
    ],
)
def test_a_federation_that_cannot_be_trained_on_is_refused(splits, message):
    with pytest.raises(DataError, match=message):
        check_federation(federation(**splits))


def test_a_client_with_one_class_is_logged_and_allowed(caplog):
    with caplog.at_level(logging.WARNING):
        check_federation(federation(train=examples(targets=[1, 1])))
    assert "client 'b' trains on one class only, y" in caplog.text


def test_a_federation_without_clients_is_refused():
    with pytest.raises(DataError, match="no clients"):
        check_federation(dataclasses.replace(federation(), clients=()))
