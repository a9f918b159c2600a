"""The command line: thin commands over the public API, and the only place that prints."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
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

from fedmerge._version import __version__
from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import FedmergeError, UsageError, unknown_name
from fedmerge.core.files import write_atomically
from fedmerge.core.options import accepted_text, option_fields
from fedmerge.core.registry import Registry
from fedmerge.data import PARTITIONS, SOURCES, FolderOptions
from fedmerge.data.picture import partition_svg
from fedmerge.data.sources import available, get
from fedmerge.experiment.comparison import free_folder, plan, run_jobs
from fedmerge.experiment.config import RunOptions, assign, build_config, override, parse_value, read_toml
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.federation import load_data
from fedmerge.experiment.record import RoundRecord, RunRecord, read_run
from fedmerge.models import NETWORKS
from fedmerge.report import Table, comparison_table, runs_frame, write_report
from fedmerge.training import LocalTraining

_REGISTRIES: dict[str, Registry[Any]] = {
    "methods": ALGORITHMS,
    "sources": SOURCES,
    "partitions": PARTITIONS,
    "models": NETWORKS,
}
_OPTION_GROUPS: dict[str, type] = {"run": RunOptions, "training": LocalTraining, "folder": FolderOptions}

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one message, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\nTry: {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        _refuse_undecoded(words)
        options = _parser(words).parse_intermixed_args(words)
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
    except UsageError as error:
        return _complain(error, 2)
    except FedmergeError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        err.print("interrupted; what was finished so far is kept")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:  # a full disk, a lost folder
        return _complain(FedmergeError(f"cannot read or write {error.filename or 'a file'}: {error.strerror}"), 1)
    return 0


def _refuse_undecoded(words: Sequence[str]) -> None:
    for word in words:
        if not word.isprintable() and any(0xD800 <= ord(letter) < 0xE000 for letter in word):
            raise UsageError(f"got {word!a}, which is not a text in this system's encoding; expected UTF-8")


def _complain(error: FedmergeError, code: int) -> int:
    err.print(f"[bold red]error:[/] {escape(str(error))}")
    return code


# ------------------------------------------------------------------------------------------------ arguments


_COMMANDS = {
    "run": "train one method: one model per client",
    "compare": "train several methods on the same clients and seeds, then report",
    "list": "methods, sources, partitions, models and their options",
    "data": "see and fetch data, look at a partition",
    "report": "one self-contained page, and tables, from run folders",
}


def _parser(words: Sequence[str]) -> _Parser:
    """The parser of the command that `words` name; only that one is built."""
    command = next((word for word in words if not word.startswith("-")), None)
    if command in _COMMANDS:
        parser = _Parser(prog=f"fedmerge {command}", description=_COMMANDS[command].capitalize() + ".")
        parser.add_argument("command_name", choices=[command], help=argparse.SUPPRESS)
        builders: dict[str, Callable[[_Parser], None]] = {
            "run": partial(_run_parser, words=words),
            "compare": _compare_parser,
            "list": _list_parser,
            "data": _data_parser,
            "report": _report_parser,
        }
        builders[command](parser)
        return parser
    if command is not None:
        raise UsageError(unknown_name("command", command, _COMMANDS))
    parser = _Parser(
        prog="fedmerge",
        description="Personalized federated learning: every client gets its own merge of a few shared models.",
        epilog="\n".join(f"  fedmerge {name:8} {text}" for name, text in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedmerge {__version__}")
    parser.set_defaults(command=lambda _: parser.print_help())
    return parser


def _common(parser: _Parser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file to start from")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: a new one below runs/)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _run_parser(parser: _Parser, words: Sequence[str]) -> None:
    parser.usage = "fedmerge run [METHOD] [key=value ...] [options]"
    parser.add_argument(
        "words",
        nargs="*",
        metavar="METHOD or key=value",
        help="a method's name, and settings such as source=fashion-mnist partition=permuted rounds=50 training.lr=0.05",
    )
    parser.add_argument("--label", help="how tables call the run")
    _common(parser)
    name = next((word for word in words[1:] if word in ALGORITHMS), None)
    if name:
        _method_options(parser, name)
    parser.set_defaults(command=_run)


def _method_options(parser: _Parser, name: str) -> None:
    group = parser.add_argument_group(f"options of {name}", ALGORITHMS[name].summary)
    for field, (facts, annotation) in option_fields(ALGORITHMS[name].cls).items():
        group.add_argument(
            f"--{field.replace('_', '-')}",
            dest=f"method.{field}",
            metavar="VALUE",
            help=_help_text(facts, annotation).replace("%", "%%"),
        )


def _help_text(field: dataclasses.Field[Any], annotation: Any) -> str:
    default, accepted, meaning = _option_row(field, annotation)
    return f"{meaning} ({accepted}; {default if default == 'required' else f'default {default}'})"


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _compare_parser(parser: _Parser) -> None:
    parser.usage = "fedmerge compare [METHOD ...] [key=value ...] [options]"
    parser.add_argument(
        "words",
        nargs="*",
        metavar="METHOD or key=value",
        help="methods, each with options of its own if wanted (fedmerge:rule=official,num_models=5,label=official), "
        "and settings that all share",
    )
    parser.add_argument("--seeds", default=None, help="for example 0,1,2 or 0-4 (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--reference", help="method that the others are compared with")
    _common(parser)
    parser.set_defaults(command=_compare)


def _list_parser(parser: _Parser) -> None:
    parser.add_argument("kind", nargs="?", help=f"one of {', '.join([*_REGISTRIES, *_OPTION_GROUPS])}")
    parser.add_argument("name", nargs="?", help="one entry, with its options")
    parser.add_argument("--markdown", action="store_true", help="everything of a kind as Markdown, for documentation")
    parser.set_defaults(command=_list)


def _data_parser(parser: _Parser) -> None:
    parser.usage = "fedmerge data {list | get NAME [key=value ...] | show [key=value ...] [--out PICTURE.svg]}"
    parser.add_argument(
        "action", choices=["list", "get", "show"], help="list sources, fetch one, or deal one out and draw it"
    )
    parser.add_argument("words", nargs="*", metavar="NAME or key=value")
    parser.add_argument("--config", metavar="FILE", help="TOML file to start from (show)")
    parser.add_argument("--out", metavar="FILE", help="picture to write (show; default partition.svg)")
    parser.set_defaults(command=_data)


def _report_parser(parser: _Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders that hold them")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="page to write (default report.html)")
    parser.add_argument("--reference", help="method that the others are compared with")
    for kind in ("markdown", "latex", "csv"):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"also write the main table as {kind.capitalize()}")
    parser.add_argument("--runs-csv", metavar="FILE", help="also write one line per run as CSV")
    parser.set_defaults(command=_report)


# ------------------------------------------------------------------------------------------------ run, compare


def _split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names, and key=value settings; a name may carry options behind a colon."""
    settings = [word for word in words if "=" in word and ":" not in word.partition("=")[0]]
    return [word for word in words if word not in settings], settings


