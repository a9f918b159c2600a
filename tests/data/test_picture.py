"""The picture of a federation."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from pools import random_pool

from fedmerge.data.byo import from_arrays
from fedmerge.data.deal import deal
from fedmerge.data.partitions import PARTITIONS
from fedmerge.data.picture import partition_svg

SVG = "{http://www.w3.org/2000/svg}"
SIZES = {"train": 6, "validation": 0, "test": 2}


def picture(kind="iid", pool=None, **options):
    pool = pool or random_pool(n=6000)
    return partition_svg(deal(pool, PARTITIONS[kind].cls(**SIZES, **options).split(pool, 0)))


def parse(svg):
    return ET.fromstring(svg)  # noqa: S314 - our own file


def texts(svg):
    return [element.text for element in parse(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("clients", [1, 2, 5, 50, 200, 201, 500])
@pytest.mark.parametrize("num_classes", [2, 20])
def test_everything_drawn_lies_within_the_picture(clients, num_classes):
    root = parse(picture(pool=random_pool(n=6000, num_classes=num_classes), clients=clients))
    width, height = float(root.get("width")), float(root.get("height"))
    for element in root.iter():
        x, y = element.get("x"), element.get("y")
        if x is not None and element.tag == f"{SVG}rect":
            assert 0 <= float(x) <= float(x) + float(element.get("width")) <= width
        for corner in re.findall(r"M(\S+) ([\d.]+)h([\d.]+)v([\d.]+)", element.get("d") or ""):
            left, top, across, down = map(float, corner)
            assert 0 <= left <= left + across <= width
            assert 0 <= top <= top + down <= height
        if y is not None and element.tag == f"{SVG}text":
            assert -12 <= float(y) <= height


def test_it_needs_nothing_from_elsewhere():
    svg = picture("rotations", clients=10)
    assert re.findall(r'(?:href|src|url)\b|<script|https?://[^"]*', svg) == ["http://www.w3.org/2000/svg"]
    assert "prefers-color-scheme: dark" in svg


def test_it_has_one_cell_for_every_class_of_every_client():
    """Two clients with one and two classes: three filled cells under two bars of train items."""
    data = from_arrays({"a": ([[0.0]], [0]), "b": ([[1.0], [2.0]], [0, 1])}, validation=0, test=0)
    svg = partition_svg(data)
    paths = [element.get("d") for element in parse(svg).iter(f"{SVG}path")]
    assert sum(path.count("M") for path in paths) == 2 + 3


def test_it_says_what_is_in_it():
    svg = picture("permuted", clients=4, groups=2)
    assert "toy, permuted over 4 clients" in texts(svg)
    assert "4 clients, 5 classes; items per client: 6 train, 0 validation, 2 test" in texts(svg)
    assert {"a", "b", "c", "d", "e", "0", "3", "group 0 own labels", "group 1 own labels"} <= set(texts(svg))
    assert "client-2: 6 train, 0 validation, 2 test" in svg


def test_groups_are_told_apart_by_colour_and_name():
    svg = picture("rotations", clients=5)
    assert {"group 0", "group 1 90°", "group 2 180°", "group 3 270°", "group 4 inverted"} <= set(texts(svg))
    assert all(f"var(--g{group})" in svg for group in range(5))


def test_very_many_clients_share_columns_and_the_picture_says_so():
    svg = picture(clients=500)
    assert "every column is the mean of 3 clients" in texts(svg)
    assert svg.count('class="hover"') == 167  # ceil(500 / 3)


def test_very_many_classes_share_rows_and_the_picture_says_so():
    labels = np.arange(250)
    svg = partition_svg(from_arrays({"a": (labels[:, None].astype(float), labels)}, validation=0, test=0))
    assert "every row is the sum of 3 classes" in texts(svg)


def test_names_cannot_break_the_picture():
    evil = "<script>&\"'\x00\x1b\ud800]]>"
    data = from_arrays({"<b>&": ([[0.0], [1.0]], [0, 1])}, validation=0, test=0, class_names=(evil, "b"))
    svg = partition_svg(data)
    parse(svg.encode())
    assert "<script" not in svg


def test_it_depends_on_the_data_alone():
    assert picture("rotations", clients=10) == picture("rotations", clients=10)
