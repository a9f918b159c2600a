"""Figures of an explanation: the tree of clients, their likeness, who uses a model, and for which classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.cluster import hierarchy

from fedmerge.experiment.record import RunRecord
from fedmerge.report.classes import SERVED, Classes, class_shares, classes_of, counted, federation_shares
from fedmerge.report.explain import Explanation, ModelUse
from fedmerge.report.kinds import Kinds, kinds_of
from fedmerge.report.likeness import TOGETHER
from fedmerge.report.markup import Markup, element, join, shorten
from fedmerge.report.statistics import FloatArray, overlap
from fedmerge.report.svg import CHARACTER, COLOURS, WIDTH, Figure, Scale, drawing, line, path, text, tip, x_axis
from fedmerge.report.text import percent, percent_tick, plural
from fedmerge.report.weights import ROWS, Bin, Grid, binned, bins, marked_names, row_names, scale_bar

LEAVES = 80  # more clients than this have no room for a leaf each
NAME = 16
MARKED = 20  # more groups than this may share the rows of a map, and are not marked
CROWDED_ROWS = 36  # of a map whose rows are shared anyway: every cell is an element of the page
CLASSES = 30  # of more classes, those that differ most between models are shown
FAINTER = 0.45  # most classes are rare at most models: what is missing must not outshine what is there
STRIP = 8.0  # width of the marks of tasks or true groups
LISTED = 2 * COLOURS  # kinds that can be told apart by colour: every colour full and pale
KEY_LINE = 22.0


def dendrogram(explanation: Explanation) -> Figure | None:
    """The tree of clients, a leaf each, with the groups found; None for one client, one model or too many clients."""
    tree, order = explanation.likeness.tree, explanation.likeness.order
    if tree is None or len(order) > LEAVES or explanation.mixing.shape[1] == 1:
        return None
    run = explanation.run
    names = [shorten(run.client_names[client], NAME) for client in order]
    kinds = kinds_of(run)
    left = 10 + CHARACTER * max(map(len, names)) + (STRIP + 6) * (kinds is not None)
    key, used = _key(kinds)
    top, step = 12.0 + used, 18.0 if len(order) <= 24 else 14.0
    bottom = top + step * len(order)
    x = Scale(0.0, 1.0, WIDTH - 34, left)
    svg = drawing(
        bottom + 48,
        f"Tree of {plural(len(order), 'client')} by the weight they share; {plural(len(explanation.groups), 'group')}",
        key,
        *_group_bands(explanation, top, step),
        x_axis(x, top, bottom, "Weight that the branches share (%)", percent_tick),
        line(x(TOGETHER), top, x(TOGETHER), bottom, "threshold"),
        *_branches(tree, x, top, step),
        *(
            _leaf(run.client_names[client], name, kinds, client, left, top + step * (place + 0.5))
            for place, (client, name) in enumerate(zip(order, names, strict=True))
        ),
    )
    caption = (
        "Branches meet at the weight that their clients share, on average over pairs. Groups are cut at the dashed "
        f"line: half of the weight. {run.label}, seed {run.seed}, round {run.selected().round}."
    )
    return Figure("Which clients share models", svg, caption)


def _group_bands(explanation: Explanation, top: float, step: float) -> list[Markup]:
    """Every second group shaded, each with its letter at the right."""
    parts, place = [], 0
    for index, group in enumerate(explanation.groups):
        y, height = top + step * place, step * len(group.members)
        place += len(group.members)
        words = tip(f"Group {group.name}: {plural(len(group.members), 'client')}")
        class_ = "shade" if index % 2 == 0 else "shade none"
        parts.append(element("rect", words, x=0.0, y=y, width=WIDTH, height=height, class_=class_))
        parts.append(text(WIDTH - 4, y + height / 2 + 4.5, group.name, anchor="end", class_="name"))
    return parts


def _branches(tree: FloatArray, x: Scale, top: float, step: float) -> list[Markup]:
    """One path of three lines per merger; scipy puts leaf k at height 10 k + 5."""
    drawn = hierarchy.dendrogram(tree, no_plot=True)
    return [
        path([(x(1 - far), top + step * at / 10) for at, far in zip(heights, apart, strict=True)], "branch")
        for heights, apart in zip(drawn["icoord"], drawn["dcoord"], strict=True)
    ]


def _leaf(whole: str, name: str, kinds: Kinds | None, client: int, left: float, y: float) -> Markup:
    label = text(0, y + 4.5, name, class_="tick")
    if kinds is None:
        return label
    index = kinds.of[client]
    words = tip(f"{whole}: {kinds.title.lower()} {kinds.short[index]}")
    dot = element("circle", words, cx=left - STRIP - 1, cy=y, r=4.0, class_=f"mark {_paint(index)}")
    return join(label, dot)


def _paint(index: int) -> str:
    """Classes of a kind's colour: the second seven are the first ones, pale."""
    return f"c{index % COLOURS}" + (" pale" if index // COLOURS % 2 else "")


def _key(kinds: Kinds | None) -> tuple[Markup | None, float]:
    """What the colours of tasks or true groups are, and the height it takes; None for want of kinds or of room."""
    if kinds is None:
        return None, 0.0
    if len(kinds.names) > LISTED:
        return None, KEY_LINE
    first = 18 + CHARACTER * len(kinds.title)
    parts, x, y = [text(0, 13, kinds.title, class_="axis")], first, 13.0
    for index, name in enumerate(kinds.short):
        shown = shorten(name, NAME)
        width = 26 + CHARACTER * len(shown)
        if x > first and x + width > WIDTH:
            x, y = first, y + KEY_LINE
        parts.append(element("circle", cx=x, cy=y - 4.5, r=4.0, class_=f"mark {_paint(index)}"))
        parts.append(text(x + 8, y, shown, class_="tick"))
        x += width
    return join(*parts), y + KEY_LINE - 13


def likeness_map(explanation: Explanation) -> Figure | None:
    """Client by client in the order of the tree: the weight that two share; None for one client or one model."""
    mixing, run = explanation.mixing, explanation.run
    limit = ROWS if len(mixing) <= ROWS else CROWDED_ROWS
    apart = len(explanation.groups) <= MARKED or len(mixing) <= ROWS
    rows = bins(explanation.likeness.order, explanation.group_of if apart else None, limit)
    if len(rows) < 2 or mixing.shape[1] == 1:
        return None
    kinds = kinds_of(run)
    left = 4 + (STRIP + 4) * (kinds is not None)
    step = min((WIDTH - left - 40) / len(rows), 26.0)
    grid = Grid(left, 28, step, step)
    svg = drawing(
        grid.top + step * len(rows) + 8,
        f"Weight that {plural(len(mixing), 'client')} share with each other",
        scale_bar(),
        grid.heat(overlap(binned(mixing, rows)), lambda i, j: f"{row_names(run, rows[i])}, {row_names(run, rows[j])}"),
        grid.group_marks(rows, len(rows), [group.name for group in explanation.groups]),
        *_strips(run, kinds, rows, grid),
    )
    most = max(len(row.members) for row in rows)
    crowd = "" if most == 1 else f" Up to {most} clients share a row, which shows their mean."
    strip = "" if kinds is None else f" At the left: the {kinds.title.lower()}, of a shared row the commonest."
    return Figure(
        "How alike any two clients are", svg, f"Weight on the same models, ordered by likeness.{crowd}{strip}"
    )


def _strips(run: RunRecord, kinds: Kinds | None, rows: Sequence[Bin], grid: Grid) -> list[Markup]:
    """The task or true group of every row, the commonest one of its clients; nothing if they are not known."""
    if kinds is None:
        return []
    found = [Counter(sorted(kinds.of[client] for client in row.members)).most_common(1)[0][0] for row in rows]
    return [
        element(
            "rect",
            tip(f"{row_names(run, row)}: {kinds.title.lower()} {kinds.short[index]}"),
            x=2.0,
            y=grid.top + grid.height * place,
            width=STRIP,
            height=grid.height,
            class_=f"strip {_paint(index)}",
        )
        for place, (row, index) in enumerate(zip(rows, found, strict=True))
    ]


def model_use(explanation: Explanation) -> Figure:
    """A bar per model: its share of all clients' weight, by task or true group where known."""
    models, kinds = explanation.models, kinds_of(explanation.run)
    key, used = _key(kinds)
    top, step = 12.0 + used, 24.0
    longest = max(*(use.share for use in models), 0.02)
    x = Scale(0.0, longest, 66, WIDTH - 165)
    rows = [_use_row(use, kinds, x, top + step * index) for index, use in enumerate(models)]
    bottom = top + step * len(models)
    spoken = ", ".join(f"model {use.model} {percent(use.share)}" for use in models)
    svg = drawing(bottom + 4, f"Share of all weight in percent: {spoken}", key, *rows)
    parts = "" if kinds is None else f"Colours: the {kinds.title.lower()}s of its users. "
    caption = f"{parts}Percent of all clients' weight, and how many clients have it as their heaviest model."
    return Figure("Who uses each model", svg, caption)


def _use_row(use: ModelUse, kinds: Kinds | None, x: Scale, y: float) -> Markup:
    parts, at = [], 0.0
    for index, share in _by_kind(use, kinds):
        width = use.share * share
        whose = "" if kinds is None else f", {kinds.names[index]}"
        words = tip(f"Model {use.model}{whose}: {percent(width)} % of all weight")
        class_ = f"box {_paint(index)}"
        parts.append(element("rect", words, x=x(at), y=y + 3, width=x(width) - x(0), height=16.0, class_=class_))
        at += width
    name = text(0, y + 15, f"Model {use.model}", class_="tick")
    value = f"{percent(use.share)} %, heaviest of {use.heaviest_of}"
    return join(name, *parts, text(x(use.share) + 8, y + 15, value, class_="value"))


def _by_kind(use: ModelUse, kinds: Kinds | None) -> list[tuple[int, float]]:
    """(kind, its share of the model's weight) in the order of the kinds; all of it in one part where none is known."""
    if kinds is None:
        return [(0, 1.0)]
    found = (use.tasks if kinds.are_tasks else use.true_groups) or ()
    return sorted((kinds.short.index(str(name)), share) for name, share in found)


def class_map(explanation: Explanation) -> Figure | None:
    """Classes by models: more or less frequent among a model's users than on average.

    None without class counts, for a single class or model, and where no class is more or less frequent anywhere.
    """
    run, classes = explanation.run, classes_of(explanation.run)
    if classes is None or explanation.mixing.shape[1] == 1:
        return None
    users, everywhere = class_shares(explanation.mixing, classes), federation_shares(classes)
    shown = _most_different(users, everywhere, classes)
    names, rows = _class_rows(run, classes, shown)
    marks, room = marked_names(classes.tasks)
    left, models = 10 + CHARACTER * max(map(len, names)), len(users)
    grid = Grid(left, 42, min((WIDTH - left - room) / models, 90.0), 14.0 if len(shown) > 12 else 18.0)
    cells = _ratio_cells(grid, shown, run.class_names, users, everywhere)
    if not any(cells):
        return None
    heads = [text(left + grid.width * (j + 0.5), 36, j, anchor="middle", class_="tick") for j in range(models)]
    svg = drawing(
        grid.top + grid.height * len(shown) + 8,
        f"How often each of {len(shown)} classes occurs among the users of each model, against the federation",
        text(left, 14, "Global model", class_="axis"),
        _ratio_bar(),
        *heads[:: -(-models // 20)],
        *(text(0, grid.top + grid.height * (i + 0.5) + 4.5, name, class_="tick") for i, name in enumerate(names)),
        *cells,
        grid.group_marks(rows, models, marks),
    )
    few = "" if len(shown) == len(everywhere) else f" The {len(shown)} of {len(everywhere)} classes that differ most."
    return Figure("What each model sees", svg, f"{_class_caption(run, classes)}{few}")


def _class_caption(run: RunRecord, classes: Classes) -> str:
    within, left_out = "", ""
    if classes.tasks:
        within = " within its task"
        left_out = f" Tasks of less than {percent_tick(SERVED)} % of a model's {counted(run)} are left out."
    return (
        f"Train {counted(run)} of a class among a model's users, each counting with its weight, against the "
        f"federation{within}: blue is more, orange less, blank about as many.{left_out}"
    )


def _class_rows(run: RunRecord, classes: Classes, shown: Sequence[int]) -> tuple[list[str], list[Bin]]:
    """Names of classes, and the rows that they stand in by task; what the marks say is not repeated in the names."""
    if not classes.tasks:
        return [shorten(run.class_names[k], NAME) for k in shown], [Bin((k,), None) for k in shown]
    names = [run.class_names[k].removeprefix(f"{classes.tasks[classes.blocks[k]]}: ") for k in shown]
    return [shorten(name, NAME) for name in names], [Bin((k,), int(classes.blocks[k])) for k in shown]


def _most_different(users: FloatArray, everywhere: FloatArray, classes: Classes) -> list[int]:
    """Up to 30 classes, by task, whose share among some model's users is farthest from the federation's."""
    apart = np.nan_to_num(np.abs(users - everywhere)).max(axis=0)
    told = [k for k in np.argsort(-apart, kind="stable").tolist() if everywhere[k] > 0 or not classes.tasks]
    return sorted(told[:CLASSES], key=lambda k: (classes.blocks[k], k))


def _ratio_cells(
    grid: Grid, shown: Sequence[int], names: Sequence[str], users: FloatArray, everywhere: FloatArray
) -> list[Markup | None]:
    """A cell for every class that is shown and every model."""
    ratio = np.divide(users, everywhere, out=np.ones_like(users), where=(everywhere > 0) & ~np.isnan(users))
    return [
        _ratio_cell(grid, row, j, float(ratio[j, k]), f"{names[k]}, model {j}: {percent(users[j, k])} %")
        for row, k in enumerate(shown)
        for j in range(len(users))
    ]


def _ratio_cell(grid: Grid, row: int, column: int, ratio: float, words: str) -> Markup | None:
    """Blue for more, orange for less; four times or a quarter is full strength, and within a tenth is left blank."""
    strength = _strength(ratio)
    if strength < 0.07:
        return None
    return element(
        "rect",
        tip(f"{words}, {ratio:.2g} times the average"),
        x=grid.left + grid.width * column,
        y=grid.top + grid.height * row,
        width=grid.width,
        height=grid.height,
        fill_opacity=strength if ratio > 1 else FAINTER * strength,
        class_="more" if ratio > 1 else "less",
    )


def _strength(ratio: float) -> float:
    """0 for the average, 1 from four times or a quarter of it."""
    return 1.0 if ratio <= 0 else min(abs(math.log2(ratio)) / 2, 1.0)


def _ratio_bar() -> Markup:
    """What the strengths mean, at the right end of the first line."""
    grid = Grid(WIDTH - 128, 4, 18, 9)
    cells = [_ratio_cell(grid, 0, place, ratio, "") for place, ratio in enumerate((0.25, 0.5, 1.0, 2.0, 4.0))]
    ends = text(grid.left - 6, 13, "¼ ×", anchor="end", class_="tick"), text(grid.left + 96, 13, "4 ×", class_="tick")
    return join(*cells, *ends)
