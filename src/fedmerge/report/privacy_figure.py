"""The figure of the clients' crowds."""

from __future__ import annotations

import numpy as np

from fedmerge.core.crowd import SMALL
from fedmerge.report.markup import Markup, element, join
from fedmerge.report.privacy import Privacy
from fedmerge.report.statistics import FloatArray
from fedmerge.report.svg import WIDTH, Figure, Scale, drawing, line, nice_range, path, text, tip, y_axis
from fedmerge.report.text import plural

DOTS = 250  # more clients than this are drawn as a line
LEFT, TOP, BOTTOM = 46.0, 34.0, 254.0
WIDE = 8.0  # ratio of the largest crowd to the smallest from which the axis is logarithmic


def crowds(found: Privacy) -> Figure | None:
    """Every client's crowd, the smallest first, against the line of warning; None where no client has one."""
    if found.found is None or np.isnan(found.effective).all():
        return None
    order = [i for i in found.order if not np.isnan(found.effective[i])]
    x, y = Scale(-0.5, len(order) - 0.5, LEFT, WIDTH - 8), _scale(found, order)
    svg = drawing(
        BOTTOM + 30,
        f"Crowds of {plural(len(order), 'client')}, {len(found.small)} of them below {SMALL}",
        y_axis(y, LEFT, WIDTH - 8, "Crowd K_eff of a client", lambda value: f"{value:g}"),
        _limit(y),
        _of_rounds(found, order, x, y),
        _line(found, order, x, y) if len(order) > DOTS else _dots(found, order, x, y),
        text(LEFT, BOTTOM + 24, "Clients, the smallest crowd first", class_="axis"),
    )
    return Figure("How many others a client's models mix", svg, _caption(found, len(order)))


def _scale(found: Privacy, order: list[int]) -> Scale:
    """From the smallest to the largest crowd, the limit within; logarithmic where they are far apart."""
    values = [*found.effective[order].tolist(), float(SMALL)]
    if found.smallest is not None:
        values += found.smallest[order][~np.isnan(found.smallest[order])].tolist()
    low, high = min(values), max(values)
    if high / low > WIDE:
        return Scale(0.9 * low, 1.1 * high, BOTTOM, TOP, log=True)
    return Scale(*nice_range([0.0, high]), BOTTOM, TOP)


def _limit(y: Scale) -> Markup:
    return join(
        line(LEFT, y(SMALL), WIDTH - 8, y(SMALL), "threshold"),
        text(WIDTH - 8, y(SMALL) - 6, f"warned of below {SMALL}", anchor="end", class_="tick"),
    )


def _dots(found: Privacy, order: list[int], x: Scale, y: Scale) -> Markup:
    return join(*(_dot(found, client, x(place), y) for place, client in enumerate(order)))


def _dot(found: Privacy, client: int, at: float, y: Scale) -> Markup:
    value = float(found.effective[client])
    words = tip(f"{found.run.client_names[client]}: {value:.2f}")
    return element("circle", words, cx=at, cy=y(value), r=3.4, class_=f"mark {_colour(found, client)}")


def _colour(found: Privacy, client: int) -> str:
    return "c1" if client in found.small else "c0"


def _line(found: Privacy, order: list[int], x: Scale, y: Scale) -> Markup:
    """All clients as one line, the part below the limit in the colour of a warning."""
    values, small = found.effective[order], len(found.small)
    steps = _steps(values, x, y)
    return join(
        path(steps[: 2 * small], "line c1") if small else None,
        path(steps[2 * small :], "line c0") if small < len(order) else None,
    )


def _steps(values: FloatArray, x: Scale, y: Scale) -> list[tuple[float, float]]:
    """A level as wide as its place for each client."""
    return [(x(place + side), y(float(value))) for place, value in enumerate(values) for side in (-0.5, 0.5)]


def _of_rounds(found: Privacy, order: list[int], x: Scale, y: Scale) -> Markup | None:
    """A faint stroke down to the smallest crowd among the clients of a round."""
    if found.smallest is None:
        return None
    drops = [
        line(x(place), y(float(found.effective[client])), x(place), y(float(found.smallest[client])), "span")
        for place, client in enumerate(order)
        if found.smallest[client] < found.effective[client]
    ]
    return join(*drops)


def _caption(found: Privacy, drawn: int) -> str:
    run = found.run
    mark = "Each level" if drawn > DOTS else "Each dot"
    alone = len(run.client_names) - drawn
    rest = f" {plural(alone, 'client')} without any crowd {'is' if alone == 1 else 'are'} left out." if alone else ""
    strokes = "" if found.smallest is None else " Strokes reach to its smallest crowd among the clients of one round."
    return (
        f"{mark} is a client: as many updates of equal share could be mixed in what it sees of the others' on its own "
        f"models.{strokes}{rest} {run.label}, seed {run.seed}, weights of round {found.round}."
    )
