"""Labelled texts as a pool: cleaned, cut, and copies of one text joined to one item."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from fedmerge.core.errors import DataError
from fedmerge.data.pool import Ints, Pool

# Texts that were Windows-1252 and were read as Latin-1 have its quotes and dashes at U+0080..U+009F, which are
# control characters that no text uses.
_WINDOWS = {code: bytes([code]).decode("cp1252", errors="ignore") for code in range(0x80, 0xA0)}
# Control characters but for white space, soft hyphens, zero-width marks, private use, and the mark of what was lost.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f\xad\u200b-\u200f\u2060\ue000-\uf8ff\ufeff\ufffd]")
_ENTITY = re.compile(r"&#?\w{1,31};")


class LabelledText(NamedTuple):
    """One row of a source.

    Attributes:
        text: As the archive has it.
        label: Its class by name.
        document: The document that it is a part of, if there are several parts.
    """

    text: str
    label: str
    document: str | None = None


def text_pool(name: str, rows: Iterable[LabelledText], class_names: Sequence[str], max_chars: int) -> Pool:
    """Rows as a pool of texts; rows without a single letter are left out.

    Identical texts are one item, and so are the texts of one document, which is also their user.

    Args:
        name: Of the pool.
        rows: In the order of the pool; all of them have a document, or none.
        class_names: [K] all classes.
        max_chars: Longest text that is kept whole.

    Raises:
        DataError: if a label is not among the classes, or nothing is left.
    """
    index = {label: number for number, label in enumerate(class_names)}
    cut = [row._replace(text=shortened(cleaned(row.text), max_chars)) for row in rows]
    kept = [row for row in cut if any(map(str.isalpha, row.text))]
    unknown = sorted({row.label for row in kept} - set(index))
    if unknown:
        raise DataError(f"{name}: the archive has labels {unknown}; expected {', '.join(class_names)}")
    texts = [row.text for row in kept]
    documents = [row.document for row in kept if row.document is not None]
    user_names, user = _numbers(documents)
    return Pool(
        name=name,
        inputs=np.array(texts, dtype=np.str_),
        targets=np.array([index[row.label] for row in kept], dtype=np.int64),
        class_names=tuple(class_names),
        user=user if documents else None,
        item=joined(copies(texts), user) if documents else copies(texts),
        user_names=user_names,
    )


def decoded(content: bytes, charset: str | None = None) -> str:
    r"""Bytes as text: in the given encoding, else in UTF-8, else in Latin-1, which takes any bytes.

    What was Windows-1252 in truth is mended by `cleaned`.

    >>> decoded(b"\xa315.8m"), decoded(b"\xc2\xa3", "no-such-encoding")
    ('£15.8m', '£')
    """
    for encoding in (charset, "utf-8"):
        with suppress(LookupError, ValueError):
            return content.decode(encoding or "utf-8")
    return content.decode("latin-1")


def unescaped(text: str) -> str:
    """The text with HTML's names of characters replaced by them; only those that end in a semicolon.

    >>> unescaped("R&amp;D, caf&#233; ?a=1&copy=2")
    'R&D, café ?a=1&copy=2'
    """
    return _ENTITY.sub(lambda found: html.unescape(found.group()), text)


def cleaned(text: str) -> str:
    r"""The text with Windows-1252 characters mended, invisible ones removed and white space collapsed.

    >>> cleaned("It\x92s\tfun\n")
    'It’s fun'
    """
    return collapsed(_INVISIBLE.sub("", text.translate(_WINDOWS)))


def collapsed(text: str) -> str:
    """The text with every run of white space replaced by one space, and none at its ends."""
    return " ".join(text.split())


def shortened(text: str, max_chars: int) -> str:
    """The text's longest beginning of at most `max_chars` characters that ends where a word ends.

    A single word that is longer is cut where it must be.

    >>> shortened("a fine film", 6)
    'a fine'
    """
    if len(text) <= max_chars:
        return text
    whole_words, space, _ = text[: max_chars + 1].rpartition(" ")
    return whole_words.rstrip() if space else text[:max_chars]


def headed(title: str, body: str) -> str:
    """A title and what follows it as one text.

    >>> headed("Ad sales rise ", "Profits jumped.")
    'Ad sales rise. Profits jumped.'
    """
    title, body = title.strip(), body.strip()
    ends_alone = not title or not body or title.endswith((".", "!", "?", ":", ";"))
    return f"{title} {body}".strip() if ends_alone else f"{title}. {body}"


def copies(texts: Iterable[str]) -> Ints:
    """[n] One number per text, the same for texts that differ in case and white space only.

    >>> copies(["A film", "another", "a  film"]).tolist()
    [0, 1, 0]
    """
    return _numbers(collapsed(text).lower() for text in texts)[1]


def joined(first: Ints, second: Ints) -> Ints:
    """[n] One number per row, the same for rows that share a number in either numbering, or are linked by such rows.

    >>> joined(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])).tolist()
    [0, 0, 0, 1]
    """
    from scipy.sparse import coo_array  # noqa: PLC0415 - takes 0.2 s to import
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    num_first, num_second = int(first.max(initial=-1)) + 1, int(second.max(initial=-1)) + 1
    num_nodes = num_first + num_second
    links = coo_array((np.ones(len(first), dtype=np.int8), (first, num_first + second)), shape=(num_nodes, num_nodes))
    _, part_of_node = connected_components(links.tocsr(), directed=False)
    return _numbers(part_of_node[first].tolist())[1]


def _numbers(values: Iterable[object]) -> tuple[tuple[str, ...], Ints]:
    """Distinct values in order of first appearance, and each value's place among them."""
    index: dict[object, int] = {}
    places = [index.setdefault(value, len(index)) for value in values]
    return tuple(map(str, index)), np.array(places, dtype=np.int64)
