"""Line charts: what happened over the rounds, and over the bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedmerge.report.curves import Curve, accuracy, curves, entropy
from fedmerge.report.markup import Markup, element, join, shorten
from fedmerge.report.statistics import FloatArray
from fedmerge.report.study import Study, client_accuracies
from fedmerge.report.svg import (
    CHARACTER,
    WIDTH,
    Figure,
    Scale,
    colour,
    drawing,
    line,
    marker,
    nice_range,
    path,
    spread_out,
    text,
    tip,
    x_axis,
    y_axis,
)
from fedmerge.report.text import percent, percent_tick, ranges, size

LABEL_LENGTH = 16
LABEL_GAP = 17.0


@dataclass(frozen=True)
class Line:
    """A curve placed on the paper's axes.

    Attributes:
        curve: Its values, mean and band.
        colour: Index.
        x: [E] positions of the values in the units of the x axis.
        marks: (x, y, words) of single points worth a mark.
    """

    curve: Curve
    colour: int
    x: FloatArray
    marks: tuple[tuple[float, float, str], ...] = ()


def accuracy_by_round(study: Study) -> Figure:
    """Mean test accuracy over clients against rounds; a mark at each seed's selected round."""
    found = curves(study, accuracy)
    lines = [
        Line(curve, study.colours[curve.label], curve.rounds, _selected_marks(study, curve.label)) for curve in found
    ]
    svg = line_chart(lines, x_title="Rounds", y_title="Test accuracy, mean over clients (%)", write_y=percent_tick)
    caption = f"Marks: the round chosen on validation, one per seed. {_band_words(found)}"
    return Figure("Accuracy by round", svg, caption.strip())


def accuracy_by_bytes(study: Study) -> Figure | None:
    """The same against what a client has sent and received; None if no method sends anything."""
    found = curves(study, accuracy)
    sending = [curve for curve in found if curve.bytes_per_client[-1] > 0]
    if not sending:
        return None
    totals = [float(curve.bytes_per_client[-1]) for curve in sending]
    log = max(totals) / min(totals) > 8
    lines = [_by_bytes(curve, study.colours[curve.label], log) for curve in sending]
    silent = [(curve, study.colours[curve.label]) for curve in found if curve not in sending]
    svg = line_chart(
        [drawn for drawn in lines if len(drawn.x)],
        x_title=f"Bytes down and up per client{', logarithmic' if log else ''}",
        y_title="Test accuracy, mean over clients (%)",
        write_x=size,
        write_y=percent_tick,
        log=log,
        levels=[(curve.label, index, float(curve.mean[-1])) for curve, index in silent],
    )
    words = "Cumulative, mean over all clients." + (" Dashed level: sends nothing, last round." if silent else "")
    return Figure("Accuracy by bytes", svg, f"{words} {_band_words(sending)}".strip())


def decidedness(study: Study) -> Figure | None:
    """Mean normalised entropy of the merging weights against rounds; None without merging weights."""
    lines = [Line(curve, study.colours[curve.label], curve.rounds) for curve in curves(study, entropy)]
    if not lines:
        return None
    svg = line_chart(lines, x_title="Rounds", y_title="Entropy of a client's weights", write_y=_tick, span=(0, 1))
    return Figure("How decided the weights are", svg, "0: every client uses one model. 1: it uses all of them alike.")


def _selected_marks(study: Study, label: str) -> tuple[tuple[float, float, str], ...]:
    marks = []
    for seed, run in study.runs[label].items():
        record = run.selected()
        value = float(np.nanmean(client_accuracies(record)))
        marks.append((float(record.round), value, f"{label}, seed {seed}: round {record.round}, {percent(value)} %"))
    return tuple(marks)


def _by_bytes(curve: Curve, index: int, log: bool) -> Line:
    """The curve over bytes; on a logarithmic axis without the points before anything was sent."""
    kept = curve.bytes_per_client > 0 if log else np.full(len(curve.rounds), True)
    shown = Curve(curve.label, curve.rounds[kept], curve.values[:, kept], curve.bytes_per_client[kept])
    return Line(shown, index, shown.bytes_per_client)


def _band_words(found: Sequence[Curve]) -> str:
    """What the bands are, for the numbers of seeds that occur."""
    counts = sorted({len(curve.values) for curve in found})
    many = [count for count in counts if count > 2]
    parts = []
    if many:
        parts.append(f"Bands: 95 % t interval over {ranges(many)} seeds.")
    if 2 in counts:
        parts.append("Bands: both of 2 seeds." if not many else "With 2 seeds: both of them.")
    if 1 in counts and len(counts) > 1:
        parts.append("A single seed has no band.")
    return " ".join(parts)


def _tick(value: float) -> str:
    return f"{value:.4g}"


