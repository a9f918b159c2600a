"""The real archives, fetched into an empty cache: run with FEDMERGE_NETWORK_TESTS=1."""

from __future__ import annotations

import os

import numpy as np
import pytest

from fedmerge.data.sources import available, get

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(os.environ.get("FEDMERGE_NETWORK_TESTS") != "1", reason="set FEDMERGE_NETWORK_TESTS=1"),
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    ("name", "options", "shape", "classes"),
    [
        ("mnist-5k", {}, (5_000, 1, 28, 28), 10),
        ("fashion-mnist", {}, (70_000, 1, 28, 28), 10),
        ("fashion-mnist", {"size": 14}, (70_000, 1, 14, 14), 10),
        ("glyphs", {}, (40_690, 1, 28, 28), 94),
        ("glyphs", {"charset": "alnum62", "size": 14}, (28_144, 1, 14, 14), 62),
        ("glyphs", {"charset": "case36", "size": 14}, (28_144, 1, 14, 14), 36),
        ("glyphs", {"charset": "digits"}, (4_640, 1, 28, 28), 10),
        ("emoji-domains", {}, (5_535, 3, 32, 32), 10),
        ("emoji-domains", {"labels": "group", "size": 16}, (7_930, 3, 16, 16), 8),
        ("emoji-domains", {"labels": "subgroup", "size": 16}, (7_175, 3, 16, 16), 66),
    ],
)
def test_a_source_holds_as_much_as_it_says(name, options, shape, classes):
    pool = get(name, options)
    assert pool.inputs.shape == shape
    assert pool.inputs.dtype == np.uint8
    assert len(pool.class_names) == classes == len(np.unique(pool.targets))
    assert available(name).fetched


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist-5k"])
def test_classes_are_of_one_size(name):
    assert len(set(np.bincount(get(name).targets).tolist())) == 1


def test_glyphs_have_292_families_and_emoji_5_vendors():
    glyphs, emoji = get("glyphs"), get("emoji-domains")
    assert len(np.unique(glyphs.user)) == 292
    assert np.bincount(emoji.domain).tolist() == [1_107] * 5
    assert len(np.unique(emoji.item)) == 937
