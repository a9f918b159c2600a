"""What the terminal shows: the two consoles, tables of results, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as Grid

from fedmerge.core.text import printable
from fedmerge.experiment.record import RunRecord
from fedmerge.report import Table, attendance_table, task_table

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def escape(text: str) -> str:
    """A text as it may stand in what the consoles print: no marks, and nothing that a terminal would obey."""
    return markup.escape(printable(text, keep="\n"))


def say(text: str, *, soft_wrap: bool | None = None) -> None:
    """Prints a text as it stands."""
    out.print(printable(text, keep="\n"), markup=False, soft_wrap=soft_wrap)


@contextmanager
def progress_display(quiet: bool, rounds: int, runs: int) -> Iterator[Callable[[str, int, str], None]]:
    """A bar with ETA on a terminal; elsewhere a line at every tenth of the way."""
    done: dict[str, int] = {}
    total = rounds * runs
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:32.32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        tenth = 0

        def report(name: str, round_number: int, score: str) -> None:
            nonlocal tenth
            done[name] = max(done.get(name, 0), round_number)
            completed = sum(done.values())
            bar.update(task, completed=completed, description=escape(f"{name} {score}".strip()))
            if not quiet and not err.is_terminal and completed * 10 // total > tenth:
                tenth = completed * 10 // total
                err.print(f"{completed}/{total} rounds, {name} {score}".rstrip(), markup=False)

        yield report


_TERMINAL_COLUMNS = ("Setting", "Method", "Mean", "To ", "p", "Fine-tuned", "Worst tenth", "Last round", "Below Local")
"""By their beginnings, the most important first."""


def print_table(table: Table, *, whole: bool = False) -> None:
    """As many columns as the terminal is wide, the most important first; the report has them all.

    Args:
        table: What to show.
        whole: Show every column, however wide the terminal is.
    """
    texts = table.texts()
    headings = [column.title.replace(" (", "\n(") for column in table.columns]
    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1))
    shown = list(range(len(headings))) if whole else _fitting(headings, texts, out.width)
    for i in shown:
        grid.add_column(
            escape(headings[i]), justify="left" if table.columns[i].unit == "text" else "right", no_wrap=True
        )
    for row in texts:
        grid.add_row(*(escape(row[i]) for i in shown))
    out.print(f"[bold]{escape(table.caption)}[/]")
    out.print(grid)
    for note in table.notes:
        out.print(f"  {escape(note)}", style="dim")


def print_tasks(records: Sequence[RunRecord]) -> None:
    """Accuracy task by task, where clients have different ones."""
    table = task_table(records)
    if table is not None:
        print_table(table, whole=True)


def print_attendance(records: Sequence[RunRecord]) -> None:
    """Whose replies were lost or refused, for the runs where any were."""
    for record in records:
        table = attendance_table(record, most=_ROWS)
        if table is not None:
            print_table(table, whole=True)


_ROWS = 10


def print_search(records: Sequence[RunRecord]) -> None:
    """What the search for structure decided, for the runs that searched."""
    for record in records:
        state = record.last().state
        if state.get("gate") is None:
            continue
        if state.get("searching"):
            waits = "too few clients have replied for a look at the structure; one model so far"
            out.print(f"  {escape(record.label)}, seed {record.seed}: {waits}", style="dim")
            continue
        found = f"{state['num_models']} models" if state["num_models"] > 1 else "no structure, kept one model"
        evidence = f"evidence in the clients' first updates {state['gate']:.2f}, gate {record.options['gate']:g}"
        out.print(f"  {escape(record.label)}, seed {record.seed}: {found} ({evidence})", style="dim")


def _fitting(headings: Sequence[str], texts: Sequence[Sequence[str]], room: int) -> list[int]:
    """The most important columns that fit side by side; the first two are always there."""
    ranked = [i for start in _TERMINAL_COLUMNS for i, heading in enumerate(headings) if heading.startswith(start)]
    shown: list[int] = []
    for i in ranked:
        room -= max(len(line) for line in [*headings[i].splitlines(), *(row[i] for row in texts)]) + 2
        if room >= 0 or len(shown) < 2:
            shown.append(i)
    return shown
