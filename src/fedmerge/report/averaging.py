"""How far averaging the factors of adapters is from averaging their products, round by round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedmerge.experiment.record import RoundRecord, RunRecord
from fedmerge.report.curves import Curve
from fedmerge.report.lines import Line, line_chart
from fedmerge.report.study import Study
from fedmerge.report.svg import Figure
from fedmerge.report.text import listed

LIMIT = 0.3  # from which products are averaged, unless a run was told otherwise
POINTS = 150  # of more rounds, as many at even distances are drawn

_WORDS = (
    "Averaging LoRA factors B and A separately differs from averaging their products BA by this share of the product's "
    "norm; above 0.3 the products are averaged and truncated back to rank r."
)


def averaging_errors(study: Study) -> Figure | None:
    """Averaging error against rounds, a mark where products were averaged; None if no round of any run has one."""
    lines = [found for label in study.labels if (found := _line(study, label)) is not None]
    if not lines:
        return None
    svg = line_chart(
        lines,
        x_title="Rounds",
        y_title="Averaging error (share of the product's norm)",
        write_y=lambda value: f"{value:.3g}",
        span=(0.0, LIMIT),
        top=math.inf,
        threshold=LIMIT,
    )
    marks = " Marks: products were averaged." if any(drawn.marks for drawn in lines) else ""
    return Figure("What averaging factors would miss", svg, f"{_WORDS}{marks}{_told_otherwise(study)}")


def averaging_error(record: RoundRecord) -> float:
    """What averaging factors would have missed in a round; NaN where nothing was averaged or it was not measured."""
    value = record.state.get("averaging_error")
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _as_products(record: RoundRecord) -> bool:
    return record.state.get("space") == "product"


def _line(study: Study, label: str) -> Line | None:
    """The rounds that have the error in all seeds of a method; None without any."""
    runs = tuple(study.runs[label].values())
    tracks = [_track(run) for run in runs]
    rounds = _thinned(sorted(set.intersection(*(set(track) for track in tracks))))
    if not rounds:
        return None
    values = np.array([[averaging_error(track[number]) for number in rounds] for track in tracks])
    numbers = np.array(rounds, dtype=np.float64)
    curve = Curve(label, numbers, values, np.zeros(len(rounds)))
    marks = []
    for number, mean in zip(rounds, curve.mean, strict=True):
        count = sum(_as_products(track[number]) for track in tracks)
        if count:
            seeds = f" in {count} of {len(runs)} seeds" if count < len(runs) else ""
            marks.append((float(number), float(mean), f"{label}, round {number}: {mean:.3g}, products{seeds}"))
    return Line(curve, study.colours[label], numbers, tuple(marks))


def _track(run: RunRecord) -> dict[int, RoundRecord]:
    return {record.round: record for record in run.rounds if not math.isnan(averaging_error(record))}


def _thinned(rounds: Sequence[int]) -> list[int]:
    """All of a few; of many the first, the last and others at even distances."""
    if len(rounds) <= POINTS:
        return list(rounds)
    return [rounds[i] for i in sorted({round(place) for place in np.linspace(0, len(rounds) - 1, POINTS)})]


def _told_otherwise(study: Study) -> str:
    """Methods that averaged products below the limit, or factors above it."""
    products, factors = dict[str, None](), dict[str, None]()
    for run in study.all_runs():
        for record in _track(run).values():
            if _as_products(record) and averaging_error(record) <= LIMIT:
                products[run.label] = None
            elif record.state.get("space") == "factors" and averaging_error(record) > LIMIT:
                factors[run.label] = None
    said = [(products, "products below 0.3, too"), (factors, "factors above 0.3, too")]
    return "".join(f" {listed(list(labels))}: {words}." for labels, words in said if labels)