def _run(options: argparse.Namespace) -> None:
    names, settings = _split_words(options.words)
    if len(names) > 1:
        raise UsageError(
            f"got several methods ({', '.join(names)}); `fedmerge run` takes one, `fedmerge compare` several"
        )
    own = {key: value for key, value in vars(options).items() if key.startswith("method.") and value is not None}
    settings = [f"method={name}" for name in names] + settings + [f"{key}={value}" for key, value in own.items()]
    table = override(_table_from(options.config), settings)
    config = build_config(table if options.label is None else {**table, "label": options.label})
    folder = (
        Path(options.out)
        if options.out is not None
        else free_folder(Path("runs"), f"{config.name}-seed{config.run.seed}")
    )
    with _progress(options.quiet, config.run.rounds, 1) as report:
        outcome = execute_config(config, folder=folder, watch=lambda record: _watched(report, config.name, record))
    record = outcome.record
    page = write_report([record], folder / "report.html")
    _print_table(comparison_table([record]))
    _print_search([record])
    out.print(f"run     {folder}\nreport  {page}", markup=False)


def _watched(report: Callable[[str, int, str], None], name: str, record: RoundRecord) -> None:
    score = f"validation {100 * record.validation.mean_accuracy():.1f} %" if record.validation else ""
    report(name, record.round, score)


