"""Figures of the merging weights: who uses which model, and how that came about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedmerge.experiment.record import RoundRecord, RunRecord
from fedmerge.report.kinds import Kinds, kinds_of
from fedmerge.report.likeness import likeness
from fedmerge.report.markup import Markup, element, join, shorten
from fedmerge.report.statistics import FloatArray
from fedmerge.report.svg import CHARACTER, WIDTH, Figure, drawing, line, text, tip
from fedmerge.report.text import plural

ROWS = 60  # more clients than this share rows
SNAPSHOTS = 6
MARK = 14  # characters of a group's name at the right of a grid


def client_order(mixing: FloatArray, groups: Sequence[int] | None, *, by_favourite: bool = False) -> tuple[int, ...]:
    """Clients with like weights side by side: by group where known, within it along the tree of overlaps.

    Args:
        mixing: [N, d].
        groups: [N] or None.
        by_favourite: Within a group first by the heaviest model, of equally heavy ones the first.
    """
    order = likeness(mixing).order
    if groups is None:
        return order
    favourite = mixing.argmax(axis=1) if by_favourite else np.zeros(len(mixing))
    return tuple(sorted(order, key=lambda client: (groups[client], favourite[client])))


class Bin(NamedTuple):
    """Clients that share a row of a picture; never of two groups."""

    members: tuple[int, ...]
    group: int | None


def bins(order: Sequence[int], groups: Sequence[int] | None, limit: int = ROWS) -> tuple[Bin, ...]:
    """Neighbours in the order, at most ceil(N / limit) of them in a row."""
    most = -(-len(order) // limit)
    found: list[Bin] = []
    for client in order:
        group = groups[client] if groups else None
        if found and found[-1].group == group and len(found[-1].members) < most:
            found[-1] = Bin((*found[-1].members, client), group)
        else:
            found.append(Bin((client,), group))
    return tuple(found)


def row_names(run: RunRecord, row: Bin) -> str:
    """The client of a row, or its first one and how many more there are."""
    first = run.client_names[row.members[0]]
    return first if len(row.members) == 1 else f"{first} and {len(row.members) - 1} more"


def _rows(run: RunRecord, record: RoundRecord) -> tuple[FloatArray, tuple[Bin, ...]]:
    """[N, d] weights of a round and the rows in which they are drawn."""
    mixing, kinds = np.array(record.mixing), kinds_of(run)
    if kinds is None:
        return mixing, bins(client_order(mixing, None), None)
    return mixing, bins(client_order(mixing, kinds.of, by_favourite=kinds.are_tasks), kinds.of)


def _told(run: RunRecord, kinds: Kinds | None, row: Bin) -> str:
    """The client of a row, with its task where there are several."""
    task = f" ({kinds.names[row.group]})" if kinds is not None and kinds.are_tasks and row.group is not None else ""
    return f"{row_names(run, row)}{task}"


def binned(mixing: FloatArray, rows: Sequence[Bin]) -> FloatArray:
    """[R, d] mean weights of the clients of every row."""
    return np.stack([mixing[list(row.members)].mean(axis=0) for row in rows])


class Grid(NamedTuple):
    """Where a heat map stands: its corner and the size of a cell."""

    left: float
    top: float
    width: float
    height: float

    def cell(self, row: int, column: int, value: float, words: str | None = None) -> Markup | None:
        """A cell whose strength is its value in 0..1; nothing for less than half a percent."""
        if value < 0.005:
            return None
        x, right = (round(self.left + self.width * edge, 2) for edge in (column, column + 1))
        y, bottom = (round(self.top + self.height * edge, 2) for edge in (row, row + 1))
        strength = f"{value:.2f}".lstrip("0") if value < 0.995 else None
        children = () if words is None else (tip(words),)
        return element("rect", *children, x=x, y=y, width=right - x, height=bottom - y, fill_opacity=strength)

    def heat(self, values: FloatArray, words: Callable[[int, int], str] | None = None) -> Markup:
        """All cells; `words` (row, column) are shown with the value to a pointer that rests on a cell."""
        cells = (
            self.cell(i, j, float(value), None if words is None else f"{words(i, j)}: {value:.2f}")
            for (i, j), value in np.ndenumerate(values)
        )
        return element("g", *cells, class_="heat")

    def group_marks(self, rows: Sequence[Bin], columns: int, names: Sequence[str]) -> Markup:
        """Lines between groups, and their names at the right where there is room for them."""
        right = self.left + self.width * columns
        parts = [self.cuts(rows, columns)]
        starts = _starts(rows)
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            middle = self.top + self.height * (start + end) / 2 + 4.5
            group = rows[start].group
            if group is not None and (end - start) * self.height >= 12:
                parts.append(text(right + 6, middle, names[group], class_="tick"))
        return join(*parts)

    def cuts(self, rows: Sequence[Bin], columns: int) -> Markup:
        """Lines between groups."""
        right = self.left + self.width * columns
        heights = [self.top + self.height * start for start in _starts(rows)[1:]]
        return join(*(line(self.left, y, right, y, "cut") for y in heights))


def _starts(rows: Sequence[Bin]) -> list[int]:
    """The first row of each group."""
    return [i for i, row in enumerate(rows) if i == 0 or row.group != rows[i - 1].group]


def marked_names(names: Sequence[str]) -> tuple[tuple[str, ...], float]:
    """Names of groups as they stand at the right of a grid, and the room that they take; little without any."""
    shown = tuple(shorten(name, MARK) for name in names)
    return shown, 10 + CHARACTER * max(map(len, shown), default=0)


def scale_bar() -> Markup:
    """What the strengths mean, at the right end of the first line: 0 to 1 in five steps."""
    grid = Grid(WIDTH - 118, 4, 18, 9)
    ends = join(text(grid.left - 6, 13, "0", anchor="end", class_="tick"), text(grid.left + 96, 13, "1", class_="tick"))
    return join(grid.heat(np.array([[0.05, 0.25, 0.5, 0.75, 1.0]])), ends)


def _row_height(rows: int) -> float:
    return min(max(330.0 / rows, 5.0), 18.0)


def _row_words(rows: Sequence[Bin], run: RunRecord, record: RoundRecord) -> str:
    most = max(len(row.members) for row in rows)
    kinds = kinds_of(run)
    order = "likeness"
    if kinds is not None:
        order = "task, then favourite model" if kinds.are_tasks else "true group, then likeness"
    crowd = "" if most == 1 else f" Up to {most} clients share a row, which shows their mean."
    return f"Rows by {order}.{crowd} {run.label}, seed {run.seed}, round {record.round}."


def merging_weights(run: RunRecord) -> Figure:
    """Heat map of A at the selected round: clients as rows, global models as columns."""
    record = run.selected()
    mixing, rows = _rows(run, record)
    values, models = binned(mixing, rows), mixing.shape[1]
    names = [shorten(row_names(run, row), 16) for row in rows] if len(rows) <= 30 else []
    left = 4 + CHARACTER * max(map(len, names), default=0)
    kinds = kinds_of(run)
    marks, room = marked_names(() if kinds is None else kinds.names)
    grid = Grid(left, 42, min((WIDTH - left - room) / models, 90.0), _row_height(len(rows)))
    heads = [text(left + grid.width * (j + 0.5), 36, j, anchor="middle", class_="tick") for j in range(models)]
    svg = drawing(
        grid.top + grid.height * len(rows) + 8,
        f"Merging weights of {plural(len(mixing), 'client')} over {plural(models, 'model')}, round {record.round}",
        text(left, 14, "Global model", class_="axis"),
        scale_bar(),
        *heads[:: -(-models // 20)],
        *(text(0, grid.top + grid.height * (i + 0.5) + 4.5, name, class_="tick") for i, name in enumerate(names)),
        grid.heat(values, lambda i, j: f"{_told(run, kinds, rows[i])}, model {j}"),
        grid.group_marks(rows, models, marks),
    )
    caption = f"Share of each model in each client's own model. {_row_words(rows, run, record)}"
    return Figure("Who uses which model", svg, caption)


def weights_over_rounds(run: RunRecord) -> Figure | None:
    """Small heat maps of evenly chosen evaluated rounds, clients in the same order; None with fewer than two."""
    known = [record for record in run.evaluated() if record.mixing is not None]
    if len(known) < 2:
        return None
    chosen = [known[i] for i in sorted({round(i) for i in np.linspace(0, len(known) - 1, SNAPSHOTS)})]
    _, rows = _rows(run, run.selected())
    panel, height = WIDTH / len(chosen), 0.7 * _row_height(len(rows))
    svg = drawing(
        42 + height * len(rows) + 8,
        f"Merging weights at rounds {', '.join(str(record.round) for record in chosen)}",
        text(0, 14, "Round", class_="axis"),
        scale_bar(),
        *(_snapshot(record, rows, panel * index, panel - 12, height) for index, record in enumerate(chosen)),
    )
    return Figure(
        "How it came about",
        svg,
        f"The same clients in the same order, at evaluated rounds. {run.label}, seed {run.seed}.",
    )


def _snapshot(record: RoundRecord, rows: Sequence[Bin], left: float, width: float, height: float) -> Markup:
    values = binned(np.array(record.mixing), rows)
    grid = Grid(left, 42, width / values.shape[1], height)
    frame = element("rect", x=left, y=grid.top, width=width, height=height * len(rows), class_="frame")
    cuts = grid.cuts(rows, values.shape[1])
    return join(text(left, 36, record.round, class_="tick"), frame, grid.heat(values), cuts)
