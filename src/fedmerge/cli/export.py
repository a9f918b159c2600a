"""``fedmerge export``."""

from __future__ import annotations

import argparse
from typing import Any

from fedmerge.api import export as export_model
from fedmerge.cli.screen import say
from fedmerge.exporting import KINDS


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The words and flags of the command."""
    parser.add_argument("run", metavar="RUN", help="run folder that `fedmerge run` wrote")
    parser.add_argument("client", metavar="CLIENT", help="name or number (from 0) of the client")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder to write; must be empty or new")
    parser.add_argument(
        "--as",
        dest="kind",
        metavar="KIND",
        help=f"{', '.join(KINDS)} (default: peft for pretrained models, torch for others)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the network again, if it was your own: a name or path/to/file.py:Name"
    )
    parser.add_argument(
        "--row", action="store_true", help="tell the client's merging weights in the model card, which is private then"
    )
    parser.set_defaults(command=export)


def export(options: argparse.Namespace) -> None:
    """Writes the folder and names its files."""
    found = export_model(
        options.run,
        options.client,
        options.out,
        kind=options.kind,
        model=_model(options.model),
        row=options.row,
    )
    for name in found.files:
        say(str(found.folder / name))
    for name in found.private:
        told = "holds the client's merging weights: only its owner may read it, do not publish it"
        say(f"private     {name} {told}")
    if found.difference is not None:
        away = (
            "of the client's adapters from the recipe's, relative"
            if found.kind == "mergekit"
            else "of outputs, at most"
        )
        say(f"difference  {found.difference:.1e} ({away})")


def _model(word: str | None) -> Any:
    return {"name": "import", "path": word} if word is not None and ":" in word else word
