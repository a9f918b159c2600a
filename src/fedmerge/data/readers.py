"""One client's file as tables: .npz, .csv, .parquet. Nothing that is read can execute code."""

from __future__ import annotations

import csv
import importlib.util
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge.core.errors import DataError, FedmergeError, unknown_name
from fedmerge.core.text import brief, shortened
from fedmerge.data.npz import MOST_BYTES, read_arrays
from fedmerge.data.partition import SPLITS, Split
from fedmerge.data.pool import Ints
from fedmerge.data.table import Table, check_table, check_texts, make_table

if TYPE_CHECKING:
    import pandas as pd

Tables = dict[Split, Table]
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    csv.Error,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    LookupError,
    TypeError,
    AttributeError,
)
"""What readers of foreign formats raise for damage; each of these has been seen."""


@contextmanager
def _naming(path: Path, expected: str) -> Iterator[None]:
    """Within the block a fault of reading becomes one message that names the file."""
    try:
        yield
    except DataError:
        raise
    except _UNREADABLE as error:
        why = shortened(str(error) or type(error).__name__)
        raise DataError(f"{path} cannot be read ({why}); expected {expected}") from error


def read_npz(path: Path, label_column: str, text_column: str | None = None) -> Tables:  # noqa: ARG001 - one signature
    """Arrays ``x`` and ``y``; ``x_validation``, ``y_validation``, ``x_test`` and ``y_test`` if they are split already.

    Raises:
        DataError: if the file is damaged, holds Python objects or other arrays.
    """
    known = [f"{letter}{ending}" for ending in ("", "_validation", "_test") for letter in "xy"]
    if text_column is not None:
        raise DataError(f"{path}: texts are read from .csv and .parquet files; an .npz file holds numbers")
    with _naming(path, "an .npz file with arrays x and y"):
        try:
            arrays = read_arrays(path, only=known)
        except LookupError as error:
            raise DataError(f"{path}: {unknown_name('array', error.args[0], known)}") from error
    for name in ("x", "y", *map(_partner, arrays)):
        if name not in arrays:
            raise DataError(f"{path} has no array {name!r}; it has {', '.join(sorted(arrays)) or 'none'}")
    endings: dict[Split, str] = {split: "" if split == "train" else f"_{split}" for split in SPLITS}
    return {
        split: make_table(f"{path}{ending and ', ' + split}", arrays["x" + ending], arrays["y" + ending])
        for split, ending in endings.items()
        if "x" + ending in arrays
    }


def _partner(name: str) -> str:
    """The array that must come with this one.

    >>> _partner("x_test")
    'y_test'
    """
    return {"x": "y", "y": "x"}[name[0]] + name[1:]


def read_csv(path: Path, label_column: str, text_column: str | None = None) -> Tables:
    """A header, then one row per item; every column but the label's holds numbers. Blank lines do not count.

    With a `text_column` the items are its texts and further columns do not count.

    Raises:
        DataError: naming the line and column of the first cell that is wrong.
    """
    with _naming(path, "a CSV file in UTF-8"), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True, skipinitialspace=True)
        rows = [(reader.line_num, row) for row in reader if row]
    if len(rows) < 2:
        raise DataError(f"{path} has no rows below its header; expected a header and one row per item")
    header = [name.strip() for name in rows[0][1]]
    refuse_other_separator(str(path), header)
    if text_column is not None:
        return {"train": _csv_texts(path, header, rows[1:], label_column, text_column)}
    label = _label_index(str(path), header, label_column)
    inputs = [_numbers(path, line, row, header, label) for line, row in rows[1:]]
    table = Table(
        origin=str(path),
        inputs=np.array(inputs, dtype=np.float64),
        labels=np.array([row[label].strip() for _, row in rows[1:]]),
        numbers=np.array([line for line, _ in rows[1:]]),
        unit="line",
        columns=tuple(name for index, name in enumerate(header) if index != label),
    )
    return {"train": check_table(table)}


def _csv_texts(
    path: Path, header: Sequence[str], rows: Sequence[tuple[int, list[str]]], label_column: str, text_column: str
) -> Table:
    text, label = (_column_index(str(path), header, name) for name in (text_column, label_column))
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: {len(row)} cells; expected {len(header)} as in the header")
    table = Table(
        origin=str(path),
        inputs=np.array([row[text] for _, row in rows], dtype=np.str_),
        labels=np.array([row[label].strip() for _, row in rows], dtype=np.str_),
        numbers=np.array([line for line, _ in rows]),
        unit="line",
        columns=(text_column,),
    )
    return check_texts(table, label_column)


def _column_index(origin: str, header: Sequence[str], name: str) -> int:
    """Where the one column of this name stands."""
    if header.count(name) > 1:
        raise DataError(f"{origin}: {header.count(name)} columns are called {name!r}; expected one")
    if name not in header:
        raise DataError(f"{origin}: {unknown_name('column', name, header)}")
    return header.index(name)


def refuse_other_separator(origin: str, header: Sequence[str]) -> None:
    """Refuses a header that is one name only because its columns are not separated by commas.

    Args:
        origin: Begins the message.
        header: As it was read.

    Raises:
        DataError: naming the separator.
    """
    other = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise DataError(
            f"{origin}: its columns are separated by {other!r}; expected commas, and points in numbers (1.5, not 1,5)"
        )


