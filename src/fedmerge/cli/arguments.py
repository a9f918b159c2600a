"""The parser of each command; every option of a method is generated from its dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from fedmerge._version import __version__
from fedmerge.algorithms import ALGORITHMS
from fedmerge.cli.bench import bench
from fedmerge.cli.catalogue import OPTION_GROUPS, REGISTRIES, help_text, list_entries
from fedmerge.cli.data import data, report
from fedmerge.cli.deploy_arguments import add_deploy_arguments
from fedmerge.cli.explain import explain_run
from fedmerge.cli.export import add_export_arguments
from fedmerge.cli.onboard import add_onboard_arguments
from fedmerge.cli.privacy import add_privacy_arguments
from fedmerge.cli.training import compare, resume, run
from fedmerge.cli.words import sentence
from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.options import option_fields


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one message, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of leaving the process."""
        raise UsageError(f"{message}\nTry: {self.prog} --help")


_COMMANDS = {
    "run": "train one method: one model per client",
    "resume": "go on with a run that was interrupted",
    "compare": "train several methods on the same clients and seeds, then report",
    "list": "methods, sources, partitions, models and their options",
    "data": "see and fetch data, look at a partition",
    "export": "one client's model for other programs: PEFT, merged weights, mergekit, ONNX, plain tensors",
    "onboard": "a model for a new client from a few of its labelled samples",
    "report": "one self-contained page, and tables, from run folders",
    "bench": "every method on every setting under one protocol, resumable, with a page of results",
    "explain": "which clients share models, and what each model is for",
    "privacy": "what clients could read of each other off their own models",
    "deploy": "a federation across machines, on Flower: set up, check, run, look after",
}


def parser_of(words: Sequence[str]) -> Parser:
    """The parser of the command that `words` name; only that one is built."""
    command = next((word for word in words if not word.startswith("-")), None)
    if command in _COMMANDS:
        parser = Parser(prog=f"fedmerge {command}", description=sentence(_COMMANDS[command]))
        parser.add_argument("command_name", choices=[command], help=argparse.SUPPRESS)
        builders: dict[str, Callable[[Parser], None]] = {
            "run": partial(_run_parser, words=words),
            "resume": _resume_parser,
            "compare": _compare_parser,
            "list": _list_parser,
            "data": _data_parser,
            "report": _report_parser,
            "export": add_export_arguments,
            "onboard": add_onboard_arguments,
            "bench": _bench_parser,
            "explain": _explain_parser,
            "privacy": add_privacy_arguments,
            "deploy": partial(add_deploy_arguments, words=words),
        }
        builders[command](parser)
        return parser
    if command is not None:
        raise UsageError(unknown_name("command", command, _COMMANDS))
    parser = Parser(
        prog="fedmerge",
        description="Personalized federated learning: every client gets its own merge of a few shared models.",
        epilog="\n".join(f"  fedmerge {name:8} {text}" for name, text in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedmerge {__version__}")
    parser.set_defaults(command=lambda _: parser.print_help())
    return parser


def _common(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file to start from")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: a new one below runs/)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _run_parser(parser: Parser, words: Sequence[str]) -> None:
    parser.usage = "fedmerge run [METHOD] [key=value ...] [options]"
    parser.add_argument(
        "words",
        nargs="*",
        metavar="METHOD or key=value",
        help="a method's name (default fedmerge), and settings such as source=fashion-mnist partition=permuted "
        "rounds=50 training.lr=0.05",
    )
    parser.add_argument("--label", help="how tables call the run")
    _common(parser)
    name = next((word for word in words[1:] if word in ALGORITHMS), None)
    if name:
        _method_options(parser, name)
    parser.set_defaults(command=run)


def _method_options(parser: Parser, name: str) -> None:
    group = parser.add_argument_group(f"options of {name}", ALGORITHMS[name].summary)
    for field, (facts, annotation) in option_fields(ALGORITHMS[name].cls).items():
        group.add_argument(
            f"--{field.replace('_', '-')}",
            dest=f"method.{field}",
            metavar="VALUE",
            help=help_text(facts, annotation).replace("%", "%%"),
        )


def _resume_parser(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run that was interrupted")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(command=resume)


def _compare_parser(parser: Parser) -> None:
    parser.usage = "fedmerge compare [METHOD ...] [key=value ...] [options]"
    parser.add_argument(
        "words",
        nargs="*",
        metavar="METHOD or key=value",
        help="methods (default: fedmerge fedavg local fesem), each with options of its own if wanted "
        "(fedmerge:rule=official,num_models=5,label=official), and settings that all share",
    )
    parser.add_argument("--seeds", default=None, help="for example 0,1,2 or 0-4 (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--reference", help="method that the others are compared with")
    _common(parser)
    parser.set_defaults(command=compare)


def _list_parser(parser: Parser) -> None:
    parser.add_argument("kind", nargs="?", help=f"one of {', '.join([*REGISTRIES, *OPTION_GROUPS])}")
    parser.add_argument("name", nargs="?", help="one entry, with its options")
    parser.add_argument("--markdown", action="store_true", help="everything of a kind as Markdown, for documentation")
    parser.set_defaults(command=list_entries)


def _data_parser(parser: Parser) -> None:
    parser.usage = "fedmerge data {list | get NAME [key=value ...] | show [key=value ...] [--out PICTURE.svg]}"
    parser.add_argument(
        "action", choices=["list", "get", "show"], help="list sources, fetch one, or deal one out and draw it"
    )
    parser.add_argument("words", nargs="*", metavar="NAME or key=value")
    parser.add_argument("--config", metavar="FILE", help="TOML file to start from (show)")
    parser.add_argument("--out", metavar="FILE", help="picture to write (show; default partition.svg)")
    parser.set_defaults(command=data)


def _report_parser(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders that hold them")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="page to write (default report.html)")
    parser.add_argument("--reference", help="method that the others are compared with")
    parser.add_argument(
        "--public", action="store_true", help="leave out merging weights and all else that tells of single clients"
    )
    for kind in ("markdown", "latex", "csv"):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"also write the main table as {kind.capitalize()}")
    parser.add_argument("--runs-csv", metavar="FILE", help="also write one line per run as CSV")
    parser.set_defaults(command=report)


def _explain_parser(parser: Parser) -> None:
    parser.usage = "fedmerge explain RUN [CLIENT ...] [options]"
    parser.add_argument(
        "run", metavar="RUN", help="a run folder, or a folder of runs: then Local-only runs are compared with"
    )
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help="only these clients, in words")
    parser.add_argument("--all-clients", action="store_true", help="also a table of every client")
    parser.add_argument("--reference", help="method to explain, if the folder has several")
    parser.set_defaults(command=explain_run)


def _bench_parser(parser: Parser) -> None:
    parser.usage = (
        "fedmerge bench [short | full | lora | SUITE.toml] [options]\n       fedmerge bench --page-only FOLDER"
    )
    parser.add_argument(
        "suite", nargs="?", metavar="SUITE", help="short (minutes; the default), full, lora, or a TOML file"
    )
    parser.add_argument("--out", metavar="FOLDER", help="results and page; continued if it has results (bench-SUITE)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--settings", metavar="A,B", help="only these settings")
    parser.add_argument("--methods", metavar="X,Y", help="only these methods")
    parser.add_argument("--seeds", metavar="0,1", help="only these of the suite's seeds")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no new run after M minutes")
    parser.add_argument("--page-only", metavar="FOLDER", help="write the page from the results in a folder")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(command=bench)
