"""Laws of cleaning and cutting texts, and of joining copies, for every source of texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.core.errors import DataError
from fedmerge.data.sources._texts import (
    LabelledText,
    cleaned,
    collapsed,
    copies,
    decoded,
    headed,
    joined,
    shortened,
    text_pool,
    unescaped,
)

numberings = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12)


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    once = cleaned(text)
    assert cleaned(once) == once
    assert once == collapsed(once)
    assert not any(ord(character) < 32 or "\x80" <= character <= "\x9f" for character in once)


@given(st.text(alphabet="ab \x93é", max_size=40), st.integers(1, 20))
def test_a_cut_text_is_a_beginning_that_ends_where_a_word_ends(text, max_chars):
    text = cleaned(text)
    cut = shortened(text, max_chars)
    assert text.startswith(cut)
    assert len(cut) <= max_chars
    assert cut == cut.strip()
    assert cut == text or text[len(cut)] == " " or " " not in text[: max_chars + 1]
    longer = shortened(text, max_chars + 1)
    assert longer.startswith(cut)


def test_a_word_that_ends_at_the_limit_is_kept():
    assert shortened("one two three", 7) == "one two"
    assert shortened("one two three", 6) == "one"
    assert shortened("onetwothree", 6) == "onetwo"


@given(st.text())
def test_bytes_are_decoded_by_the_encoding_they_are_in(text):
    assert decoded(text.encode("utf-8")) == text
    assert decoded(text.encode("utf-16"), "utf-16") == text


def test_windows_quotes_are_mended_whatever_the_text_was_said_to_be():
    content = "“It’s” – 5 €".encode("cp1252")
    for charset in (None, "us-ascii", "iso-8859-1", "windows-1252", "no-such-encoding", "base64", "x\0y"):
        assert cleaned(decoded(content, charset)) == "“It’s” – 5 €"


def test_names_of_characters_are_replaced_if_they_end_in_a_semicolon():
    assert unescaped("a &lt;b&gt; &nosuch; &amp &#8220;c&#8221;") == "a <b> &nosuch; &amp “c”"


def test_a_title_becomes_a_sentence_before_the_body():
    assert headed("Rates rise", "Banks agree.") == "Rates rise. Banks agree."
    assert headed("Rates rise?", "Yes.") == "Rates rise? Yes."
    assert headed("", "Yes.") == "Yes."
    assert headed("Rates rise", "\n") == "Rates rise"


# --- copies and documents ---


@given(st.lists(st.sampled_from(["A b", "a  B ", "ab", "c"])))
def test_texts_that_differ_in_case_and_white_space_alone_are_copies(texts):
    items = copies(texts)
    for one, text in zip(items, texts, strict=True):
        for other, that in zip(items, texts, strict=True):
            assert (one == other) == (" ".join(text.lower().split()) == " ".join(that.lower().split()))


@given(numberings)
def test_joining_is_the_finest_numbering_that_parts_no_group_of_either(pairs):
    first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    together = joined(first, second)
    linked = {(a, b) for a in range(len(pairs)) for b in range(len(pairs))}
    linked = {(a, b) for a, b in linked if first[a] == first[b] or second[a] == second[b]}
    for _ in pairs:  # the transitive closure, by brute force
        linked |= {(a, d) for a, b in linked for c, d in linked if b == c}
    for a in range(len(pairs)):
        assert {b for b in range(len(pairs)) if together[b] == together[a]} == {b for c, b in linked if c == a}


def _pool(*rows: tuple[str, ...], max_chars: int = 100):
    return text_pool("ours", [LabelledText(*row) for row in rows], ("good", "bad"), max_chars)


def test_a_pool_numbers_labels_and_joins_copies():
    pool = _pool(("Fine  film", "good"), ("dull", "bad"), ("fine film", "bad"))
    assert pool.inputs.tolist() == ["Fine film", "dull", "fine film"]
    assert pool.inputs.dtype.kind == "U"
    assert pool.targets.tolist() == [0, 1, 1]
    assert pool.item.tolist() == [0, 1, 0]
    assert pool.user is None


def test_texts_that_are_the_same_only_after_the_cut_are_copies():
    assert _pool(("one two three", "good"), ("one two four", "bad"), max_chars=8).item.tolist() == [0, 0]


def test_rows_without_a_letter_are_left_out_with_their_documents():
    pool = _pool(("3 .", "good", "a"), ("x", "good", "b"), (" ", "bad", "b"), ("y", "bad", "c"))
    assert pool.inputs.tolist() == ["x", "y"]
    assert pool.user_names == ("b", "c")
    assert pool.user.tolist() == [0, 1]


def test_parts_of_one_document_are_one_item_and_so_are_documents_that_share_a_part():
    pool = _pool(("x", "good", "a"), ("y", "good", "a"), ("Y", "bad", "b"), ("z", "bad", "b"), ("u", "bad", "c"))
    assert pool.user.tolist() == [0, 0, 1, 1, 2]
    assert pool.item.tolist() == [0, 0, 0, 0, 1]


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(DataError, match=r"ours: the archive has labels \['ugly'\]; expected good, bad"):
        _pool(("x", "ugly"))


def test_a_pool_without_texts_is_refused():
    with pytest.raises(DataError, match="ours: no items at all"):
        _pool(("?", "good"))
