"""``fedmerge deploy``: a federation across machines."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as Grid

from fedmerge.cli.screen import escape, out, say
from fedmerge.cli.words import table_from
from fedmerge.core.errors import FedmergeError, UsageError, unknown_name
from fedmerge.core.text import shortened
from fedmerge.experiment.config import override

Command = Callable[[argparse.Namespace], None]
ACTIONS = {
    "init": "write the folder of a new federation: certificates, keys, a folder for each site, what starts it all",
    "add": "let one more site take part",
    "key": "make a key pair in a site's folder, at the site",
    "check": "ask everything that can be asked at a site before the first round",
    "rehearse": "run the federation in one process, where all sites' folders are on this machine",
    "start": "run the server's SuperLink, or a site, until told to end",
    "run": "train, on the server: submitted again until the rounds are done",
    "up": "all parts on this machine, until the rounds are done",
    "status": "rounds, sites, refusals, last seen",
}


def add_deploy_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """The words and flags of the command; those of the action that is named."""
    listed = "\n".join(f"  fedmerge deploy {name:9} {text}" for name, text in ACTIONS.items())
    action = next((word for word in words[1:] if not word.startswith("-")), None)
    if action is None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = listed
        parser.set_defaults(command=lambda _: parser.print_help())
        return
    if action not in ACTIONS:
        raise UsageError(unknown_name("action of deploy", action, ACTIONS))
    parser.prog = f"fedmerge deploy {action}"
    parser.description = ACTIONS[action].capitalize() + "."
    parser.add_argument("action", choices=[action], help=argparse.SUPPRESS)
    _BUILDERS[action](parser)


def _init(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fedmerge deploy init FOLDER [key=value ...] [options]"
    parser.add_argument("folder", metavar="FOLDER", help="of the federation; must be empty or new")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="key=value",
        help="what is trained, as for `fedmerge run`: method=fedmerge model=mlp rounds=50 training.lr=0.05",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file to start from, without source and partition")
    parser.add_argument("--sites", metavar="A,B,C", default="", help="names of the sites; more can be added later")
    parser.add_argument("--name", help="what the federation is called (default: the folder's name)")
    parser.add_argument(
        "--address", metavar="HOST:PORT", default="127.0.0.1:9092", help="that sites connect to (default: %(default)s)"
    )
    parser.add_argument("--listen", metavar="HOST:PORT", default="", help="of the SuperLink itself, behind the proxy")
    parser.add_argument("--host", action="append", default=[], help="another name of the server (repeatable)")
    parser.add_argument(
        "--like", metavar="FILE", help="a file or folder as every site has one: columns, classes, scale"
    )
    parser.add_argument("--label-column", metavar="NAME", default="label", help="of tables (default: label)")
    parser.add_argument("--text-column", metavar="NAME", help="of tables that hold texts")
    parser.add_argument(
        "--classes", metavar="A,B,C", default="", help="all classes, if the example has not all of them"
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--standardise", action="store_true", help="scale every column as the example asks for")
    scale.add_argument("--pooled", action="store_true", help="find the scale from sums that every site sends")
    parser.add_argument("--insecure", action="store_true", help="no certificates and keys; loopback addresses only")
    parser.add_argument("--demo", type=int, metavar="N", help="N sites on this machine with real handwritten digits")
    parser.set_defaults(command=init)


def _folder(parser: argparse.ArgumentParser, whose: str = "federation", command: Command | None = None) -> None:
    parser.add_argument("folder", metavar="FOLDER", help=f"of the {whose}")
    parser.set_defaults(command=command)


def _add(parser: argparse.ArgumentParser) -> None:
    _folder(parser, command=add)
    parser.add_argument("name", metavar="NAME", help="of the site")
    parser.add_argument("--public-key", metavar="FILE", help="node.pub that the site made itself (deploy key)")


def _check(parser: argparse.ArgumentParser) -> None:
    _folder(parser, "site", check)
    parser.add_argument("--offline", action="store_true", help="ask nothing of the server")


def _start(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fedmerge deploy start {server FEDERATION | site SITE}"
    parser.add_argument("what", choices=["server", "site"], help="which part")
    _folder(parser, "federation or the site", start)


def _rehearse(parser: argparse.ArgumentParser) -> None:
    _folder(parser, command=rehearse)
    parser.add_argument("--out", metavar="FOLDER", help="run folder to write")


_BUILDERS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "init": _init,
    "add": _add,
    "key": lambda parser: _folder(parser, "site", key),
    "check": _check,
    "rehearse": _rehearse,
    "start": _start,
    "run": lambda parser: _folder(parser, command=run),
    "up": lambda parser: _folder(parser, command=up),
    "status": lambda parser: _folder(parser, command=status),
}


def _said(text: str) -> None:
    """One line of what happens, at once also where it goes to a file."""
    say(text)
    out.file.flush()


# ---------------------------------------------------------------- making


def init(options: argparse.Namespace) -> None:
    """Writes the folder, and says what to do next."""
    from fedmerge.deploy.blueprint import Blueprint, write_blueprint  # noqa: PLC0415 - other commands do not need it
    from fedmerge.deploy.demo import demo_names, demo_site_table, write_demo_data  # noqa: PLC0415

    if options.demo is not None and (options.sites or options.like):
        raise UsageError("--demo brings sites and data of its own; leave --sites and --like out")
    if options.demo is not None and not 2 <= options.demo <= 25:
        raise UsageError(f"--demo: got {options.demo}; expected 2 to 25 sites")
    sites = demo_names(options.demo) if options.demo is not None else _names(options.sites)
    own = override(table_from(options.config), options.words)
    deploy = own.pop("deploy", {})
    config = {**_DEMO, **own} if options.demo is not None else own
    folder = Path(options.folder)
    blueprint = Blueprint(
        name=options.name or folder.absolute().name,
        address=options.address,
        listen=options.listen,
        sites=sites,
        hosts=tuple(options.host),
        insecure=options.insecure,
        config=config,
        data=config.pop("data", None) or _schema_table(options, config),
        deploy=deploy,
        site_data=dict.fromkeys(sites, demo_site_table()) if options.demo is not None else {},
    )
    write_blueprint(folder, blueprint)
    if options.demo is not None:
        write_demo_data(folder, sites)
    _next_steps(folder, sites, demo=options.demo is not None)


_DEMO: dict[str, Any] = {"rounds": 5, "evaluate_every": 1}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _schema_table(options: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Table ``data``, from an example or the demo.

    Raises:
        UsageError: if there is neither.
    """
    from fedmerge.deploy.demo import demo_schema  # noqa: PLC0415
    from fedmerge.deploy.schema import schema_of_example  # noqa: PLC0415
    from fedmerge.experiment.config import build_config, plain_options  # noqa: PLC0415
    from fedmerge.experiment.federation import encoder_of  # noqa: PLC0415

    if options.demo is not None:
        return plain_options(demo_schema())
    if options.like is None:
        raise UsageError(
            "--like: none given; name a file or folder that looks like those of the sites (one of them, or a made-up "
            "one): its columns, classes and scale become those of the federation. Or give a table `data` in --config"
        )
    schema = schema_of_example(
        options.like,
        label_column=options.label_column,
        text_column=options.text_column,
        standardise=options.standardise,
        scale="pooled" if options.pooled else "given",
        class_names=_names(options.classes),
        encoder=encoder_of(build_config(config).model),
    )
    return plain_options(schema)


