"""Texts become tokens once: what goes to the encoder, what comes out, and who is named if it cannot be used."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from encoders import Letters, arrays_of, padded
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.core.errors import DataError, RowError
from fedmerge.data.cache import cached_arrays, cached_pool
from fedmerge.data.encoding import NO_TARGET, Encoder, encode_pool, encoded, tag_names
from fedmerge.data.pool import Pool
from fedmerge.data.sources._texts import copies

NO = NO_TARGET


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pool(texts=("ab", "c d", "zab"), answers=None, **changes):
    values = {"name": "toy", "targets": np.arange(len(texts)) % 2, "class_names": ("x", "y"), **changes}
    return Pool(inputs=arrays_of(texts), answers=None if answers is None else arrays_of(answers), **values)


def test_the_encoder_of_these_tests_is_one():
    assert isinstance(Letters(), Encoder)


# ---------------------------------------------------------------------------------------- pools


def test_classes_have_tokens_and_no_targets():
    found = encode_pool(pool(), Letters())
    assert found.inputs.tolist() == [padded(0, 1), padded(2, 3), padded(25, 0, 1)]
    assert (found.targets, found.tags) == (None, ())


def test_tags_are_numbered_in_the_order_of_their_names():
    found = encode_pool(pool(("the cat sat", "cats"), ("D N V", "N")), Letters("tags"))
    assert found.tags == ("D", "N", "V")
    assert found.targets.tolist() == [padded(0, 1, 2, fill=NO), padded(1, fill=NO)]


def test_only_the_completion_is_a_target():
    found = encode_pool(pool(("ab", "c"), ("de", "f")), Letters("completions"))
    assert found.inputs.tolist() == [padded(0, 1, 3, 4), padded(2, 5)]
    assert found.targets.tolist() == [padded(NO, NO, 3, 4, fill=NO), padded(NO, 5, fill=NO)]
    assert found.tags == ()


def test_answers_play_no_part_for_classes():
    """One pool serves models that tell classes and models that complete."""
    assert encode_pool(pool(("a", "b"), ("long", "answers")), Letters()).targets is None


@pytest.mark.parametrize("kind", ["classes", "tags", "completions"])
def test_a_pool_is_encoded_once(kind):
    encoder, texts = Letters(kind), pool(("a", "b"), ("c", "d"))
    first, again = encode_pool(texts, encoder), encode_pool(texts, encoder)
    assert encoder.calls == [2]
    assert np.array_equal(first.inputs, again.inputs)
    assert first.tags == again.tags
    assert (first.targets is None) == (again.targets is None) == (kind == "classes")
    assert kind == "classes" or np.array_equal(first.targets, again.targets)


@pytest.mark.parametrize("change", ["text", "answer", "encoder"])
def test_what_the_tokens_depend_on_makes_them_anew(change):
    first = Letters("completions")
    second = Letters("completions", 7) if change == "encoder" else Letters("completions")
    encode_pool(pool(("a", "b"), ("c", "d")), first)
    encode_pool(pool(("a", "z" if change == "text" else "b"), ("c", "z" if change == "answer" else "d")), second)
    assert second.calls == [2]


def test_names_of_classes_do_not_make_them_anew():
    encoder = Letters()
    encode_pool(pool(), encoder)
    encode_pool(pool(class_names=("p", "q"), name="other"), encoder)
    assert encoder.calls == [3]


def test_a_network_that_reads_numbers_is_refused():
    with pytest.raises(DataError, match="toy holds texts, which this network cannot read; use a language model"):
        encode_pool(pool(), None)


def test_a_text_that_cannot_be_used_is_named_by_its_row():
    with pytest.raises(DataError, match="toy, text 1 from 0: got '!', in which no letter is known"):
        encode_pool(pool(("a", "!", "?")), Letters())


@pytest.mark.parametrize(
    ("kind", "message"),
    [("tags", "the model's task needs one tag per word"), ("completions", "needs a completion for each prompt")],
)
def test_a_task_that_needs_answers_is_refused_without_them(kind, message):
    with pytest.raises(DataError, match=f"toy has a class for each text only; .*{message}"):
        encode_pool(pool(), Letters(kind))


def test_a_refused_pool_leaves_nothing_behind():
    bad = pool(("a", "!"))
    for _ in range(2):
        with pytest.raises(DataError, match="text 1 from 0"):
            encode_pool(bad, Letters())


# ---------------------------------------------------------------------------------------- pieces


def test_tag_names_are_sorted_and_distinct():
    assert tag_names(arrays_of(["N V", "D N"]), Letters("tags"), "toy") == ("D", "N", "V")
    assert tag_names(arrays_of(["N V"]), Letters("completions"), "toy") == ()
    assert tag_names(None, Letters(), "toy") == ()


def test_a_fault_is_told_with_where_its_row_stands():
    with pytest.raises(DataError, match=r"^line 12: 2 words and 1 tags; expected one tag per word$") as caught:
        encoded(arrays_of(["a", "b c"]), arrays_of(["N", "N"]), Letters("tags"), ["N"], lambda row: f"line {row + 11}")
    assert isinstance(caught.value.__cause__, RowError)
    assert caught.value.__cause__.row == 1


@given(st.lists(st.sampled_from(["A b", "a  B ", "ab", "c", ""])))
def test_texts_that_differ_in_case_and_white_space_alone_are_the_same(texts):
    found = copies(texts)
    for one, text in zip(found, texts, strict=True):
        for other, that in zip(found, texts, strict=True):
            assert (one == other) == (text.lower().split() == that.lower().split())


# ---------------------------------------------------------------------------------------- arrays that are kept


def build(calls, value=1):
    def made():
        calls.append(value)
        return {"a": np.arange(4).reshape(2, 2) * value, "b": np.array([0.5])}

    return made


def test_arrays_are_built_once_for_a_key(cache):
    calls = []
    first, again = (cached_arrays("things", ("key", "2"), build(calls)) for _ in range(2))
    assert calls == [1]
    assert first.keys() == again.keys() == {"a", "b"}
    assert np.array_equal(first["a"], again["a"])
    assert again["a"].dtype == np.int64
    assert [path.parent.name for path in cache.rglob("*.npz")] == ["things"]


def test_another_key_or_name_is_another_file():
    calls = []
    for name, key in (("things", ("a",)), ("things", ("b",)), ("others", ("a",)), ("things", ("a", "b"))):
        cached_arrays(name, key, build(calls))
    assert len(calls) == 4


def test_damaged_arrays_are_built_again(cache, caplog):
    calls = []
    cached_arrays("things", ("key",), build(calls))
    (path,) = cache.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING):
        found = cached_arrays("things", ("key",), build(calls))
    assert len(calls) == 2
    assert found["b"].tolist() == [0.5]
    assert "is damaged" in caplog.text
    cached_arrays("things", ("key",), build(calls))
    assert len(calls) == 2


def test_a_pool_of_texts_comes_back_from_the_cache_as_it_was():
    whole = pool(("a", "bc"), ("d", "e"), domain=np.array([0, 1]), domain_names=("p", "q"), class_tasks=("p", "q"))
    for _ in range(2):
        found = cached_pool("toy", ("key",), lambda: whole)
        assert found.sha256() == whole.sha256()
        assert found.class_tasks == ("p", "q")
        assert found.answers.tolist() == ["d", "e"]
        assert replace(found, answers=None).sha256() != whole.sha256()
