"""Figures of the clients' accuracies: their distribution, the worst of them, and the paired differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedmerge.report.kinds import known_tasks
from fedmerge.report.markup import Markup, element, join, shorten
from fedmerge.report.statistics import Difference, FloatArray
from fedmerge.report.study import Study, client_accuracies, differences
from fedmerge.report.svg import (
    CHARACTER,
    WIDTH,
    Figure,
    Scale,
    colour,
    drawing,
    legend,
    line,
    marker,
    nice_range,
    path,
    text,
    tip,
    x_axis,
)
from fedmerge.report.text import interval, listed, percent, percent_tick, points

DOTS = 250  # more clients than this in one row are drawn as a shape
STACK = 9  # more dots than this at one place become one larger dot
WORST = 12
LABEL_LENGTH = 18


class Point(NamedTuple):
    """One client of one run at the run's selected round."""

    seed: int
    client: int
    name: str
    accuracy: float
    task: str | None = None

    def words(self) -> str:
        """For a pointer that rests on it."""
        task = "" if self.task is None else f" ({self.task})"
        return f"{self.name}{task}, seed {self.seed}: {percent(self.accuracy)} %"


def client_points(study: Study, label: str) -> tuple[Point, ...]:
    """Every client with a test score, of every seed of a method."""
    return tuple(
        Point(seed, client, run.client_names[client], float(value), None if tasks is None else tasks[client])
        for seed, run in study.runs[label].items()
        for tasks in [known_tasks(run)]
        for client, value in enumerate(client_accuracies(run.selected()))
        if not np.isnan(value)
    )


def _label_width(labels: Sequence[str]) -> float:
    return 12 + CHARACTER * max(len(shorten(label, LABEL_LENGTH)) for label in labels)


def _by_mean(study: Study) -> list[str]:
    """Labels, best mean first."""
    means = {label: np.mean([point.accuracy for point in client_points(study, label)]) for label in study.labels}
    return sorted(study.labels, key=lambda label: -means[label])


# Distribution


def distribution(study: Study) -> Figure:
    """Every client as a dot (or their density), with quartiles and deciles, one row per method."""
    labels = _by_mean(study)
    rows = {label: client_points(study, label) for label in labels}
    left, row_height = _label_width(labels), 48.0
    crowded = max(map(len, rows.values())) > DOTS
    low, high = nice_range([point.accuracy for row in rows.values() for point in row], floor=0.0, top=1.0)
    bottom = 8 + row_height * len(rows)
    x = Scale(low, high, left, WIDTH - 12)
    drawn = [
        _distribution_row(label, row, study.colours[label], x, 8 + row_height * (index + 0.5), crowded=crowded)
        for index, (label, row) in enumerate(rows.items())
    ]
    medians = (f"{label} {percent(float(np.median([p.accuracy for p in row])))}" for label, row in rows.items())
    words = f"Distribution of test accuracy over clients. Medians in percent: {', '.join(medians)}"
    axis = x_axis(x, 8, bottom, "Test accuracy of a client (%)", percent_tick)
    dots = "Width: how many clients." if crowded else "Each dot is a client of a seed, a larger one several alike."
    caption = f"{dots} Bar: middle half, with the median; thin line: from the worst to the best tenth."
    return Figure("From client to client", drawing(bottom + 48, words, axis, *drawn), caption)


def _distribution_row(label: str, row: Sequence[Point], index: int, x: Scale, y: float, *, crowded: bool) -> Markup:
    values = np.array([point.accuracy for point in row])
    cloud = _density(values, index, x, y) if crowded else _dots(row, index, x, y)
    p10, q1, median, q3, p90 = (x(float(value)) for value in np.percentile(values, [10, 25, 50, 75, 90]))
    about = f"{label}: median {percent(float(np.median(values)))} %, {len(values)} clients"
    box = element(
        "rect", tip(about), x=q1, y=y + 13, width=max(q3 - q1, 1.0), height=5.0, class_=f"box {colour(index)}"
    )
    return join(
        text(0, y + 4.5, element("tspan", shorten(label, LABEL_LENGTH)), class_="name"),
        cloud,
        line(p10, y + 15.5, p90, y + 15.5, f"whisker {colour(index)}"),
        box,
        line(median, y + 11, median, y + 20, "median"),
    )