def _next_steps(folder: Path, sites: Sequence[str], *, demo: bool) -> None:
    say(f"federation  {folder}/federation.toml")
    say(f"sites       {', '.join(sites) or 'none yet: fedmerge deploy add'}")
    if demo:
        say(f"next        fedmerge deploy up {folder}")
        return
    say(f"next        copy each folder of {folder}/sites to its machine, say in its site.toml where the data is, then")
    say("            at each site   fedmerge deploy check SITE; fedmerge deploy start site SITE")
    say(f"            on the server  fedmerge deploy start server {folder}; fedmerge deploy run {folder}")


def add(options: argparse.Namespace) -> None:
    """Adds a site and says where its folder is."""
    from fedmerge.deploy.blueprint import add_site  # noqa: PLC0415

    line = None
    if options.public_key is not None:
        try:
            line = Path(options.public_key).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"--public-key: {options.public_key} cannot be read: {error}") from error
    say(f"site        {add_site(options.folder, options.name, line)}")


def key(options: argparse.Namespace) -> None:
    """Makes a key pair and shows the public line."""
    from fedmerge.deploy.blueprint import make_site_key  # noqa: PLC0415

    say(make_site_key(options.folder))


# ---------------------------------------------------------------- before and during


def check(options: argparse.Namespace) -> None:
    """One line for each question; fails if one is not well."""
    from fedmerge.deploy.check import check_site  # noqa: PLC0415

    findings = check_site(options.folder, network=not options.offline)
    for found in findings:
        mark = "[green]ok[/]  " if found.ok else "[bold red]NO[/]  "
        out.print(mark + escape(f"{found.name:16} {found.detail}"))
    wrong = [found.name for found in findings if not found.ok]
    if wrong:
        raise FedmergeError(f"not ready: {', '.join(wrong)}")
    say("ready")


