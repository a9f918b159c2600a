"""A user's own rows on their way to examples: checked once, with every fault named by file and row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError, unknown_name
from fedmerge.core.text import brief
from fedmerge.data.pool import Ints


@dataclass(frozen=True, eq=False)
class Table:
    """Labelled rows as they were given.

    Attributes:
        origin: File or client and split, begins every message.
        inputs: [n, ...] numbers, or [n] texts.
        labels: [n] whole numbers or texts.
        numbers: [n] where each row stood; None for its place in the table.
        unit: What the numbers count: lines of a text file from 1, or rows from 0.
        columns: Names of the input columns if they have any.
    """

    origin: str
    inputs: NDArray[Any]
    labels: NDArray[Any]
    numbers: Ints | None = None
    unit: Literal["line", "row"] = "row"
    columns: tuple[str, ...] | None = None

    def at(self, row: int) -> str:
        """Where a row stands, for messages."""
        number = row if self.numbers is None else self.numbers[row]
        return f"{self.origin}, line {number}" if self.unit == "line" else f"{self.origin}, row {number} from 0"


def make_table(origin: str, inputs: Any, labels: Any) -> Table:
    """A table from what numpy can read: arrays, tensors, nested lists.

    Raises:
        DataError: if the rows are ragged, not numbers, not finite, or not as many as the labels.
    """
    table = Table(origin, _as_array(inputs, f"{origin}: inputs"), _as_array(labels, f"{origin}: labels"))
    return check_table(table)


def text_table(origin: str, texts: Any, labels: Any) -> Table:
    """A table from lists of texts and labels.

    Raises:
        DataError: naming the first row that is wrong.
    """
    wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise DataError(f"{origin}, row {wrong} from 0: got a {type(texts[wrong]).__name__}; expected a text")
    return check_texts(Table(origin, np.array(list(texts), dtype=np.str_), _as_array(labels, f"{origin}: labels")))


def _as_array(values: Any, where: str) -> NDArray[Any]:
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} are not an array ({error}); expected rows of one shape") from error
    if array.dtype == object:
        raise DataError(f"{where} are Python objects; expected rows of one shape with one type of number or text")
    return array


def check_table(table: Table) -> Table:
    """The table with inputs as finite float32, or as uint8 images.

    Raises:
        DataError: naming the first row that is wrong.
    """
    inputs, labels = table.inputs, table.labels
    if inputs.dtype.kind not in "buif" or inputs.ndim < 2:
        raise DataError(
            f"{table.origin}: inputs are {inputs.dtype} {list(inputs.shape)}; expected numbers [n, features] "
            "or images [n, channels, height, width]"
        )
    if labels.ndim != 1 or len(labels) != len(inputs):
        raise DataError(
            f"{table.origin}: labels of shape {list(labels.shape)} for {len(inputs)} inputs; "
            "expected one class per input, [n]"
        )
    if inputs.dtype != np.uint8:
        with np.errstate(over="ignore"):  # what is too large for float32 is refused as infinite
            inputs = inputs.astype(np.float32)
        _check_finite(table, inputs)
    return replace(table, inputs=inputs)


def check_texts(table: Table, label_column: str = "label") -> Table:
    """The table, if every row has a text and a label.

    Raises:
        DataError: naming the first row without one.
    """
    if table.labels.ndim != 1 or len(table.labels) != len(table.inputs):
        raise DataError(
            f"{table.origin}: labels of shape {list(table.labels.shape)} for {len(table.inputs)} texts; "
            "expected one label for each"
        )
    for name, column in (((table.columns or ("text",))[0], table.inputs), (label_column, table.labels)):
        empty = [row for row, cell in enumerate(column) if isinstance(cell, str) and not cell.strip()]
        if empty:
            raise DataError(f"{table.at(empty[0])}, column {name!r} is empty; expected a text in every row")
    if table.labels.dtype.kind == "f" and not np.isfinite(table.labels).all():
        row = int(np.flatnonzero(~np.isfinite(table.labels))[0])
        raise DataError(f"{table.at(row)}, column {label_column!r}: the label is missing; expected a class")
    return table


def _check_finite(table: Table, inputs: NDArray[np.float32]) -> None:
    bad = np.argwhere(~np.isfinite(inputs.reshape(len(inputs), math.prod(inputs.shape[1:]))))
    if len(bad):
        row, column = bad[0]
        name = f", column {table.columns[column]!r}" if table.columns else ""
        given = table.inputs[row].flat[column]
        raise DataError(f"{table.at(row)}{name}: got {given}; expected a finite number that float32 can hold")


def align_columns(tables: Sequence[Table]) -> list[Table]:
    """The tables with their columns in the first one's order.

    Raises:
        DataError: if a table has other columns, or inputs of another shape or type, than the first.
    """
    first = tables[0]
    for table in tables:
        if first.columns and table.columns and set(table.columns) != set(first.columns):
            missing = sorted(set(first.columns) - set(table.columns))
            surplus = sorted(set(table.columns) - set(first.columns))
            raise DataError(
                f"{table.origin} has not the columns of {first.origin}: without {missing}, besides {surplus}; "
                "expected the same in every file"
            )
        if _kind_of(table.inputs) != _kind_of(first.inputs):
            raise DataError(
                f"{table.origin}: inputs are {table.inputs.dtype} {list(table.inputs.shape[1:])}; expected "
                f"{first.inputs.dtype} {list(first.inputs.shape[1:])} as in {first.origin}{_hint(first, table)}"
            )
    return [_reordered(table, first.columns) for table in tables]


def _kind_of(inputs: NDArray[Any]) -> tuple[Any, ...]:
    """What must be the same in every table: shape and type of an input; texts may be of any length."""
    return ("texts",) if inputs.dtype.kind == "U" else (inputs.shape[1:], inputs.dtype)


def _hint(first: Table, table: Table) -> str:
    """How to mend images of another type."""
    kinds = (first.inputs.dtype, table.inputs.dtype)
    if first.inputs.ndim != 4 or np.uint8 not in kinds or kinds[0] == kinds[1]:
        return ""
    wanted = "whole numbers 0..255, (255 * x).round().astype('uint8') for x in 0..1"
    return f"; give {wanted if kinds[0] == np.uint8 else 'the floats that those were made into, scaled alike'}"


def _reordered(table: Table, columns: tuple[str, ...] | None) -> Table:
    if columns is None or table.columns is None or table.columns == columns:
        return table
    order = [table.columns.index(column) for column in columns]
    return replace(table, inputs=table.inputs[:, order], columns=columns)


def encode_labels(tables: Sequence[Table], class_names: Sequence[str] | None) -> tuple[tuple[str, ...], list[Ints]]:
    """Class names and, for every table, class indices [n].

    Whole numbers are class numbers 0..K-1; texts are names, numbered in sorted order or as `class_names` has them.
    Texts that are all numbers count as numbers, unless they are class names.

    Raises:
        DataError: if there are no rows at all, or naming the first label that is not a class.
    """
    if not any(len(table.labels) for table in tables):
        raise DataError(f"{tables[0].origin} has no rows; expected one at least")
    tables = [table if len(table.labels) else _without_labels(table) for table in tables]
    kinds = {_kind(table): table for table in tables if len(table.labels)}
    labels = [table.labels for table in tables]
    if len(kinds) > 1 and (numbers := _as_numbers(labels)) is not None:  # CSV files hold texts, .npz files numbers
        return _encode_numbers(tables, numbers, class_names)
    if len(kinds) > 1:
        places = " and ".join(f"{kind} in {table.origin}" for kind, table in kinds.items())
        raise DataError(f"labels are {places}; expected one kind everywhere")
    if "texts" in kinds:
        named = class_names is not None and set(class_names).issuperset(np.concatenate(_texts(labels)).tolist())
        numbers = None if named else _as_numbers(labels)
        if numbers is None:
            return _encode_texts(tables, class_names)
        labels = numbers
    return _encode_numbers(tables, labels, class_names)


def _without_labels(table: Table) -> Table:
    """A table without rows, whose labels are of no kind: numpy calls nothing a float, a file may call it a text."""
    return replace(table, labels=np.zeros(0, dtype=np.int64))


def _kind(table: Table) -> str:
    kind = table.labels.dtype.kind
    if kind not in "buifU":
        raise DataError(f"{table.origin}: labels are {table.labels.dtype}; expected whole numbers or texts")
    return "texts" if kind == "U" else "numbers"


def _refuse_unwritable(names: Sequence[str], origin: str) -> None:
    """Half a surrogate pair is no text: no file could name the class."""
    for name in names:
        if any(0xD800 <= ord(letter) < 0xE000 for letter in name):
            raise DataError(f"{origin}: the label {brief(name)} is no text; expected letters that UTF-8 can write")


def _texts(labels: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    return [part.astype(np.str_) for part in labels if len(part)]


def are_numbers(labels: NDArray[Any]) -> bool:
    """Whether labels are numbers, or texts that are all numbers."""
    return _as_numbers([labels]) is not None


def _as_numbers(labels: Sequence[NDArray[Any]]) -> list[NDArray[Any]] | None:
    try:
        return [part.astype(np.float64) for part in labels]
    except ValueError:
        return None


def _encode_texts(tables: Sequence[Table], class_names: Sequence[str] | None) -> tuple[tuple[str, ...], list[Ints]]:
    found = sorted(set(np.concatenate(_texts([table.labels for table in tables])).tolist()))
    _refuse_unwritable(found, tables[0].origin)
    names = tuple(class_names or found)
    index = {name: number for number, name in enumerate(names)}
    unknown = set(found) - set(names)
    for table in tables:
        row = next((row for row, label in enumerate(table.labels) if label in unknown), None)
        if row is not None:
            raise DataError(f"{table.at(row)}: {unknown_name('class', str(table.labels[row]), names)}")
    return names, [np.array([index[str(label)] for label in table.labels], dtype=np.int64) for table in tables]


def _encode_numbers(
    tables: Sequence[Table], labels: Sequence[NDArray[Any]], class_names: Sequence[str] | None
) -> tuple[tuple[str, ...], list[Ints]]:
    limit = len(class_names) if class_names is not None else 2**31
    for table, part in zip(tables, labels, strict=True):
        wrong = np.flatnonzero(~((part >= 0) & (part < limit) & (part % 1 == 0) & np.isfinite(part)))
        if len(wrong):
            accepted = f"0..{limit - 1}, the classes named" if class_names is not None else "a class number from 0"
            raise DataError(f"{table.at(int(wrong[0]))}: label {part[wrong[0]]}; expected {accepted}")
    targets = [part.astype(np.int64) for part in labels]
    return tuple(class_names) if class_names is not None else _number_names(np.unique(np.concatenate(targets))), targets


def _number_names(found: Ints) -> tuple[str, ...]:
    if len(found) <= found[-1]:
        missing = int(np.setdiff1d(np.arange(len(found)), found)[0])
        raise DataError(
            f"labels go up to {found[-1]} but no row anywhere has label {missing}; expected every class 0..K-1. "
            "Give class_names if classes may be absent, or name the classes with texts"
        )
    return tuple(str(number) for number in range(len(found)))
