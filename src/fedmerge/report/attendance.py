"""Who was asked, who answered, and whose replies were not believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedmerge.core.replies import REASONS
from fedmerge.experiment.record import RunRecord
from fedmerge.report.study import Study
from fedmerge.report.table import Cell, Column, Table
from fedmerge.report.text import plural

CLIENTS = 30
"""Rows of the table; the records have all clients."""


def attendance_table(run: RunRecord, most: int = CLIENTS) -> Table | None:
    """A row per client with a lost or refused reply, most of them first; None for a run without any.

    Args:
        run: One run.
        most: Rows at most.
    """
    asked, dropped, refused = _counts(run)
    abandoned = [record.round for record in run.rounds if record.abandoned]
    odd = [i for i in range(len(run.client_names)) if dropped[i] or refused[i]]
    if not odd and not abandoned and not refused[None]:
        return None
    seen = [reason for reason in REASONS if any(counts[reason] for counts in refused.values())]
    columns = (
        Column("Client", "text"),
        Column("Asked", "count"),
        Column("Counted", "count", "replies that were admitted"),
        *((Column("No answer", "count"),) if any(dropped.values()) else ()),
        *(Column(f"Refused: {reason}", "count") for reason in seen),
    )
    order = sorted(odd, key=lambda i: (-sum(refused[i].values()) - dropped[i], i))
    rows: list[tuple[Cell, ...]] = [
        (
            run.client_names[i],
            asked[i],
            max(0, asked[i] - dropped[i] - sum(refused[i].values())),
            *((dropped[i],) if any(dropped.values()) else ()),
            *(refused[i][reason] for reason in seen),
        )
        for i in order[:most]
    ]
    caption = f"Attendance: {run.label}, seed {run.seed}"
    return Table(columns, tuple(rows), caption, _notes(run, len(odd), most, abandoned, refused[None]))


def _counts(run: RunRecord) -> tuple[Counter[int], Counter[int], dict[int | None, Counter[str]]]:
    """How often each client was asked and did not answer, and what it was refused for; None: nobody knows who."""
    asked: Counter[int] = Counter(i for record in run.rounds for i in record.cohort)
    dropped: Counter[int] = Counter(i for record in run.rounds for i in record.dropped)
    refused: dict[int | None, Counter[str]] = {i: Counter() for i in (None, *range(len(run.client_names)))}
    for record in run.rounds:
        for refusal in record.refused:
            client = refusal.get("client")
            refused[client if client in refused else None][str(refusal.get("reason"))] += 1
    return asked, dropped, refused


def _notes(run: RunRecord, odd: int, most: int, abandoned: Sequence[int], nameless: Counter[str]) -> tuple[str, ...]:
    notes = []
    if odd > most:
        notes.append(f"{most} of {odd} clients with a lost or refused reply.")
    if abandoned:
        notes.append(
            f"{plural(len(abandoned), 'round')} of {len(run.rounds) - 1} abandoned for too few replies: the models "
            f"stayed as they were (first: round {abandoned[0]})."
        )
    if nameless:
        notes.append(f"Refused without a readable sender: {sum(nameless.values())}.")
    return tuple(notes)


def study_attendance(study: Study) -> tuple[Table, ...]:
    """The table of every run that has one."""
    found = (attendance_table(run) for run in study.all_runs())
    return tuple(table for table in found if table is not None)