def _compare(options: argparse.Namespace) -> None:
    names, settings = _split_words(options.words)
    file = _table_from(options.config)
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
    with _progress(options.quiet, jobs[0].config.run.rounds, len(jobs)) as report:
        records = run_jobs(jobs, folder, processes=options.jobs, report=lambda name, done: report(name, done, ""))
    page = write_report(records, folder / "report.html", reference=options.reference)
    table = comparison_table(records, reference=options.reference)
    write_atomically(folder / "table.md", table.markdown())
    _print_table(table)
    _print_search(records)
    out.print(f"runs    {folder}\nreport  {page}", markup=False)


_METHODS = ["fedmerge", "fedavg", "local", "fesem"]


def _table_from(config: str | None) -> dict[str, Any]:
    return {} if config is None else read_toml(config)


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
    except ValueError:
        seeds = []
    if not 0 < len(seeds) <= _MOST_SEEDS:
        raise UsageError(f"--seeds: got {text!r}; expected up to {_MOST_SEEDS} whole numbers, 0,1,2 or 0-4")
    return list(seeds)


@contextmanager
def _progress(quiet: bool, rounds: int, runs: int) -> Iterator[Callable[[str, int, str], None]]:
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


def _print_table(table: Table) -> None:
    """As many columns as the terminal is wide, the most important first; the report has them all."""
    texts = table.texts()
    headings = [column.title.replace(" (", "\n(") for column in table.columns]
    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1))
    shown = _fitting(headings, texts, out.width)
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


def _print_search(records: Sequence[RunRecord]) -> None:
    """What the search for structure decided, for the runs that searched."""
    for record in records:
        state = record.last().state
        if state.get("gate") is None:
            continue
        found = f"{state['num_models']} models" if state["num_models"] > 1 else "no structure, kept one model"
        spread = f"spread of the clients' first updates {state['gate']:.3f}, gate {record.options['gate']:g}"
        out.print(f"  {escape(record.label)}, seed {record.seed}: {found} ({spread})", style="dim")


def _fitting(headings: Sequence[str], texts: Sequence[Sequence[str]], room: int) -> list[int]:
    """The most important columns that fit side by side; the first two are always there."""
    ranked = [i for start in _TERMINAL_COLUMNS for i, heading in enumerate(headings) if heading.startswith(start)]
    shown: list[int] = []
    for i in ranked:
        room -= max(len(line) for line in [*headings[i].splitlines(), *(row[i] for row in texts)]) + 2
        if room >= 0 or len(shown) < 2:
            shown.append(i)
    return shown


# ------------------------------------------------------------------------------------------------ list, data, report


def _list(options: argparse.Namespace) -> None:
    kinds = [*_REGISTRIES, *_OPTION_GROUPS]
    if options.kind is not None and options.kind not in kinds:
        raise UsageError(unknown_name("kind", options.kind, kinds))
    if options.name is not None and (options.markdown or options.kind in _OPTION_GROUPS):
        raise UsageError(f"got {options.name!r} beside all of {options.kind!r}; leave out the name or --markdown")
    if options.markdown:
        out.print(markdown_of(options.kind or "methods"), markup=False)
    elif options.kind in _OPTION_GROUPS:
        _print_options(_OPTION_GROUPS[options.kind])
    elif options.name is not None:
        entry = _REGISTRIES[options.kind][options.name]
        out.print(f"[bold]{entry.name}[/]  {escape(entry.summary)}")
        out.print(escape(entry.citation), style="dim") if entry.citation else None
        _print_options(entry.cls)
    else:
        for kind in [options.kind] if options.kind else _REGISTRIES:
            _print_entries(kind)


