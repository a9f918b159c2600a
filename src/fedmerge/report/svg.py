"""The few parts that every figure is drawn with: scales, ticks, axes, marks, labels.

Colours are classes that ``style.css`` defines for light and dark: ``c0`` .. ``c6`` are the colours of methods.
All figures are 520 units wide, so that text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedmerge.report.markup import Markup, element, join, shorten

WIDTH = 520.0
COLOURS = 7
CHARACTER = 7.4  # mean width of a character at the figures' 13 units


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading and the sentence below it."""

    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Scale:
    """Maps low..high to start..end, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Position of a value."""
        low, high, at = (
            (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> tuple[float, ...]:
        """About `count` round values within the scale."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = nice_step(self.high - self.low, count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(round(index * step, 12) for index in range(first, last + 1))


def nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that cuts the span into at most `count` parts.

    >>> nice_step(100, 5), nice_step(0.3, 4)
    (20.0, 0.1)
    """
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    return next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude * count >= span * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) >= 3 else (1, 3) if math.log10(high / low) >= 1.5 else (1, 2, 5)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    return tuple(value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9))


def nice_range(
    values: Sequence[float], count: int = 5, *, floor: float = -math.inf, top: float = math.inf
) -> tuple[float, float]:
    """Round bounds around the finite values, never an empty span, within floor..top."""
    known = [value for value in values if math.isfinite(value)]
    low, high = max(min(known), floor), min(max(known), top)
    margin = max(0.02 - (high - low), 0) / 2
    low, high = max(low - margin, floor), min(high + margin, top)
    step = nice_step(high - low, count)
    return max(math.floor(low / step + 1e-9) * step, floor), min(math.ceil(high / step - 1e-9) * step, top)


def colour(index: int) -> str:
    """Classes of the colour, and of the dash pattern that tells later methods from earlier ones."""
    return f"c{index % COLOURS}" + (f" d{min(index // COLOURS, 2)}" if index >= COLOURS else "")


def text(x: float, y: float, content: object, *, anchor: str | None = None, class_: str | None = None) -> Markup:
    """A line of text; `anchor` is ``middle`` or ``end``."""
    return element("text", content, x=x, y=y, text_anchor=anchor, class_=class_)


def tip(content: object) -> Markup:
    """What a pointer that rests on the mark shows."""
    return element("title", content)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    """A polyline or polygon."""
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' if closed else ''}", class_=class_)


def marker(x: float, y: float, index: int, radius: float, content: object) -> Markup:
    """The mark of a method: its colour and one of four shapes."""
    shape = index % 4
    if shape == 0:
        return element("circle", tip(content), cx=x, cy=y, r=radius * 1.1, class_=f"mark {colour(index)}")
    r = radius
    corners = {
        1: [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)],
        2: [(x, y - r * 1.3), (x + r * 1.3, y), (x, y + r * 1.3), (x - r * 1.3, y)],
        3: [(x, y - r * 1.2), (x + r * 1.2, y + r), (x - r * 1.2, y + r)],
    }[shape]
    steps = "L".join(f"{a:.1f} {b:.1f}" for a, b in corners)
    return element("path", tip(content), d=f"M{steps}Z", class_=f"mark {colour(index)}")


def x_axis(
    scale: Scale, top: float, bottom: float, title: str, write: Callable[[float], str], *, count: int = 5
) -> Markup:
    """Vertical grid lines, values below them and the title of the axis."""
    ticks = [
        join(
            line(scale(t), top, scale(t), bottom, "grid"),
            text(scale(t), bottom + 18, write(t), anchor="middle", class_="tick"),
        )
        for t in scale.ticks(count)
    ]
    return join(*ticks, text((scale.start + scale.end) / 2, bottom + 38, title, anchor="middle", class_="axis"))


def y_axis(scale: Scale, left: float, right: float, title: str, write: Callable[[float], str]) -> Markup:
    """Horizontal grid lines, values beside them, and the title above the axis, where it can be read without turning."""
    ticks = [
        join(
            line(left, scale(t), right, scale(t), "grid"),
            text(left - 8, scale(t) + 4.5, write(t), anchor="end", class_="tick"),
        )
        for t in scale.ticks()
    ]
    return join(*ticks, text(0, min(scale.start, scale.end) - 16, title, class_="axis"))


def legend(entries: Sequence[tuple[str, int]], y: float) -> tuple[Markup, float]:
    """Marks and labels in as many lines as they need; returns the drawing and the height it takes."""
    parts, x, row = [], 6.0, 0
    for label, index in entries:
        shown = shorten(label, 28)
        width = 30 + CHARACTER * len(shown)
        if x > 6 and x + width > WIDTH:
            x, row = 6.0, row + 1
        parts.append(join(marker(x, y + 20 * row - 4.5, index, 4, label), text(x + 10, y + 20 * row, shown)))
        x += width
    return join(*parts), 20.0 * (row + 1)


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in their order, at least `gap` apart, within low..high, which must have room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    limit = low
    for index in order:
        placed[index] = max(placed[index], limit)
        limit = placed[index] + gap
    limit = high
    for index in reversed(order):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def drawing(height: float, description: str, *parts: object) -> Markup:
    """A whole figure; `description` is what is read aloud in its place."""
    box = f"0 0 {WIDTH:.0f} {height:.0f}"
    return element("svg", *parts, viewBox=box, role="img", aria_label=description, class_="chart")
