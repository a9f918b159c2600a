"""The privacy of a run in plain words and as tables, for the page and the terminal alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmerge.core.crowd import SMALL
from fedmerge.experiment.record import RunRecord, to_plain
from fedmerge.report.kinds import known_tasks
from fedmerge.report.markup import shorten
from fedmerge.report.privacy import Privacy, known, privacy, why_none
from fedmerge.report.study import Study
from fedmerge.report.table import Cell, Column, Table
from fedmerge.report.text import percent, plural

NAME = 80  # characters of a client's name in a sentence
WARNING = f"below {SMALL}"

_CROWD = Column(
    "Crowd",
    "share",
    "K_eff: as many updates of equal share could be mixed in what the client sees of the others' updates on its own "
    "models; 1 means that it reads another client's update, – that it can read nobody",
)
_SMALLEST = Column(
    "Smallest round",
    "share",
    "the same among the clients of one round, the smallest of all rounds that it took part in; with the weights of the "
    "last evaluated round before each",
)
_NEAREST = Column("Reads best", "text", "the client whose update it could read best")
_NEAREST_SHARE = Column("Its part (%)", "percent", "of that client's update in what it sees of the others'")
_LARGEST = Column("Largest share (%)", "percent", "of a model's step that is the client's own update, in any model")
_LEVERAGE = Column("Leverage (%)", "percent", "of the step of its own model that is its own update")


def sentences(found: Privacy) -> tuple[str, ...]:
    """What the numbers say, the most important first."""
    if found.found is None:
        reason = why_none(found)
        return (reason[0].upper() + reason[1:] + ".",)
    said = [_verdict(found), _alone(found), _rounds(found), _of_parts(found.run)]
    return tuple(sentence for sentence in said if sentence)


def _verdict(found: Privacy) -> str:
    values, total = found.effective, len(found.run.client_names)
    if np.isnan(values).all():
        return "No client can read another's update off its own models: nobody shares a model."
    if not found.small:
        return f"Every crowd is {SMALL} or more; the smallest is {float(np.nanmin(values)):.2f}."
    first = found.small[0]
    reader, read = (_name(found.run, i) for i in (first, int(known(found).nearest[first])))
    share = percent(float(known(found).nearest_share[first]))
    verb = "has" if len(found.small) == 1 else "have"
    return (
        f"{len(found.small)} of {plural(total, 'client')} {verb} a crowd below {SMALL}. The smallest is "
        f"{values[first]:.2f}: of what {reader} sees of the others' updates on its own models, {share} % is that of "
        f"{read}."
    )


def _alone(found: Privacy) -> str:
    count = int(np.isnan(found.effective).sum())
    if not 0 < count < len(found.run.client_names):
        return ""
    verb, whose = ("shares", "its") if count == 1 else ("share", "their")
    return f"With these weights {plural(count, 'client')} {verb} no model: nobody but the server reads {whose} updates."


def _rounds(found: Privacy) -> str:
    if found.smallest is None:
        return "Crowds of single rounds were not computed: there is no trained round, or there are too many pairs."
    if np.isnan(found.smallest).all():
        return ""
    small = int((found.smallest < SMALL).sum())
    return (
        "Among the clients of one round, with the weights of the last evaluation before it, the smallest crowd is "
        f"{float(np.nanmin(found.smallest)):.2f}; {plural(small, 'client')} had one below {SMALL} in some round."
    )


def _of_parts(run: RunRecord) -> str:
    if run.options.get("rows", "model") == "model":
        return ""
    return (
        "Parts of the network have merging weights of their own; these numbers are of their mean, and single parts may "
        "have smaller crowds."
    )


def _name(run: RunRecord, client: int) -> str:
    return shorten(run.client_names[client], NAME)


def privacy_table(run: RunRecord | Privacy, most: int | None = None) -> Table:
    """A row per client, the smallest crowd first, those that can read nobody last.

    Args:
        run: A run, or what `privacy` found of one.
        most: Rows at most.

    Raises:
        UsageError: for methods that share nothing, or whose weights are not known.
        FedmergeError: if the run was stopped before its first evaluation.
    """
    found = privacy(run) if isinstance(run, RunRecord) else run
    crowd, run, values = known(found), found.run, found.effective
    tasks = known_tasks(run)
    columns = (
        Column("Client", "text"),
        *((Column("Task", "text"),) if tasks is not None else ()),
        *(_CROWD, *((_SMALLEST,) if found.smallest is not None else ()), Column("Warning", "text")),
        *(_NEAREST, _NEAREST_SHARE, _LARGEST, _LEVERAGE),
    )
    rows: list[tuple[Cell, ...]] = []
    for i in found.order[:most]:
        row: list[Cell] = [run.client_names[i], *(() if tasks is None else (tasks[i],)), float(values[i])]
        row += [] if found.smallest is None else [float(found.smallest[i])]
        row.append(WARNING if values[i] < SMALL else None)
        row.append(None if crowd.nearest[i] < 0 else run.client_names[int(crowd.nearest[i])])
        row += [float(column[i]) for column in (crowd.nearest_share, crowd.largest, crowd.leverage)]
        rows.append(tuple(row))
    caption = f"Crowds of the clients of {run.label}, seed {run.seed}, round {found.round}"
    return Table(columns, tuple(rows), caption, (_shown(len(rows), len(values)),))


def _shown(shown: int, total: int) -> str:
    """How many there are, and what a table of them is."""
    count = f"All {total:,}" if shown == total else f"{shown:,} of {total:,}"
    return f"{count} clients, the smallest crowd first. This table says who is like whom: it is not for publication."


def method_table(study: Study) -> Table:
    """A row per method: the smallest crowd and how many clients are below the limit, over the seeds the worst."""
    rows = tuple(
        _method_row(label, [privacy(run, rounds=False) for run in runs.values()]) for label, runs in study.runs.items()
    )
    columns = (
        Column("Method", "text"),
        Column("Smallest crowd", "share", f"{_CROWD.meaning}; over all seeds"),
        Column(f"Clients below {SMALL}", "whole", "in the seed with most of them"),
        Column("Largest leverage (%)", "percent", f"{_LEVERAGE.meaning}; over all seeds"),
        Column("Why not", "text"),
    )
    kept = [i for i, column in enumerate(columns) if any(row[i] is not None for row in rows) or column.unit != "text"]
    cells = tuple(tuple(row[i] for i in kept) for row in rows)
    return Table(tuple(columns[i] for i in kept), cells, f"Crowds by method: {study.setting}")


def _method_row(label: str, seeds: list[Privacy]) -> tuple[Cell, ...]:
    read = [found for found in seeds if found.found is not None]
    if not read:
        return (label, None, None, None, "nothing is shared" if seeds[0].kind == "nothing shared" else "not known")
    smallest = [float(value) for found in read for value in found.effective if not math.isnan(value)]
    leverage = max(float(known(found).leverage.max()) for found in read)
    return label, min(smallest, default=None), max(len(found.small) for found in read), leverage, None


def plain_privacy(found: Privacy) -> Mapping[str, Any]:
    """Everything as what JSON knows; NaN becomes null."""
    run = found.run
    plain = {
        "run": {"label": run.label, "method": run.method, "seed": run.seed, "setting": run.setting},
        "kind": found.kind,
        "round": found.round,
        "warn_below": SMALL,
        "sentences": sentences(found),
        "clients": None if found.found is None else [_plain_client(found, i) for i in range(len(run.client_names))],
    }
    converted: Mapping[str, Any] = to_plain(plain)
    return converted


def _plain_client(found: Privacy, client: int) -> dict[str, Any]:
    crowd, names = known(found), found.run.client_names
    nearest = int(crowd.nearest[client])
    return {
        "name": names[client],
        "crowd": float(crowd.effective[client]),
        "smallest_round_crowd": None if found.smallest is None else float(found.smallest[client]),
        "reads_best": None if nearest < 0 else names[nearest],
        "reads_best_share": float(crowd.nearest_share[client]),
        "largest_share": float(crowd.largest[client]),
        "leverage": float(crowd.leverage[client]),
    }
