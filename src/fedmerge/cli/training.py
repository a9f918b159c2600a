"""``fedmerge run`` and ``fedmerge compare``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedmerge.cli.screen import err, print_attendance, print_search, print_table, print_tasks, progress_display, say
from fedmerge.cli.words import split_words, table_from
from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.files import write_atomically
from fedmerge.core.text import brief
from fedmerge.experiment.comparison import free_folder, plan, run_jobs
from fedmerge.experiment.config import assign, build_config, override, parse_value
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.forecast import Forecast
from fedmerge.experiment.record import RoundRecord, RunRecord, read_run_alone
from fedmerge.experiment.resume import resume_run
from fedmerge.experiment.serving import read_serving
from fedmerge.report import comparison_table, write_report


def run(options: argparse.Namespace) -> None:
    """``fedmerge run``."""
    names, settings = split_words(options.words)
    if len(names) > 1:
        raise UsageError(
            f"got several methods ({', '.join(names)}); `fedmerge run` takes one, `fedmerge compare` several"
        )
    own = {key: value for key, value in vars(options).items() if key.startswith("method.") and value is not None}
    settings = [f"method={name}" for name in names] + settings + [f"{key}={value}" for key, value in own.items()]
    table = override(table_from(options.config), settings)
    config = build_config(table if options.label is None else {**table, "label": options.label})
    folder = (
        Path(options.out)
        if options.out is not None
        else free_folder(Path("runs"), f"{config.name}-seed{config.run.seed}")
    )
    with progress_display(options.quiet, config.run.rounds, 1) as report:
        outcome = execute_config(
            config,
            folder=folder,
            watch=lambda record: _watched(report, config.name, record),
            foretell=None if options.quiet else _foretold,
        )
    _show(outcome.record, folder)


def resume(options: argparse.Namespace) -> None:
    """``fedmerge resume``."""
    folder = Path(options.run)
    record = read_run_alone(folder)
    total = _rounds_of(folder)
    with progress_display(options.quiet, total, 1) as report:
        outcome = resume_run(folder, watch=lambda line: _watched(report, record.label, line))
    _show(outcome.record, folder)


def _rounds_of(folder: Path) -> int:
    """How many rounds a run was to have; 1 where its folder does not say, which `resume_run` explains."""
    serving = read_serving(folder)
    return 1 if serving is None else serving.options.rounds


def _show(record: RunRecord, folder: Path) -> None:
    """Tables on the screen, and a page in the run's folder."""
    page = write_report([record], folder / "report.html")
    print_table(comparison_table([record]))
    print_tasks([record])
    print_search([record])
    print_attendance([record])
    say(f"run     {folder}\nreport  {page}")


_WORTH_TELLING = 20
"""Seconds from which a forecast is told."""


def _foretold(expected: Forecast) -> None:
    if expected.seconds >= _WORTH_TELLING or expected.base_bytes:
        err.print(f"forecast {expected}", markup=False)


def _watched(report: Callable[[str, int, str], None], name: str, record: RoundRecord) -> None:
    score = f"validation {100 * record.validation.mean_accuracy():.1f} %" if record.validation else ""
    report(name, record.round, score)


def compare(options: argparse.Namespace) -> None:
    """``fedmerge compare``."""
    names, settings = split_words(options.words)
    file = table_from(options.config)
    if names or "methods" in file:  # the methods are said: a run's own configuration may serve as the setting
        file = {key: value for key, value in file.items() if key not in ("method", "label")}
    base = override(file, settings)
    from_file, from_file_seeds = base.pop("methods", _METHODS), base.pop("seeds", None)
    methods = [_method_of(name) for name in names] or from_file
    seeds = [base.get("seed", 0)] if from_file_seeds is None else from_file_seeds
    jobs = plan(base, methods, seeds if options.seeds is None else _seeds(options.seeds))
    if options.jobs < 1:
        raise UsageError(f"--jobs: got {options.jobs}; expected a whole number >= 1")
    labels = {job.config.name for job in jobs}
    if options.reference is not None and options.reference not in labels:
        raise UsageError(unknown_name("reference", options.reference, labels))
    folder = Path(options.out) if options.out is not None else free_folder(Path("runs"), "comparison")
    with progress_display(options.quiet, jobs[0].config.run.rounds, len(jobs)) as report:
        records = run_jobs(jobs, folder, processes=options.jobs, report=lambda name, done: report(name, done, ""))
    page = write_report(records, folder / "report.html", reference=options.reference)
    table = comparison_table(records, reference=options.reference)
    write_atomically(folder / "table.md", table.markdown())
    print_table(table)
    print_tasks(records)
    print_search(records)
    say(f"runs    {folder}\nreport  {page}")


_METHODS = ["fedmerge", "fedavg", "local", "fesem"]


def _method_of(word: str) -> Mapping[str, Any]:
    """``name`` or ``name:key=value,key=value``; ``training.lr=...`` and ``label=...`` are understood."""
    name, _, rest = word.partition(":")
    table: dict[str, Any] = {"name": name}
    for assignment in filter(None, rest.split(",")):
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"got {word!r}; expected METHOD or METHOD:key=value,key=value")
        assign(table, key.split("."), parse_value(text), word)
    return table


_MOST_SEEDS = 1000


def _seeds(text: str) -> list[int]:
    try:
        first, dash, last = text.partition("-")
        seeds = range(int(first), int(last) + 1) if dash else [int(word) for word in text.split(",")]
        found = list(seeds[: _MOST_SEEDS + 1])  # a range may be longer than memory
    except ValueError:
        found = []
    if not 0 < len(found) <= _MOST_SEEDS:
        raise UsageError(f"--seeds: got {brief(text)}; expected up to {_MOST_SEEDS} whole numbers, 0,1,2 or 0-4")
    return found
