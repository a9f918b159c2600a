"""A federation at a glance: who has how many train items of which class."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmerge.data.federated import FederatedData

_MOST_COLUMNS, _MOST_ROWS = 200, 100
_BARS, _TOP, _GAP = 52, 84, 14  # height of the bars of sizes, where they begin, space between parts
_LEVELS = 8
_SIDES = (0.95, 0.55, 0.25)  # opacity of train, validation and test bars
_UNPRINTABLE = re.compile(
    "[^\t\x20-\x7e\xa0-\u200d\u2010-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
_LIGHT = ("#4347c4", "#c8731a", "#17847a", "#a3155f", "#7a6110", "#0b86c4", "#8a3418", "#4f7a1b")
_DARK = ("#8ea0ff", "#f0a860", "#52d3c2", "#f27fb6", "#e0cb5a", "#62c0f5", "#ee8a68", "#a6d568")
_STYLE = """
.fmp { --ink: #1d2025; --soft: #69707c; --paper: #fcfbf9; --tint: #f1efea; LIGHT }
@media (prefers-color-scheme: dark) {
  .fmp { --ink: #e7e6e3; --soft: #989fa9; --paper: #131519; --tint: #1e2127; DARK }
}
.fmp text { font: 11px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; fill: var(--soft); }
.fmp .title { font-size: 16px; font-weight: 600; fill: var(--ink); }
.fmp .end { text-anchor: end; }
.fmp .mid { text-anchor: middle; }
.fmp .hover { fill: var(--ink); fill-opacity: 0; }
.fmp .hover:hover { fill-opacity: .07; }
"""


@dataclass(frozen=True)
class _Grid:
    """What is drawn: M columns of one or more clients, R rows of one or more classes.

    Attributes:
        counts: [M, R] train items per client of a column.
        sizes: [M, 3] train, validation and test items per client.
        groups: [M] group of a column's first client; 0 without groups.
        names: [M] for hovering.
        classes: [R].
        clients_per_column: Beyond 1 only for very many clients.
        classes_per_row: Beyond 1 only for very many classes.
        left: Where the columns begin.
    """

    counts: NDArray[np.float64]
    sizes: NDArray[np.float64]
    groups: tuple[int, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    clients_per_column: int
    classes_per_row: int
    left: float

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell."""
        return min(44.0, 740 / len(self.counts)), min(24.0, max(3.6, 360 / len(self.classes)))

    @property
    def across(self) -> float:
        """Width of all columns."""
        return len(self.counts) * self.cell[0]

    @property
    def down(self) -> float:
        """Height of all rows."""
        return len(self.classes) * self.cell[1]

    @property
    def top(self) -> float:
        """Where the rows begin, below the bars and the strip of groups."""
        return _TOP + _BARS + _GAP


def partition_svg(data: FederatedData) -> str:
    """A self-contained SVG: heat map of train items per client and class, coloured by group, sizes at the margins.

    It suits light and dark pages. More than 200 clients share columns and more than 100 classes share rows, as
    means and sums; the picture says so.

    Args:
        data: The clients; labels are those that they train on.
    """
    grid = _grid(data)
    legend = list(_legend(data, grid))
    width = max(grid.left + grid.across + 84, 560.0)
    height = grid.top + grid.down + 52 + 20 * len(legend)
    parts = [*_headline(data), *_bars(grid), *_cells(grid), *_labels(grid), *_class_totals(grid), *_hover(grid)]
    lines = (f'<g transform="translate(0 {height - 18 - 20 * n:g})">{line}</g>' for n, line in enumerate(legend[::-1]))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fmp" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{_text(data.source)}">'
        f'<style>{_style()}</style><rect width="100%" height="100%" fill="var(--paper)"/>'
        f"{''.join(parts)}{''.join(lines)}</svg>\n"
    )


def _style() -> str:
    light, dark = (
        " ".join(f"--g{number}: {colour};" for number, colour in enumerate(colours)) for colours in (_LIGHT, _DARK)
    )
    return _STYLE.replace("LIGHT", light).replace("DARK", dark)


def _text(text: str) -> str:
    return html.escape(_UNPRINTABLE.sub("\ufffd", text))


def _short(text: str, length: int) -> str:
    return _text(text if len(text) <= length else text[: length - 1] + "…")


def _grid(data: FederatedData) -> _Grid:
    clients = data.clients
    counts = np.array(data.class_counts())
    sizes = np.array([[len(split.targets) for split in (c.train, c.validation, c.test)] for c in clients])
    per_column, per_row = math.ceil(len(clients) / _MOST_COLUMNS), math.ceil(data.num_classes / _MOST_ROWS)
    columns, rows = np.arange(0, len(clients), per_column), np.arange(0, data.num_classes, per_row)
    in_column = np.diff([*columns, len(clients)])[:, None]
    names = [data.class_names[row] + ("…" if per_row > 1 else "") for row in rows]
    return _Grid(
        counts=np.add.reduceat(np.add.reduceat(counts, rows, axis=1), columns, axis=0) / in_column,
        sizes=np.add.reduceat(sizes, columns, axis=0) / in_column,
        groups=tuple(data.groups[column] if data.groups else 0 for column in columns),
        names=tuple(clients[column].name for column in columns),
        classes=tuple(names),
        clients_per_column=per_column,
        classes_per_row=per_row,
        left=34 + 6.2 * min(16, max(6, *(len(name) for name in names))),
    )


def _range(values: Sequence[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}–{max(values):,}"


def _headline(data: FederatedData) -> Iterator[str]:
    train, validation, test = (
        _range([len(split.targets) for split in side])
        for side in zip(*((c.train, c.validation, c.test) for c in data.clients), strict=True)
    )
    facts = f"{len(data.clients)} clients, {data.num_classes} classes; items per client: "
    facts += f"{train} train, {validation} validation, {test} test"
    yield f'<text class="title" x="24" y="34">{_short(data.source, 90)}</text>'
    yield f'<text x="24" y="54">{facts}</text>'


def _bars(grid: _Grid) -> Iterator[str]:
    """One stacked bar per column: train below, then validation, then test, each fainter."""
    width, _ = grid.cell
    most = grid.sizes.sum(axis=1).max()
    for side, opacity in enumerate(_SIDES):
        below = grid.sizes[:, :side].sum(axis=1) / most * _BARS
        heights = grid.sizes[:, side] / most * _BARS
        tops = _TOP + _BARS - below - heights
        boxes = [
            (grid.left + m * width, top, height) for m, (top, height) in enumerate(zip(tops, heights, strict=True))
        ]
        yield from _filled(boxes, grid.groups, [opacity] * len(boxes), width - _seam(width))
    yield f'<text class="end" x="{grid.left - 8:g}" y="{_TOP + 8:g}">{most:,.0f}</text>'
    yield f'<text class="end" x="{grid.left - 8:g}" y="{_TOP + _BARS:g}">items</text>'


def _seam(size: float) -> float:
    """Space between two cells."""
    return 1.0 if size >= 6 else 0.4 if size >= 3 else 0.0


def _filled(
    boxes: Sequence[tuple[float, float, float]], groups: Sequence[int], opacities: Sequence[float], width: float
) -> Iterator[str]:
    """Boxes (x, y, height) as one path per group's colour and opacity, which keeps the file small."""
    paths: dict[tuple[int, float], list[str]] = {}
    for (x, y, height), group, opacity in zip(boxes, groups, opacities, strict=True):
        if height > 0:
            path = paths.setdefault((group % len(_LIGHT), opacity), [])
            path.append(f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z")
    for (colour, opacity), path in sorted(paths.items()):
        yield f'<path d="{"".join(path)}" fill="var(--g{colour})" fill-opacity="{opacity:g}"/>'


def _cells(grid: _Grid) -> Iterator[str]:
    """The heat map; the square root keeps small counts visible."""
    width, height = grid.cell
    area = f'x="{grid.left:g}" y="{grid.top:g}" width="{grid.across:.1f}" height="{grid.down:.1f}"'
    yield f'<rect {area} fill="var(--tint)"/>'
    levels = np.ceil(_LEVELS * np.sqrt(grid.counts / grid.counts.max())).astype(int)
    filled = np.argwhere(levels > 0)
    boxes = [(grid.left + m * width, grid.top + r * height, height - _seam(height)) for m, r in filled]
    groups = [grid.groups[m] for m, _ in filled]
    yield from _filled(boxes, groups, [_opacity(int(levels[m, r])) for m, r in filled], width - _seam(width))


def _opacity(level: int) -> float:
    return round(0.08 + 0.92 * level / _LEVELS, 3)


def _every(count: int, size: float, room: float) -> range:
    """The numbers of the rows or columns that have room for a label."""
    return range(0, count, next(step for step in (1, 2, 5, 10, 20, 50) if step * size >= room))


def _labels(grid: _Grid) -> Iterator[str]:
    width, height = grid.cell
    for r in _every(len(grid.classes), height, 11):
        y = grid.top + (r + 0.5) * height + 4
        yield f'<text class="end" x="{grid.left - 8:g}" y="{y:.1f}">{_short(grid.classes[r], 16)}</text>'
    y = grid.top + grid.down + 16
    for m in _every(len(grid.counts), width, 24):
        x = grid.left + (m + 0.5) * width
        yield f'<text class="mid" x="{x:.1f}" y="{y:g}">{m * grid.clients_per_column}</text>'
    yield f'<text class="end" x="{grid.left - 8:g}" y="{y:g}">client</text>'


def _class_totals(grid: _Grid) -> Iterator[str]:
    """Bars to the right: train items of each class in the whole federation."""
    _, height = grid.cell
    totals = grid.counts.sum(axis=0)
    x = grid.left + grid.across + 8
    for r, total in enumerate(totals):
        y, length = grid.top + r * height, 44 * total / totals.max()
        yield (
            f'<rect x="{x:g}" y="{y:.1f}" width="{length:.1f}" height="{height - _seam(height):.1f}" '
            'fill="var(--soft)" fill-opacity=".45"/>'
        )
    most = totals.max() * grid.clients_per_column
    yield f'<text x="{x:g}" y="{grid.top - 6:g}">{most:,.0f}</text>'


def _hover(grid: _Grid) -> Iterator[str]:
    """Columns that tell their name and sizes under the pointer."""
    width, _ = grid.cell
    for m, (name, sizes) in enumerate(zip(grid.names, grid.sizes, strict=True)):
        told = f"{name}: {sizes[0]:g} train, {sizes[1]:g} validation, {sizes[2]:g} test"
        yield (
            f'<rect class="hover" x="{grid.left + m * width:.1f}" y="{_TOP}" width="{width:.1f}" '
            f'height="{grid.top + grid.down - _TOP:.1f}"><title>{_text(told)}</title></rect>'
        )


def _legend(data: FederatedData, grid: _Grid) -> Iterator[str]:
    """Lines below the heat map: what shades mean, then what the groups are."""
    opacities = [_opacity(level) for level in range(1, _LEVELS + 1)]
    shades = f"up to {math.ceil(grid.counts.max()):,} train items of a class"
    yield f"{_swatches(24, opacities, shades)}{_swatches(330, _SIDES, 'train, validation and test items')}"
    if grid.clients_per_column > 1:
        yield f'<text x="24" y="0">every column is the mean of {grid.clients_per_column} clients</text>'
    if grid.classes_per_row > 1:
        yield f'<text x="24" y="0">every row is the sum of {grid.classes_per_row} classes</text>'
    if data.groups is not None:
        yield from _group_lines(_group_names(data), grid)


def _swatches(x: float, opacities: Sequence[float], text: str) -> str:
    boxes = "".join(
        f'<rect x="{x + 13 * n:g}" y="-9" width="12" height="11" fill="var(--g0)" fill-opacity="{opacity:g}"/>'
        for n, opacity in enumerate(opacities)
    )
    return f'{boxes}<text x="{x + 13 * len(opacities) + 6:g}" y="0">{text}</text>'


def _group_names(data: FederatedData) -> dict[int, str]:
    """What sets each group apart, as far as the partition says it."""
    names: dict[int, str] = {}
    parts = data.partition.clients if data.partition else (None,) * len(data.clients)
    for group, part in zip(data.groups or (), parts, strict=True):
        traits = [f"group {group}"]
        if part is not None and part.rotation:
            traits.append(f"{part.rotation:g}°")
        if part is not None and part.invert:
            traits.append("inverted")
        if part is not None and part.relabel:
            traits.append("own labels")
        names.setdefault(group, " ".join(traits))
    return names


def _group_lines(names: dict[int, str], grid: _Grid) -> Iterator[str]:
    room, x, line = max(grid.left + grid.across + 40, 520.0), 24.0, ""
    for group, name in sorted(names.items()):
        size = 24 + 6.2 * len(name)
        if line and x + size > room:
            yield line
            x, line = 24.0, ""
        line += (
            f'<rect x="{x:g}" y="-9" width="11" height="11" rx="2" fill="var(--g{group % len(_LIGHT)})"/>'
            f'<text x="{x + 16:g}" y="0">{name}</text>'
        )
        x += size
    yield line