def _label_index(origin: str, header: Sequence[str], label_column: str) -> int:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{origin}: two columns are called {twice!r}; expected one name for each")
    if label_column not in header:
        raise DataError(f"{origin}: {unknown_name('label column', label_column, header)}")
    if len(header) < 2:
        raise DataError(f"{origin} has only its label column {label_column!r}; expected columns with numbers beside it")
    return header.index(label_column)


def _numbers(path: Path, line: int, row: Sequence[str], header: Sequence[str], label: int) -> list[float]:
    if len(row) != len(header):
        raise DataError(f"{path}, line {line}: {len(row)} cells; expected {len(header)} as in the header")
    if not row[label].strip():
        raise DataError(f"{path}, line {line}, column {header[label]!r}: the label is empty; expected a class")
    return [_number(cell, path, line, name) for name, cell in zip(header, row, strict=True) if name != header[label]]


def _number(cell: str, path: Path, line: int, column: str) -> float:
    try:
        return float("not a number" if "_" in cell else cell)  # float() takes 1_000 for a thousand
    except ValueError:
        raise DataError(f"{path}, line {line}, column {column!r}: got {brief(cell)}; expected a number") from None


def read_parquet(path: Path, label_column: str, text_column: str | None = None) -> Tables:
    """One row per item; every column but the label's holds numbers. Needs the extra ``parquet``.

    With a `text_column` the items are its texts and further columns do not count.

    Raises:
        FedmergeError: if the extra is not installed.
        DataError: if the file is damaged or a cell is wrong.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise FedmergeError(f'{path}: .parquet files need pyarrow: pip install "fedmerge[parquet]"')
    import pandas as pd  # noqa: PLC0415 - takes a second to import

    with _naming(path, "a parquet file"):
        _refuse_parquet_bomb(path)
        frame = pd.read_parquet(path, engine="pyarrow")
    if text_column is not None:
        return {"train": frame_texts(frame, label_column, text_column, str(path))}
    return {"train": frame_table(frame, label_column, str(path))}


def _refuse_parquet_bomb(path: Path) -> None:
    """Refuses a file of few bytes that says it has more cells than memory could hold."""
    import pyarrow.parquet as pq  # noqa: PLC0415 - optional extra

    facts = pq.read_metadata(path)
    unpacked = sum(facts.row_group(index).total_byte_size for index in range(facts.num_row_groups))
    if max(unpacked, 8 * facts.num_rows * facts.num_columns) > MOST_BYTES:
        raise ValueError(f"it says that it has {facts.num_rows:,} rows of {facts.num_columns:,} columns")


def frame_table(frame: pd.DataFrame, label_column: str, origin: str, numbers: Ints | None = None) -> Table:
    """A table from a data frame whose other columns hold numbers.

    Args:
        frame: One row per item.
        label_column: Column with the class.
        origin: Begins every message.
        numbers: [n] what the rows are called in messages, if not 0..n-1.

    Raises:
        DataError: naming the first column or row that is wrong.
    """
    header = [str(column) for column in frame.columns]
    label = _label_index(origin, header, label_column)
    others = [index for index in range(len(header)) if index != label]
    labels = frame.iloc[:, label]
    table = Table(
        origin=origin,
        inputs=np.column_stack([_column(frame.iloc[:, index], origin, header[index]) for index in others]),
        labels=labels.to_numpy() if labels.dtype.kind in "buif" else labels.astype(str).to_numpy(dtype=np.str_),
        numbers=numbers,
        columns=tuple(header[index] for index in others),
    )
    if labels.isna().any():
        row = int(np.flatnonzero(labels.isna())[0])
        raise DataError(f"{table.at(row)}, column {label_column!r}: the label is missing; expected a class")
    return check_table(table)


def frame_texts(frame: pd.DataFrame, label_column: str, text_column: str, origin: str) -> Table:
    """A table of texts from a data frame; further columns do not count.

    Raises:
        DataError: naming the first column or row that is wrong.
    """
    header = [str(column) for column in frame.columns]
    texts, labels = (frame.iloc[:, _column_index(origin, header, name)] for name in (text_column, label_column))
    whole = labels.dtype.kind in "buif"
    table = Table(
        origin=origin,
        inputs=_cells(texts),
        labels=labels.to_numpy() if whole else _cells(labels),
        columns=(text_column,),
    )
    return check_texts(table, label_column)


def _cells(series: pd.Series[Any]) -> Any:
    """Texts of a column of any type, empty where it has none."""
    return series.astype(object).where(series.notna(), "").astype(str).to_numpy(dtype=np.str_)


def _column(series: pd.Series[Any], origin: str, name: str) -> Any:
    if series.dtype.kind not in "buif":
        raise DataError(f"{origin}, column {name!r} holds {series.dtype}; expected numbers, or leave the column out")
    return series.to_numpy(dtype=np.float64, na_value=np.nan)


Reader = Callable[[Path, str, str | None], Tables]
READERS: dict[str, Reader] = {".npz": read_npz, ".csv": read_csv, ".parquet": read_parquet}
