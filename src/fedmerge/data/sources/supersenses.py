"""Definitions of nouns from the Debian package wordnet-base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedmerge.core.errors import DataError
from fedmerge.core.options import check_options, option
from fedmerge.data.archive import read_deb
from fedmerge.data.fetch import Package, Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import Facts, load_packaged, pool_name, source
from fedmerge.data.sources._texts import LabelledText, text_pool

_FOLDER = "usr/share/wordnet/"
_FIRST_FILE = 3  # WordNet numbers its lexicographer files, and those of nouns begin here
_CLASSES = (
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state", "substance", "time"),
)


@source("supersenses", citation="Miller (1995), WordNet; Ciaramita, Johnson (2003), Supersense Tagging, EMNLP")
@dataclass(frozen=True)
class Supersenses:
    """WordNet's 82,115 definitions of nouns; classes are the 26 files that its authors kept nouns in."""

    facts: ClassVar[Facts] = Facts(
        description="82,115 definitions of nouns, 26 classes of things (animal, artifact, feeling ...)",
        licence="WordNet 3.0 licence: any use, with Princeton University's notice",
        packages=(
            Package(
                client="apt",
                name="wordnet-base",
                version="1:3.0-37",
                sha256="f32e982a013573eeaaa3e100d0006cc45de69c4c9af8e7410749b844a94a7ceb",
                megabytes=6.5,
                folder=_FOLDER,
            ),
        ),
    )
    version: ClassVar[int] = 1

    max_chars: int = option(600, at_least=20, at_most=4000, help="longer texts are cut after a word")

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, progress: Progress = quiet) -> Pool:
        """The items in WordNet's order; fetched through apt-get if not in the cache."""
        return load_packaged(self, progress)

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the Debian package."""
        progress("reading supersenses", 0, None)
        (content,) = read_deb(archives[0], f"{_FOLDER}data.noun")
        return text_pool(pool_name(self), _read_glosses(content.decode("ascii")), _CLASSES, self.max_chars)


def _read_glosses(content: str) -> Iterator[LabelledText]:
    """The first definition of every set of synonyms, and the name of its file.

    A line is ``offset file-number type words pointers | gloss``; those that begin with a space are the licence.
    """
    for line in content.splitlines():
        if line.startswith(" "):
            continue
        head, bar, gloss = line.partition("|")
        fields = head.split()
        if not bar or len(fields) < 2 or not fields[1].isdigit():
            raise DataError(f"data.noun has a line that is not WordNet's: {line[:80]!r}")
        number = int(fields[1]) - _FIRST_FILE
        if not 0 <= number < len(_CLASSES):
            raise DataError(f"data.noun has a line of file {fields[1]}; expected 03 to 28")
        yield LabelledText(first_definition(gloss), _CLASSES[number])


def first_definition(gloss: str) -> str:
    """A gloss up to the first semicolon, which further definitions and examples follow.

    WordNet opens quotes by a grave accent; a semicolon that is quoted is a part of the definition.

    >>> first_definition(' a dull sound; "a thud"  ')
    'a dull sound'
    >>> first_definition("a punctuation mark (`;'); rare")
    "a punctuation mark (';')"
    """
    definition = re.match(r"(?:`;'|[^;])*", gloss)
    return definition.group().replace("`", "'").strip() if definition else ""