def rehearse(options: argparse.Namespace) -> None:
    """Runs in one process and shows what each site would get."""
    from fedmerge.deploy.federation import read_federation  # noqa: PLC0415
    from fedmerge.deploy.rehearsal import rehearse as rehearsed  # noqa: PLC0415

    federation = read_federation(options.folder)
    folder = None if options.out is None else Path(options.out)
    _scores(rehearsed(federation, folder).record)


def start(options: argparse.Namespace) -> None:
    """Runs a part until told to end."""
    from fedmerge.deploy.operate import start_server, start_site  # noqa: PLC0415

    (start_server if options.what == "server" else start_site)(options.folder, _said)


def run(options: argparse.Namespace) -> None:
    """Trains, and shows what each site has."""
    from fedmerge.deploy.operate import run_until_done  # noqa: PLC0415

    _scores(run_until_done(options.folder, _said))


def up(options: argparse.Namespace) -> None:
    """All parts here, until done."""
    from fedmerge.deploy.operate import run_here  # noqa: PLC0415

    _scores(run_here(options.folder, _said))


def _scores(record: Any) -> None:
    """Accuracy of every site's own model at the selected round."""
    selected = record.selected()
    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("Site", "Train", "Validation (%)", "Test (%)"):
        grid.add_column(heading, justify="left" if heading == "Site" else "right")
    for i, name in enumerate(record.client_names[:_MOST_ROWS]):
        scores = (selected.validation, selected.test)
        shown = ["–" if s is None or s.accuracy[i] is None else f"{100 * s.accuracy[i]:.1f}" for s in scores]
        grid.add_row(escape(name), str(record.num_train[i]), *shown)
    out.print(f"[bold]{escape(record.label)}[/]: round {selected.round} of {record.last().round}, {record.method}")
    out.print(grid)


_MOST_ROWS = 50


# ---------------------------------------------------------------- looking


def status(options: argparse.Namespace) -> None:
    """What the server last said of the run and of each site."""
    from fedmerge.deploy.deployment import read_deployment  # noqa: PLC0415
    from fedmerge.deploy.federation import read_federation  # noqa: PLC0415
    from fedmerge.deploy.status import read_status  # noqa: PLC0415

    federation = read_federation(options.folder)
    found = read_status(federation.run_folder)
    if found is None:
        say("no run yet: fedmerge deploy run")
        return
    deployment = read_deployment(federation.run_folder)
    say(f"round {found.round} of {found.rounds}: {found.phase} ({_ago(found.updated)})")
    if deployment is not None and deployment.stopped:
        say(f"stopped: {deployment.stopped}")
    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("Site", "Last seen", "Asked", "Answered", "Refused", "Model", "Said"):
        grid.add_column(heading, justify="right" if heading == "Refused" else "left")
    delivered = () if deployment is None else deployment.delivered
    for name in federation.living:
        site = found.sites.get(name)
        cells = [name, "never", "", "", "0", "", ""]
        if site is not None:
            has = "yes" if name in delivered else ""
            said = shortened(site.told, 60)
            cells = [name, _ago(site.seen), site.asked, site.answered, str(site.refusals), has, said]
        grid.add_row(*(escape(cell) for cell in cells))
    out.print(grid)
    for text in found.strangers:
        say(f"turned away: {text}")


def _ago(moment: float) -> str:
    if moment <= 0:
        return "never"
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
