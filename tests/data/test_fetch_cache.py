"""The cache of parsed pools: whole or absent, built once."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fedmerge.core.errors import FedmergeError
from fedmerge.data.cache import cache_folder, cached_pool
from fedmerge.data.pool import Pool


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


FULL = Pool(
    name="tiny size=2",
    inputs=np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2),
    targets=np.array([0, 1, 1, 0]),
    class_names=("cat", "Ænigma"),
    user=np.array([0, 0, 1, 1]),
    domain=np.array([0, 1, 0, 1]),
    item=np.array([0, 1, 2, 2]),
    user_names=("a", "b"),
    domain_names=("c", "d"),
)
BARE = Pool(name="bare", inputs=np.ones((2, 3), dtype=np.float32), targets=np.array([0, 1]), class_names=("0", "1"))


def never() -> Pool:
    raise AssertionError("built although it is in the cache")


def pool_file(cache: Path) -> Path:
    (path,) = (cache / "pools").glob("*.npz")
    return path


@pytest.mark.parametrize("pool", [FULL, BARE], ids=["all columns", "no columns"])
def test_what_comes_back_is_what_was_built(pool):
    cached_pool("tiny", ("key",), lambda: pool)
    back = cached_pool("tiny", ("key",), never)
    for field in dataclasses.fields(Pool):
        built, read = getattr(pool, field.name), getattr(back, field.name)
        if isinstance(built, np.ndarray):
            np.testing.assert_array_equal(read, built, strict=True)
        else:
            assert read == built


@pytest.mark.parametrize("other", [("key", "more"), ("yek",), ("key ",)])
def test_another_key_is_another_pool(other):
    cached_pool("tiny", ("key",), lambda: FULL)
    assert cached_pool("tiny", other, lambda: BARE).name == "bare"
    assert cached_pool("tiny", ("key",), never).name == "tiny size=2"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _flip(path: Path) -> None:
    """One bit of the inputs."""
    content = bytearray(path.read_bytes())
    content[content.index(FULL.inputs.tobytes()) + 5] ^= 1
    path.write_bytes(content)


def _plant_pickle(path: Path) -> None:
    np.savez(path, inputs=np.array([{"not": "numbers"}], dtype=object))


@pytest.mark.parametrize("damage", [_cut, _flip, _plant_pickle, lambda path: path.write_bytes(b"")])
def test_a_damaged_pool_is_named_and_built_again(cache, damage, caplog):
    cached_pool("tiny", ("key",), lambda: FULL)
    damage(pool_file(cache))
    with caplog.at_level(logging.WARNING):
        assert cached_pool("tiny", ("key",), lambda: BARE).name == "bare"
    assert f"{pool_file(cache)} is damaged" in caplog.text
    assert cached_pool("tiny", ("key",), never).name == "bare"


def test_a_build_that_fails_leaves_nothing(cache):
    with pytest.raises(AssertionError):
        cached_pool("tiny", ("key",), never)
    assert list((cache / "pools").glob("*.npz*")) == [next((cache / "pools").glob("*.lock"))]


def test_what_a_killed_build_left_is_overwritten(cache):
    cached_pool("tiny", ("key",), lambda: FULL)
    path = pool_file(cache)
    path.rename(path.with_name(path.name + ".part"))
    cached_pool("tiny", ("key",), lambda: FULL)
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".lock", ".npz"]


def test_two_builders_of_one_pool_build_it_once():
    built = []

    def build() -> Pool:
        built.append(1)
        time.sleep(0.2)
        return FULL

    threads = [threading.Thread(target=cached_pool, args=("tiny", ("key",), build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(FedmergeError, match=r"cannot write to the cache folder .*file/pools: .*FEDMERGE_CACHE"):
        cached_pool("tiny", ("key",), lambda: FULL)


def test_the_environment_names_the_folder(cache, monkeypatch):
    assert cache_folder() == cache
    monkeypatch.setenv("FEDMERGE_CACHE", "")
    assert cache_folder().name == "fedmerge"
