"""``fedmerge explain``: what the merging weights of a run say, as text."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table as Grid

from fedmerge.cli.data import records_below
from fedmerge.cli.screen import escape, out, say
from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.experiment.record import RunRecord
from fedmerge.report import Table
from fedmerge.report.explain import Explanation, explain, explained
from fedmerge.report.explain_text import (
    client_sentence,
    client_table,
    gain_sentence,
    group_sentences,
    group_table,
    model_table,
    remarks,
)
from fedmerge.report.study import studies, where_it_stopped


def explain_run(options: argparse.Namespace) -> None:
    """``fedmerge explain``."""
    found = _explanations(records_below(Path(options.run)), options.reference)
    if options.clients:
        for explanation in found:
            _print_clients(explanation, options.clients)
        return
    for explanation in found:
        _print_explanation(explanation, with_clients=options.all_clients)


def _explanations(records: list[RunRecord], reference: str | None) -> list[Explanation]:
    """One for every setting that has a run with merging weights.

    Raises:
        UsageError: if no setting has one, or the reference that was asked for has none.
    """
    settings = studies(records, reference=reference)
    if reference is not None:
        first = [next(iter(study.runs[reference].values())) for study in settings]
        return [explain(run, study.local_run(run.seed)) for run, study in zip(first, settings, strict=True)]
    found = [explanation for explanation in map(explained, settings) if explanation is not None]
    return found or [explain(records[0])]  # raises, naming what was given


def _print_clients(explanation: Explanation, names: list[str]) -> None:
    known = explanation.run.client_names
    for name in names:
        if name not in known:
            raise UsageError(unknown_name("client", name, known))
    for name in names:
        say(client_sentence(explanation, known.index(name)))


def _print_explanation(explanation: Explanation, *, with_clients: bool) -> None:
    say(explanation.run.setting)
    stopped = where_it_stopped(explanation.run)
    for sentence in (stopped, *remarks(explanation), gain_sentence(explanation), *group_sentences(explanation)):
        if sentence:
            say(sentence, soft_wrap=False)
    tables = [group_table(explanation), model_table(explanation)]
    for table in [*tables, client_table(explanation)] if with_clients else tables:
        _print(table)


def _print(table: Table) -> None:
    """All columns; texts are folded within theirs where the terminal is narrow."""
    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1))
    for column in table.columns:
        text = column.unit == "text"
        grid.add_column(escape(column.title), justify="left" if text else "right", overflow="fold")
    for row in table.texts():
        grid.add_row(*map(escape, row))
    out.print()
    out.print(f"[bold]{escape(table.caption)}[/]")
    out.print(grid, soft_wrap=False)
    for note in table.notes:
        out.print(f"  {escape(note)}", style="dim", soft_wrap=False)
