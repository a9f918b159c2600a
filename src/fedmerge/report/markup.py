"""HTML and SVG elements in which every plain text is escaped by construction."""

from __future__ import annotations

import html
import re

_TURNS = "\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""Marks that turn the direction of writing around, also of what follows."""
_UNPRINTABLE = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_TURNS}\ufffe\uffff]")


class Markup(str):
    """Text that is markup already; only `element`, `escape` and `join` make it."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Any text as it may stand in an element or a quoted attribute; what a page cannot hold becomes U+FFFD.

    >>> escape("<b> & 'c'")
    '&lt;b&gt; &amp; &#x27;c&#x27;'
    """
    if isinstance(text, Markup):
        return text
    encodable = str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Markup(html.escape(_UNPRINTABLE.sub("\ufffd", encodable)))


def join(*parts: object) -> Markup:
    """Parts one after another: plain texts escaped, None left out."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """One element. ``class_`` stands for class, ``stroke_width`` for stroke-width; None leaves an attribute out.

    >>> element("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if not children:
        return Markup(f"<{tag}{written}>" if tag in _VOID else f"<{tag}{written}></{tag}>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


_VOID = frozenset({"meta", "br", "hr", "col"})


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(value)


def shorten(text: str, length: int) -> str:
    """At most `length` characters; an ellipsis stands for a missing middle, because like names differ at their ends.

    >>> shorten("fedmerge official, d = 10", 16)
    'fedmerg…, d = 10'
    """
    if len(text) <= length:
        return text
    tail = length // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"