def _signed_ranks(places: Sequence[int]) -> list[int]:
    """0, 1, -1, 2, -2 … for the first, second, third … that stands at the same place."""
    seen: dict[int, int] = {}
    ranks = []
    for place in places:
        rank = seen[place] = seen.get(place, -1) + 1
        ranks.append((rank + 1) // 2 * (1 if rank % 2 else -1))
    return ranks


def _dots(row: Sequence[Point], index: int, x: Scale, y: float) -> Markup:
    """Dots stacked around the row's middle; where stacks would be too tall, one dot whose area says how many."""
    places = [round(x(point.accuracy) / 5) for point in row]
    stacks = {place: [point for point, at in zip(row, places, strict=True) if at == place] for place in set(places)}
    tallest = max(map(len, stacks.values()))
    if tallest > STACK:
        unit = min(2.4, 13 / tallest**0.5)
        return join(*(_bubble(points, index, x(_mean(points)), y - 4, unit) for _, points in sorted(stacks.items())))
    ranks = _signed_ranks(places)
    return join(
        *(
            _dot(x(point.accuracy), y - 4 + 3 * rank, 2.4, point.words(), index)
            for point, rank in zip(row, ranks, strict=True)
        )
    )


def _mean(found: Sequence[Point]) -> float:
    return float(np.mean([point.accuracy for point in found]))


def _bubble(found: Sequence[Point], index: int, x: float, y: float, unit: float) -> Markup:
    """One dot for several clients of nearly the same accuracy; its area is their number."""
    words = found[0].words() if len(found) == 1 else f"{len(found)} clients: {percent(_mean(found))} %"
    return _dot(x, y, unit * len(found) ** 0.5, words, index)


def _dot(x: float, y: float, radius: float, words: str, index: int) -> Markup:
    return element("circle", tip(words), cx=x, cy=y, r=radius, class_=f"dot {colour(index)}")


def _density(values: FloatArray, index: int, x: Scale, y: float) -> Markup:
    """A histogram of 60 bins, mirrored."""
    counts, edges = np.histogram(values, bins=60, range=(x.low, x.high))
    middles, heights = (edges[:-1] + edges[1:]) / 2, 14 * counts / counts.max()
    upper = [(x(float(m)), y - 4 - float(h)) for m, h in zip(middles, heights, strict=True)]
    lower = [(x(float(m)), y - 4 + float(h)) for m, h in zip(middles, heights, strict=True)]
    return path([*upper, *reversed(lower)], f"density {colour(index)}", closed=True)


# Differences


def forest(study: Study) -> Figure | None:
    """Paired differences to the reference with their intervals; None with a single method."""
    found = sorted(differences(study), key=lambda difference: -np.nan_to_num(difference.interval.mean, nan=-np.inf))
    if not found:
        return None
    left, right = _label_width([difference.label for difference in found]), WIDTH - 110
    ends = [v for d in found for v in (d.interval.mean, d.interval.low, d.interval.high) if not np.isnan(v)]
    x = Scale(*nice_range([*ends, 0.0], 4), left, right)
    bottom = 30 + 32.0 * len(found)
    rows = [_forest_row(row, study.colours[row.label], x, 46 + 32.0 * i) for i, row in enumerate(found)]
    spoken = "; ".join(f"{row.label} {interval(row.interval, 'points')}" for row in found)
    svg = drawing(
        bottom + 48,
        f"Paired differences to {study.reference} in percentage points: {spoken}",
        x_axis(
            x,
            24,
            bottom,
            f"Difference to {shorten(study.reference, 32)} (points)",
            lambda t: points(t).replace(".0", ""),
            count=4,
        ),
        line(x(0), 24, x(0), bottom, "zero"),
        text(x(0), 14, shorten(study.reference, LABEL_LENGTH), anchor="middle", class_="name"),
        *rows,
    )
    return Figure(f"Paired differences to {study.reference}", svg, _forest_caption(found))


def _forest_caption(found: Sequence[Difference]) -> str:
    kinds = {row.interval.over for row in found if row.seeds}
    parts = ["Left of the line is worse."]
    if "seeds" in kinds:
        parts.append("Mean and 95 % t interval over seeds, on the same seeds and clients.")
    if "clients" in kinds:
        parts.append("† Over clients, one seed: says nothing about other splits.")
    return " ".join(parts)


def _forest_row(row: Difference, index: int, x: Scale, y: float) -> Markup:
    name = text(0, y + 4.5, element("tspan", shorten(row.label, LABEL_LENGTH)), class_="name")
    if not row.seeds:
        return join(name, text(WIDTH, y + 4.5, "no seed in common", anchor="end", class_="value"))
    found = row.interval
    words = f"{row.label}: {interval(found, 'points')} points"
    kind = " over-clients" if found.over == "clients" else ""
    bar = None
    if not np.isnan(found.half_width):
        bar = line(x(found.low), y, x(found.high), y, f"interval {colour(index)}{kind}")
    value = text(WIDTH, y + 4.5, interval(found, "points"), anchor="end", class_="value")
    return join(name, bar, marker(x(found.mean), y, index, 3.6, words), value)


# The worst


def worst_clients(study: Study) -> Figure:
    """The clients that the reference serves worst, with what every method gives them."""
    worst = sorted(client_points(study, study.reference), key=lambda point: point.accuracy)[:WORST]
    scores = {(label, p.seed, p.client): p for label in study.labels for p in client_points(study, label)}
    rows = [{label: scores.get((label, point.seed, point.client)) for label in study.labels} for point in worst]
    names = [f"{shorten(point.name, 12)} · {point.seed}" for point in worst]
    left = 14 + CHARACTER * max(map(len, names))
    keys, used = legend([(label, study.colours[label]) for label in study.labels], 16)
    top = 12 + used
    values = [point.accuracy for row in rows for point in row.values() if point]
    x = Scale(*nice_range(values, floor=0.0, top=1.0), left, WIDTH - 12)
    bottom = top + 24.0 * len(rows)
    drawn = [
        _worst_row(name, row, study, x, top + 24 * i + 12)
        for i, (name, row) in enumerate(zip(names, rows, strict=True))
    ]
    spoken = "; ".join(point.words() for point in worst)
    axis = x_axis(x, top, bottom, "Test accuracy of the client (%)", percent_tick)
    svg = drawing(
        bottom + 48, f"Clients with the lowest accuracy under {study.reference}: {spoken}", keys, axis, *drawn
    )
    caption = f"The {len(worst)} lowest accuracies under {study.reference}: client · seed.{_tasks_of(worst)}"
    return Figure(f"Worst clients of {study.reference}", svg, caption)


def _tasks_of(found: Sequence[Point]) -> str:
    """How many clients are of which task; nothing unless tasks are known."""
    counts = Counter(point.task for point in found if point.task is not None)
    return f" Tasks: {listed([f'{count} of {task}' for task, count in counts.most_common()])}." if counts else ""


def _worst_row(name: str, row: dict[str, Point | None], study: Study, x: Scale, y: float) -> Markup:
    found = {label: point for label, point in row.items() if point}
    ends = [x(point.accuracy) for point in found.values()]
    ranks = _signed_ranks([round(end / 7) for end in ends])
    marks = [
        marker(end, y + 5 * rank, study.colours[label], 4, f"{label}, {point.words()}")
        for (label, point), end, rank in zip(found.items(), ends, ranks, strict=True)
    ]
    label = text(0, y + 4.5, element("tspan", name), class_="name")
    return join(label, line(min(ends), y, max(ends), y, "span"), *marks)
