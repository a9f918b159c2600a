"""``fedmerge list``: what there is and its options, for the terminal and as Markdown."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rich.table import Table as Grid

from fedmerge.algorithms import ALGORITHMS
from fedmerge.cli.screen import escape, out, say
from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.options import accepted_text, option_fields
from fedmerge.core.registry import Registry
from fedmerge.data import PARTITIONS, SOURCES, FolderOptions
from fedmerge.deploy.federation import DeployOptions
from fedmerge.deploy.schema import DataSchema
from fedmerge.deploy.site import SiteConfig, SiteData
from fedmerge.experiment.config import OPTION_TABLES, RunOptions
from fedmerge.models import NETWORKS

REGISTRIES: dict[str, Registry[Any]] = {
    "methods": ALGORITHMS,
    "sources": SOURCES,
    "partitions": PARTITIONS,
    "models": NETWORKS,
}
OPTION_GROUPS: dict[str, type] = {
    "run": RunOptions,
    **OPTION_TABLES,
    "folder": FolderOptions,
    "deploy": DeployOptions,
    "schema": DataSchema,
    "site": SiteConfig,
    "site-data": SiteData,
}


def list_entries(options: argparse.Namespace) -> None:
    """``fedmerge list``."""
    kinds = [*REGISTRIES, *OPTION_GROUPS]
    if options.kind is not None and options.kind not in kinds:
        raise UsageError(unknown_name("kind", options.kind, kinds))
    if options.name is not None and (options.markdown or options.kind in OPTION_GROUPS):
        raise UsageError(f"got {options.name!r} beside all of {options.kind!r}; leave out the name or --markdown")
    if options.markdown:
        say(markdown_of(options.kind or "methods"))
    elif options.kind in OPTION_GROUPS:
        _print_options(OPTION_GROUPS[options.kind])
    elif options.kind == "sources" and options.name == "folder":
        _print_options(FolderOptions)
    elif options.name is not None:
        entry = REGISTRIES[options.kind][options.name]
        out.print(f"[bold]{entry.name}[/]  {escape(entry.summary)}")
        out.print(escape(entry.citation), style="dim") if entry.citation else None
        _print_options(entry.cls)
    else:
        for kind in [options.kind] if options.kind else REGISTRIES:
            _print_entries(kind)


def _print_entries(kind: str) -> None:
    grid = Grid(title=kind, title_justify="left", show_header=False)
    for name in REGISTRIES[kind]:
        grid.add_row(name, escape(REGISTRIES[kind][name].summary))
    if kind == "sources":
        grid.add_row("folder", "Your own clients, one file each (.npz, .csv, .parquet): options with `list folder`.")
    out.print(grid)


def _print_options(cls: type) -> None:
    fields = option_fields(cls)
    if not fields:
        out.print("no options")
        return
    grid = Grid("option", "default", "accepts", "meaning")
    for name, (field, annotation) in fields.items():
        grid.add_row(name, *(escape(text) for text in option_row(field, annotation)))
    out.print(grid)


def markdown_of(kind: str) -> str:
    """Documentation of every entry of a kind, from the registry alone."""
    if kind in OPTION_GROUPS:
        return f"# Options: {kind}\n\n{_options_markdown(OPTION_GROUPS[kind])}"
    parts = [f"# {kind.capitalize()}\n"]
    for name in REGISTRIES[kind]:
        entry = REGISTRIES[kind][name]
        text = "\n".join(line.strip() for line in (entry.cls.__doc__ or "").strip().splitlines())
        citation = f"\n\nSource: {entry.citation}." if entry.citation else ""
        parts.append(f"## `{name}`\n\n{text}{citation}\n\n{_options_markdown(entry.cls)}")
    return "\n".join(parts)


def _options_markdown(cls: type) -> str:
    rows = [
        f"| `{name}` | {' | '.join(text.replace('|', chr(92) + '|') for text in option_row(field, annotation))} |"
        for name, (field, annotation) in option_fields(cls).items()
    ]
    head = "| option | default | accepts | meaning |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n" if rows else "No options.\n"


def option_row(field: dataclasses.Field[Any], annotation: Any) -> tuple[str, str, str]:
    """Default, what is accepted, and meaning of one option."""
    default = "required" if field.default is dataclasses.MISSING else word_of(field.default)
    return default, accepted_text(field, annotation), field.metadata.get("help", "")


def help_text(field: dataclasses.Field[Any], annotation: Any) -> str:
    """One option in a line of ``--help``."""
    default, accepted, meaning = option_row(field, annotation)
    return f"{meaning} ({accepted}; {default if default == 'required' else f'default {default}'})"


def word_of(value: Any) -> str:
    """A plain value as one would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
