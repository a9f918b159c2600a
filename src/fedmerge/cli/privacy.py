"""``fedmerge privacy``: what clients of a run could read of each other off their own models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table as Grid

from fedmerge.cli.screen import escape, out, say
from fedmerge.core.errors import UsageError
from fedmerge.core.files import write_atomically
from fedmerge.experiment.record import read_run
from fedmerge.report import Privacy, Table, privacy, privacy_table, write_privacy
from fedmerge.report.markup import shorten
from fedmerge.report.privacy_text import plain_privacy, sentences

_COLUMNS = ("Client", "Crowd", "Smallest round", "Reads best", "Its part (%)", "Leverage (%)")
_NAME = 24
_ROWS = 20
"""Clients that the terminal shows; the page and --json have all."""


def add_privacy_arguments(parser: argparse.ArgumentParser) -> None:
    """The words and flags of the command."""
    parser.add_argument("run", metavar="RUN", help="run folder that `fedmerge run` wrote")
    parser.add_argument("--out", metavar="FILE", help="write a page (HTML) of all clients, or JSON with --json")
    parser.add_argument("--json", action="store_true", help="every number as JSON instead of tables")
    parser.set_defaults(command=privacy_of_run)


def privacy_of_run(options: argparse.Namespace) -> None:
    """``fedmerge privacy``."""
    record = read_run(Path(options.run))
    found = privacy(record)
    if options.json:
        _give(json.dumps(plain_privacy(found), indent=1), options.out)
        return
    _show(found)
    if options.out is not None:
        try:
            page = write_privacy(record, Path(options.out))
        except OSError as error:
            raise UsageError(f"cannot write {options.out}: {error.strerror}") from error
        say(f"page    {page} (only its owner may read it)")


def _give(text: str, target: str | None) -> None:
    """Prints the text, or writes it into a file of its owner's."""
    if target is None:
        say(text, soft_wrap=True)
        return
    try:
        write_atomically(Path(target), text + "\n", private=True)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error


def _show(found: Privacy) -> None:
    run = found.run
    say(run.setting)
    say(f"{run.label}, seed {run.seed}, weights of round {found.round}, the last evaluated one")
    for sentence in sentences(found):
        say(sentence, soft_wrap=False)
    if found.found is not None:
        _print(privacy_table(found, _ROWS))


def _print(table: Table) -> None:
    """The columns that a terminal has room for."""
    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1))
    shown = [i for i, column in enumerate(table.columns) if column.title in _COLUMNS]
    for column in (table.columns[i] for i in shown):
        justify: Literal["left", "right"] = "left" if column.unit == "text" else "right"
        grid.add_column(escape(column.title.replace(" ", "\n", 1)), justify=justify, no_wrap=True)
    for row in table.texts():
        grid.add_row(*(escape(shorten(row[i], _NAME)) for i in shown))
    out.print(grid, soft_wrap=False)
    for note in table.notes:
        out.print(f"  {escape(note)}", style="dim", soft_wrap=False)
