"""``fedmerge onboard``."""

from __future__ import annotations

import argparse
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as Grid

from fedmerge.api import onboard as onboard_client
from fedmerge.cli.screen import escape, out, say
from fedmerge.core.errors import DataError, UsageError
from fedmerge.onboarding import WAYS, Onboarded


def add_onboard_arguments(parser: argparse.ArgumentParser) -> None:
    """The words and flags of the command."""
    parser.add_argument("run", metavar="RUN", help="run folder that `fedmerge run` wrote")
    parser.add_argument(
        "data", metavar="DATA", help="the new client's labelled samples: a .npz, .csv or .parquet file, or their folder"
    )
    parser.add_argument(
        "--validation", metavar="FILE", help="further samples, only to compare the ways and to estimate"
    )
    parser.add_argument("--way", default="auto", help=f"auto (default), {', '.join(WAYS)}")
    parser.add_argument("--label-column", metavar="NAME", help="of .csv and .parquet files (default: the run's own)")
    parser.add_argument(
        "--model", metavar="NAME", help="the network again, if it was your own: a name or path/to/file.py:Name"
    )
    parser.add_argument("--seed", type=int, default=0, help="of folds and batches (default 0)")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write model, onboard.json and README.md to")
    parser.set_defaults(command=onboard)


def onboard(options: argparse.Namespace) -> None:
    """Makes the model, says how good it is, writes it if asked."""
    if options.seed < 0:
        raise UsageError(f"--seed: got {options.seed}; expected a whole number >= 0")
    try:
        found = onboard_client(
            options.run,
            options.data,
            validation=options.validation,
            way=options.way,
            model=_model(options.model),
            label_column=options.label_column,
            seed=options.seed,
        )
    except DataError as error:  # the samples are part of the request here
        raise UsageError(str(error)) from error
    _print(found)
    if options.out is not None:
        say(f"model   {found.save(options.out)}")


def _model(word: str | None) -> Any:
    return {"name": "import", "path": word} if word is not None and ":" in word else word


def _print(found: Onboarded) -> None:
    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("Way", "Epochs", "Accuracy (%)", "Loss"):
        grid.add_column(heading, justify="left" if heading == "Way" else "right")
    for tried in found.candidates:
        accuracy = "–" if tried.accuracy is None else f"{100 * tried.accuracy:.1f}"
        loss = "–" if tried.loss is None else f"{tried.loss:.3f}"
        name = f"[bold]{tried.way}[/] (chosen)" if tried.chosen else tried.way
        grid.add_row(name, str(tried.epochs or "–"), accuracy, loss)
    out.print(grid)
    expected = f"not known ({found.missing})" if found.estimate is None else str(found.estimate)
    out.print(f"expected accuracy  {escape(expected)}")
    out.print(f"fit                [bold]{found.fit.verdict}[/]: {escape(found.fit.reason)}")
    out.print(f"made by            {found.way} from {found.num_samples} samples in {found.seconds:.2f} s")
