"""A federation as data: what is trained, on which form of data, by whom, and how long the server waits for them.

``federation.toml`` is an ordinary configuration without source and partition, plus the tables ``data`` (the form that
every site's examples have), ``deploy`` (address and patience) and ``sites`` (who may take part, by public key).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import UsageError, together
from fedmerge.core.options import build_options, check_options, option
from fedmerge.core.text import brief
from fedmerge.deploy.protection import privacy_faults
from fedmerge.deploy.schema import DataSchema
from fedmerge.experiment.attacks import Attack
from fedmerge.experiment.config import RunOptions, build_config, plain_options, read_toml, subtable
from fedmerge.experiment.participation import Participation
from fedmerge.models import NETWORKS
from fedmerge.training import LocalTraining

FILE = "federation.toml"
OWN_TABLES = ("data", "deploy", "sites")
MOST_SITE_NAME = 100
"""Letters of a site's name."""


_MOST_LIMIT = 1e9
"""Seconds."""


@dataclass(frozen=True)
class DeployOptions:
    """Where the server is and how long it waits."""

    name: str = option("federation", help="what the federation is called")
    address: str = option("127.0.0.1:9092", help="host:port that sites connect to")
    listen: str = option(
        "", help="host:port where the SuperLink itself listens; the address, if that is on this machine, by default"
    )
    insecure: bool = option(False, help="without certificates and keys; on the loopback address only")
    open: bool = option(
        False,
        help="the SuperLink may listen to other machines: whoever reaches it can run any program at all sites",
    )
    largest_request: int = option(
        512, at_least=1, at_most=2047, help="MiB that a request of a site may have; written into nginx.conf by init"
    )
    deadline: float = option(
        3600.0, above=0, help="seconds after which a round goes on without the sites that have not answered"
    )
    absent: float = option(
        300.0, above=0, help="seconds that a round waits for sites that are not connected, once enough have answered"
    )
    patience: float = option(
        86400.0, above=0, help="seconds to wait for as many sites as a round needs, before the run stops"
    )
    poll: float = option(0.5, above=0, at_most=60, help="seconds between two looks for replies")
    start_with: int = option(0, at_least=0, help="sites that must have reported before the first round; 0: all")
    attempts: int = option(3, at_least=1, help="times that a site is asked in a round while its client program fails")

    def __post_init__(self) -> None:
        check_options(self)

    def limit(self, failures: int = 0) -> float:
        """Seconds after which a site's program that still works on one message ends itself, because it hangs.

        While too few sites have answered the server waits beyond the deadline, so that one that failed gets longer.

        Args:
            failures: Times that the site's program has failed at this message.
        """
        return min(2.0 ** (1 + min(failures, 30)) * self.deadline, max(2 * self.deadline, self.patience), _MOST_LIMIT)


