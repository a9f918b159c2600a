"""A table of numbers with their units, written as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass

from fedmerge.core.text import printable
from fedmerge.report.statistics import Interval
from fedmerge.report.text import Unit, formatted

Cell = str | int | float | Interval | None


@dataclass(frozen=True)
class Column:
    """One column: its heading, the unit of its numbers, and what they mean."""

    title: str
    unit: Unit
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """Numbers with their units, written in several forms.

    Attributes:
        columns: With their units.
        rows: One cell per column; shares (0..1) in percent columns.
        caption: One line.
        notes: What a reader must know beside the numbers.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.markdown()

    def texts(self) -> tuple[tuple[str, ...], ...]:
        """Every cell as a reader sees it."""
        return tuple(
            tuple(
                printable(formatted(cell, column.unit), keep="\n")
                for cell, column in zip(row, self.columns, strict=True)
            )
            for row in self.rows
        )

    def markdown(self) -> str:
        """A pipe table, its notes below it."""
        rule = ["---" if column.unit == "text" else "---:" for column in self.columns]
        head = [_pipe(column.title) for column in self.columns]
        lines = [head, rule, *([_pipe(text) for text in row] for row in self.texts())]
        notes = "".join(f"\n{_one_line(note)}\n" for note in self.notes)
        return "".join(f"| {' | '.join(line)} |\n" for line in lines) + notes

    def latex(self) -> str:
        """A plain ``tabular`` that needs no package; the notes are comments above it."""
        spec = "".join("l" if column.unit == "text" else "r" for column in self.columns)
        notes = [f"% {_one_line(note)}" for note in self.notes]
        head = " & ".join(_latex(column.title) for column in self.columns) + r" \\"
        body = [" & ".join(map(_latex, row)) + r" \\" for row in self.texts()]
        lines = [
            *notes,
            rf"\begin{{tabular}}{{{spec}}}",
            r"\hline",
            head,
            r"\hline",
            *body,
            r"\hline",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Comma-separated numbers of full precision; half widths have a column of their own."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([title for index in range(len(self.columns)) for title in self._csv_titles(index)])
        for row in self.rows:
            fields = []
            for index, cell in enumerate(row):
                fields += _raw(cell, self.columns[index].unit)[: len(self._csv_titles(index))]
            writer.writerow(fields)
        return text.getvalue()

    def _csv_titles(self, index: int) -> tuple[str, ...]:
        title = self.columns[index].title
        intervals = [cell for cell in (row[index] for row in self.rows) if isinstance(cell, Interval)]
        mixed = any(interval.over != "seeds" for interval in intervals)
        return (title, f"{title} ±", f"{title} ± over")[: 1 + bool(intervals) + mixed]


def _seen(cell: Cell, column: Column) -> str:
    return printable(formatted(cell, column.unit), keep="\n")


def _pipe(text: str) -> str:
    """A cell of a Markdown table in which nothing is taken for a mark or an element."""
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "†": r"$^\dagger$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def _raw(cell: Cell, unit: Unit) -> list[str]:
    """A cell as up to three fields: the number, its half width, what the interval is over."""
    if isinstance(cell, Interval):
        half = _raw_number(cell.half_width, unit)
        return [_raw_number(cell.mean, unit), half, cell.over if half else ""]
    return [_raw_number(cell, unit), "", ""]


def _raw_number(value: Cell, unit: Unit) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{100 * value if unit in ('percent', 'points') else value:.10g}"
    return str(value)
