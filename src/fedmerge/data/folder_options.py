"""Options of a folder with one file per client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.data.sides import side_shares


@dataclass(frozen=True)
class FolderOptions:
    """One file per client: .npz with arrays x and y, .csv or .parquet with a label column."""

    path: str = option(help="folder with the files; a file's name is the client's")
    label_column: str = option("label", help="column of .csv and .parquet files that holds the class")
    text_column: str | None = option(
        None, help="column that holds texts, for language models; other columns than this and the label's do not count"
    )
    tasks: Literal["one", "by-label"] = option(
        "one", help="by-label: clients without a common label have different tasks, each with classes of its own"
    )
    validation: float = option(0.15, at_least=0, below=1, help="share of a client's rows for validation")
    test: float = option(0.15, at_least=0, below=1, help="share of a client's rows for the test")
    standardise: bool = option(False, help="scale every column (image channel) to mean 0, standard deviation 1")
    class_names: tuple[str, ...] = option((), help="names of classes 0..K-1, or the accepted texts; found if not given")

    def __post_init__(self) -> None:
        check_options(self)
        side_shares(self.validation, self.test, "FolderOptions")
        if self.text_column is not None and self.standardise:
            raise UsageError("FolderOptions.standardise: got true for texts, which have no scale; leave it out")