def line_chart(
    lines: Sequence[Line],
    *,
    x_title: str,
    y_title: str,
    write_x: Callable[[float], str] = _tick,
    write_y: Callable[[float], str],
    log: bool = False,
    levels: Sequence[tuple[str, int, float]] = (),
    span: tuple[float, float] | None = None,
    top: float = 1.0,
    threshold: float | None = None,
) -> Markup:
    """Lines with bands, labelled at their ends; values are shares in 0..1, or up to `top`.

    Args:
        lines: At least one, each with a point.
        x_title: With its unit.
        y_title: With its unit.
        write_x: Writes a value of the x axis.
        write_y: Writes a value of the y axis.
        log: Logarithmic x axis.
        levels: (label, colour, y) of horizontal dashed lines.
        span: Range that the y axis covers at least; without it the values decide.
        top: The y axis ends here at the latest.
        threshold: y of a dashed line across the whole chart.
    """
    ends = [(drawn.curve.label, drawn.colour, float(drawn.curve.mean[-1])) for drawn in lines]
    names = ends + list(levels)
    right = WIDTH - 22 - CHARACTER * max(len(shorten(label, LABEL_LENGTH)) for label, _, _ in names)
    height = max(320.0, 90 + LABEL_GAP * len(names))
    x = _x_scale(lines, 44, right, log)
    y = Scale(*_y_range(lines, levels, span, top), height - 48, 36)
    return drawing(
        height,
        f"{y_title} against {x_title.lower()}. Last values: "
        + ", ".join(f"{label} {write_y(round(value, 4))}" for label, _, value in names),
        y_axis(y, 44, right, y_title, write_y),
        x_axis(x, 36, height - 48, x_title, write_x),
        None if threshold is None else _threshold(threshold, y, right, write_y),
        *(_band(drawn, x, y) for drawn in lines),
        *(
            line(x(drawn.x[-1]), y(value), right, y(value), f"tail {colour(drawn.colour)}")
            for drawn, (_, _, value) in zip(lines, ends, strict=True)
        ),
        *(line(44, y(value), right, y(value), f"line level {colour(index)}") for _, index, value in levels),
        *(_stroke(drawn, x, y, write_x, write_y) for drawn in lines),
        _end_labels(names, y, right),
    )


def _threshold(value: float, y: Scale, right: float, write: Callable[[float], str]) -> Markup:
    """A dashed line with its value on the axis, where no tick is in the way."""
    free = all(abs(y(tick) - y(value)) >= LABEL_GAP for tick in y.ticks())
    label = text(36, y(value) + 4.5, write(value), anchor="end", class_="tick") if free else None
    return join(line(44, y(value), right, y(value), "threshold"), label)


def _x_scale(lines: Sequence[Line], left: float, right: float, log: bool) -> Scale:
    low = min(float(drawn.x[0]) for drawn in lines)
    high = max(float(drawn.x[-1]) for drawn in lines)
    if log:
        return Scale(low, high if high > low else 10 * low, left, right, log=True)
    return Scale(min(low, 0.0), high if high > 0 else 1.0, left, right)


def _y_range(
    lines: Sequence[Line], levels: Sequence[tuple[str, int, float]], span: tuple[float, float] | None, top: float
) -> tuple[float, float]:
    values = [float(value) for drawn in lines for value in drawn.curve.values.ravel()]
    bands = [drawn.curve.band() for drawn in lines]
    values += [float(value) for band in bands if band for side in band for value in side]
    values += [value for _, _, value in levels] + list(span or ())
    return nice_range(values, floor=0.0, top=top)


def _band(drawn: Line, x: Scale, y: Scale) -> Markup | None:
    """The band, cut off at the ends of the y axis."""
    band = drawn.curve.band()
    if band is None:
        return None
    low, high = (np.clip(side, y.low, y.high) for side in band)
    there = [(x(a), y(b)) for a, b in zip(drawn.x, high, strict=True)]
    back = [(x(a), y(b)) for a, b in zip(drawn.x, low, strict=True)]
    return path([*there, *reversed(back)], f"band {colour(drawn.colour)}", closed=True)


def _stroke(
    drawn: Line, x: Scale, y: Scale, write_x: Callable[[float], str], write_y: Callable[[float], str]
) -> Markup:
    mean, label = drawn.curve.mean, drawn.curve.label
    points = [(x(a), y(b)) for a, b in zip(drawn.x, mean, strict=True)]
    targets = [
        element("circle", tip(f"{label}, {write_x(a)}: {write_y(round(b, 4))}"), cx=px, cy=py, r=6.0, class_="target")
        for (px, py), a, b in zip(points, drawn.x, mean, strict=True)
    ]
    marks = [marker(x(a), y(b), drawn.colour, 2.6, words) for a, b, words in drawn.marks]
    return join(path(points, f"line {colour(drawn.colour)}"), *targets, *marks)


def _end_labels(names: Sequence[tuple[str, int, float]], y: Scale, right: float) -> Markup:
    """Labels beside the ends of their lines, moved apart where they would overlap."""
    ends = [y(value) for _, _, value in names]
    placed = spread_out(ends, LABEL_GAP, y.end + 4, y.start + 4)
    return join(
        *(
            join(
                path([(right, end), (right + 6, end), (right + 12, at)], f"leader {colour(index)}"),
                text(right + 16, at + 4.5, element("tspan", shorten(label, LABEL_LENGTH)), class_="name"),
            )
            for (label, index, _), end, at in zip(names, ends, placed, strict=True)
        )
    )