@dataclass(frozen=True)
class Terms:
    """What server and sites agree on: all that decides a site's numbers beside its own examples.

    Attributes:
        method: The algorithm.
        model: The network's recipe.
        training: What a site does in a round.
        options: Rounds, seed and the like.
        schema: Form of every site's data.
    """

    method: Any
    model: Any
    training: LocalTraining
    options: RunOptions
    schema: DataSchema

    def plain(self) -> dict[str, Any]:
        """As what JSON knows; the inverse of `terms_of`."""
        return {
            **plain_options(self.options),
            "method": {"name": ALGORITHMS.name_of(self.method), **plain_options(self.method)},
            "model": {"name": NETWORKS.name_of(self.model), **plain_options(self.model)},
            "training": plain_options(self.training),
            "data": plain_options(self.schema),
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the terms: equal for a server and a site that agree."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FederationConfig:
    """A federation's folder, read.

    Attributes:
        folder: On the server.
        deploy: Addresses and patience.
        sites: Public key by name, in the order of their names: a site's place is its index as a client. The place of a
            site that was forgotten stays where it was, see `is_tombstone`.
        terms: What is trained.
    """

    folder: Path
    deploy: DeployOptions
    sites: Mapping[str, str]
    terms: Terms

    @property
    def names(self) -> tuple[str, ...]:
        """[N] of the sites, in client order."""
        return tuple(self.sites)

    @property
    def living(self) -> tuple[str, ...]:
        """Names of the sites that may take part: those that were not forgotten, in client order."""
        return tuple(name for name in self.sites if not is_tombstone(name))

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return self.folder / "run"


def read_federation(folder: Path | str) -> FederationConfig:
    """Reads ``federation.toml`` of a folder.

    Raises:
        UsageError: with one line per fault, all of them together.
    """
    folder = Path(folder)
    path, table = federation_table(folder)
    faults: list[str] = []
    deploy = build_options(DeployOptions, subtable(table, "deploy", faults), "deploy", faults)
    sites = _sites_of(subtable(table, "sites", faults), faults)
    terms = _terms_of(agreed_on(table), faults)
    if deploy is None or terms is None or faults:
        raise UsageError(f"{path}:\n{together(faults)}")
    if not deploy.insecure:
        faults += [
            f"sites.{name}: no public key; make one with `fedmerge deploy key`"
            for name, key in sites.items()
            if not key and not is_tombstone(name)
        ]
    if deploy.start_with > len(sites):
        faults.append(f"deploy.start_with: got {deploy.start_with}; there are {len(sites)} sites")
    if faults:
        raise UsageError(f"{path}:\n{together(faults)}")
    return FederationConfig(folder, deploy, sites, terms)


def federation_table(folder: Path) -> tuple[Path, dict[str, Any]]:
    """``federation.toml`` of a folder: its path, and what it says.

    Raises:
        UsageError: if there is none or it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"{folder} is no federation: it has no {FILE}; make one with `fedmerge deploy init`")
    return path, read_toml(path)


def agreed_on(table: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``federation.toml`` are the terms."""
    return {key: value for key, value in table.items() if key not in ("deploy", "sites")}


def terms_of(table: Mapping[str, Any]) -> Terms:
    """The terms that plain values describe: an ordinary configuration without source and partition, and ``data``.

    Raises:
        UsageError: with one line per fault, all of them together.
    """
    faults: list[str] = []
    terms = _terms_of(table, faults)
    if terms is None:
        raise UsageError(together(faults))
    return terms


def _terms_of(table: Mapping[str, Any], faults: list[str]) -> Terms | None:
    before = len(faults)
    faults += [
        f"{key}: got one for a federation, whose sites have their data; leave it out"
        for key in ("source", "partition")
        if key in table
    ]
    schema = build_options(DataSchema, subtable(table, "data", faults), "data", faults)
    rest = {key: value for key, value in table.items() if key not in ("data", "source", "partition")}
    try:
        config = build_config(rest)
    except UsageError as error:
        faults += str(error).splitlines()
        return None
    faults += _simulated(config.run)
    if schema is None or len(faults) > before:
        return None
    terms = Terms(config.method, config.model, config.training, config.run, schema)
    faults += privacy_faults(terms)
    return terms if len(faults) == before else None


_SIMULATED: dict[str, str] = {
    "workers": "sites compute for themselves",
    "cluster": "sites compute for themselves",
    "fold": "a site is one client",
    "finetune_epochs": "sites are not fine-tuned; their own copies can be",
    "checkpoint_every": "every round is kept, because sites go on from it",
}
_REAL = ("sampling", "quorum")


def _simulated(options: RunOptions) -> list[str]:
    """One line for every option that only a simulation has."""
    plain = RunOptions()
    faults = [
        f"{name}: got {brief(getattr(options, name))}; it has no effect here ({why}); leave it out"
        for name, why in _SIMULATED.items()
        if getattr(options, name) != getattr(plain, name)
    ]
    if options.runtime not in ("auto", "sequential"):
        faults.append(f"runtime: got {options.runtime!r}; a site is one client, expected 'sequential'; leave it out")
    if options.kernels == "compiled":
        faults.append("kernels: got 'compiled'; sites compute with torch's own; leave it out")
    if options.device != "cpu":
        faults.append(f"device: got {options.device!r}; each site says so in its own site.toml; leave it out")
    if options.attack != Attack():
        faults.append("attack: got one; it belongs to simulations (fedmerge run); leave it out")
    own, none = plain_options(options.participation), plain_options(Participation())
    faults += [
        f"participation.{name}: got {brief(value)}; sites are there or not by themselves; leave it out"
        for name, value in own.items()
        if name not in _REAL and value != none.get(name)
    ]
    return faults


def _sites_of(table: Mapping[str, Any], faults: list[str]) -> dict[str, str]:
    if not table:
        faults.append("sites: none; expected a name and its public key for each, at least one")
    for name, key in table.items():
        if not is_site_name(name):
            faults.append(f"sites: got the name {brief(name)}; expected {SITE_NAME}")
        if not isinstance(key, str):
            faults.append(f"sites.{name}: got {brief(key)}; expected a public key as a text")
    faults += _tombstone_faults(table)
    if table and all(map(is_tombstone, table)):
        faults.append("sites: all of them were forgotten; expected one at least that takes part")
    return {name: str(table[name]) for name in in_client_order(table)}


def _tombstone_faults(table: Mapping[str, Any]) -> list[str]:
    faults = []
    for name in filter(is_tombstone, table):
        if table[name]:
            faults.append(f"sites.{name}: got a key for the place of a forgotten site; expected an empty text")
        if _place_of(name) >= len(table):
            faults.append(f"sites.{name}: there are {len(table)} places, from 0; put the other sites back")
    return faults


def in_client_order(names: Collection[str]) -> list[str]:
    """Sites in the order of their names, with the place of each forgotten one where it was.

    >>> in_client_order(["b", "forgotten-0", "c"]), in_client_order(["c", "a", "b"])
    (['forgotten-0', 'b', 'c'], ['a', 'b', 'c'])
    """
    ordered = sorted(name for name in names if not is_tombstone(name))
    for name in sorted(filter(is_tombstone, names), key=_place_of):
        ordered.insert(_place_of(name), name)
    return ordered


_TOMBSTONE = re.compile(r"forgotten-(0|[1-9][0-9]{0,8})")


def is_tombstone(name: str) -> bool:
    """Whether a name stands for the place of a site that was forgotten: it has no key and is never asked.

    >>> is_tombstone("forgotten-3"), is_tombstone("forgotten"), is_tombstone("clinic-a")
    (True, False, False)
    """
    return _TOMBSTONE.fullmatch(name) is not None


def tombstone(place: int) -> str:
    """What the place of a forgotten site is called; the place is its index as a client, from 0."""
    return f"forgotten-{place}"


def _place_of(name: str) -> int:
    return int(name.rpartition("-")[2])


SITE_NAME = f"1 to {MOST_SITE_NAME} printable characters without slashes, colons, quotes or spaces, no dot first"


def is_site_name(name: str) -> bool:
    """Whether a text can name a site: it also names a folder and stands in Flower's own configuration.

    >>> is_site_name("clinic-a"), is_site_name("../x"), is_site_name("a b")
    (True, False, False)
    """
    return (
        0 < len(name) <= MOST_SITE_NAME
        and name.isprintable()
        and not set(name) & set("/\\:'\"= ")
        and not name.startswith(".")
    )