def _print_entries(kind: str) -> None:
    grid = Grid(title=kind, title_justify="left", show_header=False)
    for name in _REGISTRIES[kind]:
        grid.add_row(name, escape(_REGISTRIES[kind][name].summary))
    out.print(grid)


def _print_options(cls: type) -> None:
    fields = option_fields(cls)
    if not fields:
        out.print("no options")
        return
    grid = Grid("option", "default", "accepts", "meaning")
    for name, (field, annotation) in fields.items():
        grid.add_row(name, *(escape(text) for text in _option_row(field, annotation)))
    out.print(grid)


def _option_row(field: dataclasses.Field[Any], annotation: Any) -> tuple[str, str, str]:
    default = "required" if field.default is dataclasses.MISSING else _word(field.default)
    return default, accepted_text(field, annotation), field.metadata.get("help", "")


def markdown_of(kind: str) -> str:
    """Documentation of every entry of a kind, from the registry alone."""
    if kind in _OPTION_GROUPS:
        return f"# Options: {kind}\n\n{_options_markdown(_OPTION_GROUPS[kind])}"
    parts = [f"# {kind.capitalize()}\n"]
    for name in _REGISTRIES[kind]:
        entry = _REGISTRIES[kind][name]
        text = "\n".join(line.strip() for line in (entry.cls.__doc__ or "").strip().splitlines())
        citation = f"\n\nSource: {entry.citation}." if entry.citation else ""
        parts.append(f"## `{name}`\n\n{text}{citation}\n\n{_options_markdown(entry.cls)}")
    return "\n".join(parts)


def _options_markdown(cls: type) -> str:
    rows = [
        f"| `{name}` | {' | '.join(text.replace('|', chr(92) + '|') for text in _option_row(field, annotation))} |"
        for name, (field, annotation) in option_fields(cls).items()
    ]
    head = "| option | default | accepts | meaning |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n" if rows else "No options.\n"


def _data(options: argparse.Namespace) -> None:
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
    names, settings = _split_words(options.words)
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
    shape = " x ".join(str(size) for size in pool.inputs.shape[1:])
    size = f"{len(pool):,} items of {shape}, {len(pool.class_names)} classes"
    out.print(f"{pool.name}: {size}, sha256 {pool.sha256()[:16]}", markup=False)


def _data_show(options: argparse.Namespace) -> None:
    table = override(_table_from(options.config), options.words)
    config = build_config(table)
    data = load_data(config.source, config.partition, config.run.seed)
    target = Path(options.out or "partition.svg")
    try:
        write_atomically(target, partition_svg(data))
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    sizes = [client.num_train for client in data.clients]
    out.print(f"{data.source}: {len(sizes)} clients, {min(sizes)} to {max(sizes)} training items each", markup=False)
    out.print(f"picture {target}", markup=False)


def _report(options: argparse.Namespace) -> None:
    records = [record for place in options.runs for record in _records_below(Path(place))]
    table = comparison_table(records, reference=options.reference)
    try:
        page = write_report(records, Path(options.out), reference=options.reference)
        for kind in ("markdown", "latex", "csv"):
            if getattr(options, kind):
                write_atomically(Path(getattr(options, kind)), getattr(table, kind)())
        if options.runs_csv:
            write_atomically(Path(options.runs_csv), runs_frame(records).to_csv(index=False))
    except OSError as error:
        raise UsageError(f"cannot write the report: {error}") from error
    _print_table(table)
    out.print(f"report  {page}", markup=False)


def _records_below(place: Path) -> list[RunRecord]:
    """A run folder, or every run folder directly below."""
    if (place / "run.json").exists() or not place.is_dir():
        return [read_run(place)]
    folders = sorted(path.parent for path in place.glob("*/run.json"))
    return [read_run(folder) for folder in folders] or [read_run(place)]


if __name__ == "__main__":
    sys.exit(main())
