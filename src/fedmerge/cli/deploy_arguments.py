"""The words and flags of ``fedmerge deploy`` and its actions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from fedmerge.cli import deploy
from fedmerge.cli.words import sentence
from fedmerge.core.errors import UsageError, unknown_name

Command = Callable[[argparse.Namespace], None]
ACTIONS = {
    "init": "write the folder of a new federation: certificates, keys, a folder for each site, what starts it all",
    "add": "let one more site take part, or give one another key",
    "remove": "take a site out before the first run; later it is forget",
    "renew": "make a new certificate for the server; sites need nothing new",
    "key": "make a key pair in a site's folder, at the site",
    "check": "ask everything that can be asked at a site before the first round",
    "rehearse": "run the federation in one process, where all sites' folders are on this machine",
    "start": "run the server's SuperLink, or a site, until told to end",
    "run": "train, on the server: submitted again until the rounds are done",
    "up": "all parts on this machine, until the rounds are done",
    "status": "rounds, sites, refusals, last seen",
    "predict": "what a site's own model says of new rows",
    "export": "a site's own model for other programs: PEFT, merged weights, ONNX, plain tensors",
    "offer": "write what a newcomer may have of a federation that has ended",
    "join": "make a newcomer's model from an offer, on its own machine",
    "forget": "remove a site from the server's folder, and say what cannot be removed",
    "forget-own": "remove what a site keeps of a federation, at the site",
    "simulate": "the same on Flower's simulation (Ray), for those who develop there",
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
    parser.description = sentence(ACTIONS[action])
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
    parser.set_defaults(command=deploy.init)


def _folder(parser: argparse.ArgumentParser, whose: str = "federation", command: Command | None = None) -> None:
    parser.add_argument("folder", metavar="FOLDER", help=f"of the {whose}")
    parser.set_defaults(command=command)


def _add(parser: argparse.ArgumentParser) -> None:
    _folder(parser, command=deploy.add)
    parser.add_argument("name", metavar="NAME", help="of the site")
    parser.add_argument(
        "--public-key", metavar="FILE", help="node.pub that the site made itself (deploy key); replaces an older one"
    )


def _remove(parser: argparse.ArgumentParser) -> None:
    _folder(parser, command=deploy.remove)
    parser.add_argument("name", metavar="NAME", help="of the site")


def _renew(parser: argparse.ArgumentParser) -> None:
    _folder(parser, command=deploy.renew)
    parser.add_argument("--days", type=int, default=730, help="that it is valid (default: 730)")
    parser.add_argument("--host", action="append", default=[], help="a further name of the server (repeatable)")


def _check(parser: argparse.ArgumentParser) -> None:
    _folder(parser, "site", deploy.check)
    parser.add_argument("--offline", action="store_true", help="ask nothing of the server")


def _start(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fedmerge deploy start {server FEDERATION | site SITE [--unit]}"
    parser.add_argument("what", choices=["server", "site"], help="which part")
    _folder(parser, "federation or the site", deploy.start)
    parser.add_argument("--unit", action="store_true", help="write a systemd unit of the site into its folder instead")


def _rehearse(parser: argparse.ArgumentParser) -> None:
    _folder(parser, command=deploy.rehearse)
    parser.add_argument("--out", metavar="FOLDER", help="run folder to write")


def _predict(parser: argparse.ArgumentParser) -> None:
    _folder(parser, "site", deploy.predict)
    parser.add_argument("rows", metavar="ROWS", help=".npz (its x), .csv or .parquet file; a label column is ignored")
    parser.add_argument("--out", metavar="FILE", help="CSV file to write: class and probabilities (default: terminal)")


def _export(parser: argparse.ArgumentParser) -> None:
    _folder(parser, "site", deploy.export)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder to write; must be empty or new")
    parser.add_argument("--as", dest="kind", metavar="KIND", help="peft, merged, torch or onnx (default: as usual)")


def _offer(parser: argparse.ArgumentParser) -> None:
    _folder(parser, command=deploy.offer)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder to write; must be empty or new")


def _join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("offer", metavar="OFFER", help="folder that the server has written")
    _folder(parser, "newcomer, with its site.toml", deploy.join)
    parser.add_argument("--way", default="auto", help="auto (default), or one of those of `fedmerge onboard`")


def _forget(parser: argparse.ArgumentParser) -> None:
    _folder(parser, command=deploy.forget)
    parser.add_argument("name", metavar="NAME", help="of the site")


def _forget_own(parser: argparse.ArgumentParser) -> None:
    _folder(parser, "site", deploy.forget_own)
    parser.add_argument("--model", action="store_true", help="also the site's own model")


def _simulate(parser: argparse.ArgumentParser) -> None:
    _folder(parser, command=deploy.simulate)
    parser.add_argument("--out", metavar="FOLDER", help="folder to write (default: simulation in the federation's)")
    parser.add_argument("--cpus", type=int, default=2, help="sites that compute at the same time (default: 2)")


_BUILDERS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "init": _init,
    "add": _add,
    "remove": _remove,
    "renew": _renew,
    "key": lambda parser: _folder(parser, "site", deploy.key),
    "check": _check,
    "rehearse": _rehearse,
    "start": _start,
    "run": lambda parser: _folder(parser, command=deploy.run),
    "up": lambda parser: _folder(parser, command=deploy.up),
    "status": lambda parser: _folder(parser, command=deploy.status),
    "predict": _predict,
    "export": _export,
    "offer": _offer,
    "join": _join,
    "forget": _forget,
    "forget-own": _forget_own,
    "simulate": _simulate,
}
