"""``fedmerge bench``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from fedmerge.bench.page import CSV, FIGURES, PAGE, write_page
from fedmerge.bench.runner import Outcome, Standing, run_suite
from fedmerge.bench.store import LOCK, RUNS, read_results
from fedmerge.bench.suite import Suite, narrowed
from fedmerge.bench.suite_file import read_suite, suite_path
from fedmerge.bench.workers import failures_text
from fedmerge.cli.screen import err, say
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.files import write_atomically
from fedmerge.core.text import brief

SUITE = "suite.toml"
FAILURES = "failures.txt"


def bench(options: argparse.Namespace) -> None:
    """``fedmerge bench``."""
    if options.page_only is not None:
        _page_only(options)
        return
    name = options.suite or "short"
    suite = read_suite(name)
    chosen = narrowed(
        suite, settings=_words(options.settings), methods=_words(options.methods), seeds=_seeds(options.seeds)
    )
    _check(options)
    folder = Path(options.out or f"bench-{Path(name).stem}")
    _refuse_foreign(folder)
    tell = None if options.quiet else _teller()
    try:
        outcome = run_suite(
            chosen,
            folder,
            jobs=options.jobs,
            minutes=options.minutes,
            tell=tell,
            begin=lambda: write_atomically(folder / SUITE, suite_path(name).read_text(encoding="utf-8")),
        )
    except KeyboardInterrupt:
        err.print(f"stopped; finished runs are in {folder / RUNS}. The same command continues", markup=False)
        raise
    _write_page(suite, folder)
    _conclude(outcome, folder)


def _page_only(options: argparse.Namespace) -> None:
    given = {
        "SUITE": options.suite,
        "--out": options.out,
        "--settings": options.settings,
        "--methods": options.methods,
        "--seeds": options.seeds,
        "--minutes": options.minutes,
    }
    ignored = [name for name, value in given.items() if value is not None]
    if ignored:
        raise UsageError(f"--page-only makes no run; it takes no {', '.join(ignored)}")
    folder = Path(options.page_only)
    if not (folder / SUITE).is_file():
        raise UsageError(f"{folder} has no {SUITE}; expected a folder that `fedmerge bench --out` wrote")
    _write_page(read_suite(str(folder / SUITE)), folder)


def _write_page(suite: Suite, folder: Path) -> None:
    page = write_page(suite, read_results(folder), folder)
    say(f"page    {page}")


def _conclude(outcome: Outcome, folder: Path) -> None:
    """Says what is left, and fails if runs did."""
    path = folder / FAILURES
    path.unlink(missing_ok=True)
    if outcome.diverged:
        say(f"{outcome.diverged} reported runs diverged: see the page")
    if outcome.failures:
        write_atomically(path, failures_text(outcome.failures))
        first = outcome.failures[0]
        raise FedmergeError(
            f"{len(outcome.failures)} runs could not be made and {outcome.left} are left; the first: setting "
            f"{first.run.setting!r}, method {first.run.label!r}, seed {first.run.seed}: {first.message}\n"
            f"All of them are in {path}; the same command tries them again"
        )
    if outcome.left:
        say(f"time is up: {outcome.left} runs are left; the same command continues")


def _refuse_foreign(folder: Path) -> None:
    """The page would overwrite files that no benchmark wrote."""
    ours = any((folder / name).exists() for name in (RUNS, SUITE, LOCK))
    taken = [name for name in (PAGE, CSV, FIGURES) if (folder / name).exists()]
    if taken and not ours:
        raise UsageError(
            f"{folder} holds {', '.join(taken)}, which no benchmark wrote; nothing was written. Choose another --out"
        )


def _check(options: argparse.Namespace) -> None:
    if options.jobs < 1:
        raise UsageError(f"--jobs: got {options.jobs}; expected a whole number >= 1")
    if options.minutes is not None and not 0 <= options.minutes < math.inf:
        raise UsageError(f"--minutes: got {options.minutes}; expected a number >= 0")


def _words(text: str | None) -> Sequence[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _seeds(text: str | None) -> Sequence[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--seeds: got {brief(text)}; expected whole numbers such as 0,1") from error


def _teller() -> Callable[[Standing], None]:
    """A line after every run: done and total, what runs, minutes left."""

    def tell(standing: Standing) -> None:
        total = standing.done + standing.left
        running = ", ".join(f"{run.setting}/{run.label}/{run.seed}" for run in standing.running) or "nothing"
        left = "?" if standing.minutes_left is None else f"{standing.minutes_left:.1f}"
        err.print(f"{standing.done}/{total} runs, about {left} minutes left; running {running}", markup=False)

    return tell
