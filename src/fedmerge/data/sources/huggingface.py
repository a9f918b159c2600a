"""Data sets of the Hugging Face Hub, and folders and files in the same formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError, FedmergeError, UsageError, unknown_name
from fedmerge.core.options import check_options, option
from fedmerge.core.randomness import generator
from fedmerge.data.fetch import Progress, quiet
from fedmerge.data.pool import Ints, Pool
from fedmerge.data.sources._columns import image_array, number_array, numbered, text_array
from fedmerge.data.sources._registry import Facts, check_extra, pool_name, source

_FILES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@source("huggingface", citation="Lhoest et al. (2021), Datasets: A Community Library for NLP, EMNLP demos")
@dataclass(frozen=True)
class HuggingFace:
    """Any labelled data set of the Hugging Face Hub, or a folder or file in its formats.

    Columns are guessed from the declared types alone: the only image column holds the inputs, the only class-label
    column the labels. Where that does not settle it, the columns must be named.
    """

    facts: ClassVar[Facts] = Facts(
        description='any labelled data set of the Hub (path = "uoft-cs/cifar100") or in its formats on disk',
        licence="the data set's own: see its page",
        extra="huggingface",
        modules=("datasets", "PIL"),
    )

    path: str = option(help="id on the Hub, or a folder (save_to_disk, parquet, arrow, csv, images) or file")
    subset: str | None = option(None, help="configuration of the data set, where it has several")
    splits: tuple[str, ...] = option((), help="splits that are pooled; all if none is named")
    input_column: str | None = option(None, help="column of images, numbers, lists of numbers, texts or lists of words")
    label_column: str | None = option(None, help="column of classes")
    answer_column: str | None = option(
        None, help="of texts: column of completions or of lists of tags, for models that complete or tag"
    )
    user_column: str | None = option(None, help="column of natural users (writers, sites)")
    domain_column: str | None = option(None, help="column of domains (styles, devices)")
    size: int | None = option(None, at_least=1, help="images are scaled to this many pixels per side")
    max_items: int | None = option(None, at_least=1, help="keep this many items, drawn at random, always the same")

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, progress: Progress = quiet) -> Pool:
        """The items of all chosen splits, in their order.

        Raises:
            UsageError: if a column or split is unknown or must be named.
            DataError: if the items cannot be used.
            FedmergeError: if the data set cannot be reached or read.
        """
        check_extra(self)
        progress(f"loading {self.path}", 0, None)
        with _silent():
            table = self._sample(self._pooled(self._open()))
            answers = self._answers(table)
            targets, class_names = self._labels(table) if self._has_labels(table) else _one_class(len(table))
            user, user_names = self._numbered(table, self.user_column)
            domain, domain_names = self._numbered(table, self.domain_column)
            return Pool(
                name=pool_name(self),
                inputs=self._inputs(table, progress),
                targets=targets,
                class_names=class_names,
                user=user,
                domain=domain,
                user_names=user_names,
                domain_names=domain_names,
                answers=answers,
            )

    def _has_labels(self, table: Any) -> bool:
        """Texts with answers need no class; one that is named or declared is kept, to deal them out by."""
        import datasets  # noqa: PLC0415 - optional extra

        declared = any(isinstance(feature, datasets.ClassLabel) for feature in table.features.values())
        return self.answer_column is None or self.label_column is not None or declared

    def _answers(self, table: Any) -> NDArray[Any] | None:
        if self.answer_column is None:
            return None
        column = _known(table, self.answer_column)
        feature = table.features[column]
        names = getattr(getattr(feature, "feature", None), "names", None)
        values = _values(table, column)
        if names is not None:  # tags as numbers with declared names
            values = [None if tags is None else [names[tag] for tag in tags] for tags in values]
        return text_array(values, f"{self.path}, column {column!r}")

    def _open(self) -> Any:
        """What the library makes of the path: one table, or several by split."""
        read = self._reader()
        try:
            return read()
        except ConnectionError as error:
            raise FedmergeError(
                f"cannot load {self.path!r} from the Hugging Face Hub: {error}. Is this machine offline? Load the data "
                "set once on a machine that is not, save it with `save_to_disk`, and give that folder as `path`"
            ) from error
        except Exception as error:  # the library raises many kinds for a damaged file, a wrong name, a missing subset
            raise FedmergeError(f"cannot load {self.path!r} (subset {self.subset!r}): {error}") from error

    def _reader(self) -> Callable[[], Any]:
        """The library's function for this kind of path.

        Raises:
            UsageError: if the path is no id on the Hub and there is no such file, or not one that can be read.
        """
        import datasets  # noqa: PLC0415 - optional extra

        path = Path(self.path).expanduser()
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return partial(datasets.load_from_disk, str(path))
        if path.is_file():
            return partial(datasets.load_dataset, _builder(path), data_files=str(path))
        if path.is_dir():
            return partial(datasets.load_dataset, str(path), name=self.subset)
        if _is_local(self.path):
            raise UsageError(f"no such file or folder: {self.path}")
        return partial(datasets.load_dataset, self.path, name=self.subset)

    def _pooled(self, opened: Any) -> Any:
        """The chosen splits one after another."""
        import datasets  # noqa: PLC0415 - optional extra

        tables = opened if isinstance(opened, datasets.DatasetDict) else {str(opened.split or "all"): opened}
        unknown = [split for split in self.splits if split not in tables]
        if unknown:
            raise UsageError(unknown_name(f"split of {self.path}", unknown[0], tables))
        chosen = {name: tables[name] for name in self.splits or tables}
        try:
            return datasets.concatenate_datasets(list(chosen.values()))
        except ValueError as error:
            raise DataError(
                f"{self.path}: the splits {', '.join(chosen)} have different columns; name one in `splits` ({error})"
            ) from error

    def _sample(self, table: Any) -> Any:
        if self.max_items is None or self.max_items >= len(table):
            return table
        drawn = generator(0, "max_items").choice(len(table), self.max_items, replace=False)
        return table.select(np.sort(drawn))

    def _inputs(self, table: Any, progress: Progress) -> NDArray[Any]:
        import datasets  # noqa: PLC0415 - optional extra

        column = _column(table, self.input_column, "input_column", datasets.Image)
        where = f"{self.path}, column {column!r}"
        if isinstance(table.features[column], datasets.Image):
            return image_array(_counted(table.select_columns([column]), column, progress), self.size, where)
        if self.size is not None:
            raise UsageError(f"{where}: `size` is for images, and the column's type is {table.features[column]}")
        if _holds_texts(table.features[column]):
            return text_array(_values(table, column), where)
        # without a type the library would widen uint8 images [c, h, w] to int64
        kept = {"dtype": np.uint8} if getattr(table.features[column], "dtype", None) == "uint8" else {}
        return number_array(table.select_columns([column]).with_format("numpy", **kept)[:][column], where)

    def _labels(self, table: Any) -> tuple[Ints, tuple[str, ...]]:
        import datasets  # noqa: PLC0415 - optional extra

        column = _column(table, self.label_column, "label_column", datasets.ClassLabel)
        where = f"{self.path}, column {column!r}"
        values = _values(table, column)
        if not isinstance(table.features[column], datasets.ClassLabel):
            return numbered(values, where)
        unlabelled = sum(value is None or value < 0 for value in values)
        if unlabelled:
            raise DataError(f"{where}: {unlabelled} of {len(values)} items have no label; name labelled `splits`")
        return np.array(values, dtype=np.int64), tuple(table.features[column].names)

    def _numbered(self, table: Any, column: str | None) -> tuple[Ints | None, tuple[str, ...]]:
        if column is None:
            return None, ()
        values = _values(table, _known(table, column))
        declared = getattr(table.features[column], "names", None)
        if declared is not None:
            values = [None if value is None or value < 0 else declared[value] for value in values]
        return numbered(values, f"{self.path}, column {column!r}")


def _one_class(count: int) -> tuple[Ints, tuple[str, ...]]:
    return np.zeros(count, dtype=np.int64), ("text",)


def _holds_texts(feature: Any) -> bool:
    """Whether a column is declared as texts or as lists of them."""
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _builder(path: Path) -> str:
    if path.suffix not in _FILES:
        raise UsageError(f"{path} is not a kind of file that can be read; accepted: {', '.join(sorted(_FILES))}")
    return _FILES[path.suffix]


def _is_local(path: str) -> bool:
    """Whether the path cannot be an id on the Hub, which is ``name`` or ``owner/name``."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in _FILES


def _known(table: Any, column: str) -> str:
    if column not in table.features:
        raise UsageError(unknown_name("column", column, table.features))
    return column


def _column(table: Any, chosen: str | None, option_name: str, declared: type) -> str:
    """The chosen column, or the only one of the declared type."""
    if chosen is not None:
        return _known(table, chosen)
    found = [name for name, feature in table.features.items() if isinstance(feature, declared)]
    if len(found) == 1:
        return str(found[0])
    columns = "; ".join(f"{name}: {feature}" for name, feature in table.features.items())
    raise UsageError(
        f"cannot tell the {option_name}: {len(found)} columns are of type {declared.__name__}, expected one. "
        f"Set `{option_name}` to one of: {columns}"
    )


def _values(table: Any, column: str) -> list[Any]:
    return list(table.select_columns([column])[:][column])


def _counted(table: Any, column: str, progress: Progress) -> Iterator[Any]:
    """The column's values one by one, with progress."""
    for number, row in enumerate(table):
        if number % 1000 == 0:
            progress("reading images", number, len(table))
        yield row[column]


@contextmanager
def _silent() -> Iterator[None]:
    """Within the block the library draws no progress bars; afterwards as before."""
    from datasets.utils import (  # noqa: PLC0415 - optional extra
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
