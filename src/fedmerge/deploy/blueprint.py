"""A federation's folder, written as a whole from a blueprint."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from fedmerge._version import __version__
from fedmerge.core.errors import FedmergeError, UsageError, together
from fedmerge.core.files import make_folder, write_atomically
from fedmerge.core.options import build_options, check_options, option
from fedmerge.core.text import brief
from fedmerge.deploy import identity, units
from fedmerge.deploy.address import host_and_port, is_host, is_loopback, join, local_address
from fedmerge.deploy.federation import OWN_TABLES, DeployOptions
from fedmerge.deploy.roster import (
    FEDERATION_HEAD,
    OPEN_ADVICE,
    Roster,
    Table,
    name_faults,
    read_roster,
    write_federation,
)
from fedmerge.experiment.config import read_toml

CONNECTION = "federation"
"""How Flower's own configuration calls the connection to the SuperLink."""
FLOWER_HOME = "flower"
APP = "app"
SITE_FILE = "site.toml"
_LEAST_AUTHORITY_DAYS = 3650


@dataclass(frozen=True)
class Blueprint:
    """All that a federation's folder is made from.

    Attributes:
        config: The ordinary configuration without source and partition.
        data: The form of every site's examples, table ``data``.
        deploy: Further options of table ``deploy`` (deadline, patience and the like).
        site_data: Table ``data`` of ``site.toml`` by name, for sites whose data is known already.
    """

    name: str = option(help="what the federation is called")
    address: str = option(help="host:port that sites connect to")
    sites: tuple[str, ...] = option((), help="names of the sites; more can be added later")
    listen: str = option("", help="host:port of the SuperLink itself; behind the proxy on the next port by default")
    hosts: tuple[str, ...] = option((), help="further DNS names and IP addresses of the server, for its certificate")
    insecure: bool = option(False, help="without certificates and keys; on the loopback address only")
    days: int = option(730, at_least=1, at_most=36500, help="how long the server's certificate is valid")
    config: Table = field(default_factory=dict)
    data: Table = field(default_factory=dict)
    deploy: Table = field(default_factory=dict)
    site_data: Mapping[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self)
        faults = [*_address_faults(self), *name_faults(self.name, self.sites), *_table_faults(self)]
        if faults:
            raise UsageError(together(f"Blueprint.{fault}" for fault in faults))

    @property
    def link(self) -> str:
        """``host:port`` of the SuperLink: the address itself where only this machine can reach it."""
        host, port = host_and_port(self.address)
        return self.listen or (self.address if is_loopback(host) else join("127.0.0.1", port + 1))


def write_blueprint(folder: Path | str, blueprint: Blueprint) -> Roster:
    """Writes a federation's folder: configuration, certificates, keys, a folder for each site, and what starts it all.

    Raises:
        UsageError: if the folder has something in it or its path cannot be used; nothing is written then.
        OSError: if it cannot be written.
    """
    place = units.check_path(Path(folder))
    for name in blueprint.sites:
        units.check_path(place / "sites" / name)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"{folder} is not an empty folder; give a new one for the federation")
    make_folder(place)
    place.chmod(0o700)
    if not blueprint.insecure:
        identity.make_authority(place, blueprint.name, days=max(blueprint.days, _LEAST_AUTHORITY_DAYS))
        hosts = [host_and_port(blueprint.address)[0], *blueprint.hosts]
        identity.make_server_certificate(place, blueprint.name, hosts, days=blueprint.days)
    for name in ("logs", FLOWER_HOME, APP, "sites"):
        make_folder(place / name)
    (place / "logs").chmod(0o700)
    keys = {name: make_site(place, name, insecure=blueprint.insecure) for name in sorted(blueprint.sites)}
    write_federation(place, FEDERATION_HEAD + tomli_w.dumps(_federation_table(blueprint, keys)), blueprint.sites)
    for name in blueprint.sites:
        write_site_file(place / "sites" / name, name, blueprint.address, blueprint.site_data.get(name))
    roster = read_roster(place)
    write_derived(roster)
    for name in ("systemd", *(["proxy"] if roster.has_proxy else [])):
        make_folder(place / name)
    for name, text in _starters(roster).items():
        write_atomically(place / name, text)
    return roster


class Moved(NamedTuple):
    """A federation's folder is at another place than it was.

    Attributes:
        before: Where it was.
        changed: Files that name that place still, because somebody has changed them.
    """

    before: Path
    changed: tuple[str, ...]


def write_derived(roster: Roster) -> Moved | None:
    """Writes what Flower reads anew where it is not as the federation is now.

    The address may have been changed, fedmerge may be newer, or the folder may have been moved. Then units, proxy and
    compose file are made anew, too, but for those that somebody has changed.

    Returns:
        What was found if the folder was moved; None otherwise.

    Raises:
        UsageError: if the path cannot be used.
        OSError: if a file cannot be written.
    """
    folder = units.check_path(roster.folder)
    app, flower = folder / APP / "pyproject.toml", folder / FLOWER_HOME / "config.toml"
    before = _folder_named_in(app)
    moved = None if before is None or before == folder else Moved(before, _follow(roster, before))
    for path, text in ((flower, _flower_text(roster)), (app, app_text(folder))):  # the app names the folder: it is last
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            make_folder(path.parent)
            write_atomically(path, text)
    return moved


def _follow(roster: Roster, before: Path) -> tuple[str, ...]:
    """Makes units, proxy and compose file anew for a folder that was moved; those that are not as they were made."""
    old, changed = _starters(replace(roster, folder=before)), []
    for name, text in _starters(roster).items():
        path = roster.folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") == text:
            continue
        if path.read_text(encoding="utf-8") == old[name]:
            write_atomically(path, text)
        else:
            changed.append(name)
    return tuple(changed)


def _folder_named_in(app: Path) -> Path | None:
    with suppress(OSError, FedmergeError, KeyError, TypeError):  # none yet, or not ours
        return Path(read_toml(app)["tool"]["flwr"]["app"]["config"]["folder"])
    return None


def _address_faults(blueprint: Blueprint) -> list[str]:
    faults = []
    for what in ("address", "listen") if blueprint.listen else ("address",):
        try:
            host, port = host_and_port(getattr(blueprint, what))
        except UsageError as error:
            faults.append(f"{what}: {error}")
            continue
        if blueprint.insecure and not is_loopback(host):
            faults.append(f"insecure: got true with {what} {join(host, port)}; expected a loopback address, 127.0.0.1")
        elif what == "listen" and not is_loopback(host) and not blueprint.deploy.get("open"):
            faults.append(f"listen: got {join(host, port)}; {OPEN_ADVICE}")
        if what == "address" and not blueprint.listen and not is_loopback(host) and port == 2**16 - 1:
            faults.append("listen: missing; there is no next port after 65535")
    faults += [
        f"hosts: got {brief(host)}; expected a DNS name or an IP address"
        for host in blueprint.hosts
        if not is_host(host)
    ]
    return list(dict.fromkeys(faults))


def _table_faults(blueprint: Blueprint) -> list[str]:
    faults = [
        f"config.{key}: got one for a federation; leave it out"
        for key in ("source", "partition", *OWN_TABLES)
        if key in blueprint.config
    ]
    unknown = [name for name in blueprint.site_data if name not in blueprint.sites]
    faults += [f"site_data: got data of {brief(name)}, which is no site" for name in unknown]
    taken = {"name", "address", "listen", "insecure"} & set(blueprint.deploy)
    faults += [f"deploy.{key}: got one; say it as {key}" for key in sorted(taken)]
    build_options(DeployOptions, {k: v for k, v in blueprint.deploy.items() if k not in taken}, "deploy", faults)
    return faults


def make_site(folder: Path, name: str, *, insecure: bool, line: str | None = None) -> str:
    """A site's folder with certificate and keys; gives its public key, empty without keys."""
    place = folder / "sites" / name
    make_folder(place)
    place.chmod(0o700)
    if insecure:
        return ""
    write_atomically(place / identity.CA, (folder / identity.CA).read_bytes())
    if line is None:
        return identity.make_key_pair(place)
    write_atomically(place / identity.NODE_LINE, line + "\n")
    return line


def _federation_table(blueprint: Blueprint, keys: Mapping[str, str]) -> Table:
    own = {"name": blueprint.name, "address": blueprint.address, "listen": blueprint.link}
    insecure = {"insecure": True} if blueprint.insecure else {}
    data = {"data": blueprint.data} if blueprint.data else {}
    return {**blueprint.config, **data, "deploy": {**own, **insecure, **blueprint.deploy}, "sites": dict(keys)}


def write_site_file(place: Path, name: str, server: str, data: Mapping[str, Any] | None) -> None:
    """A site's ``site.toml``, with an example in the place of ``data`` where that is not known."""
    table: Table = {"name": name, "server": server, "state": "state", "device": "cpu", "anew": False}
    text = _SITE_HEAD + tomli_w.dumps(table) + "\n" + _SITE_DATA
    write_atomically(place / SITE_FILE, text + (tomli_w.dumps({"data": dict(data)}) if data else _SITE_EXAMPLE))


def _flower_text(roster: Roster) -> str:
    """Flower's own configuration: how its command reaches the SuperLink from this machine."""
    secret: Table = {"root-certificates": str(roster.folder / identity.CA)}
    connection = {"address": local_address(roster.link), **({"insecure": True} if roster.deploy.insecure else secret)}
    return tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}})


def app_text(folder: Path) -> str:
    """The app that Flower is given: it has no code, it names the code that is installed."""
    return tomli_w.dumps(
        {
            "project": {
                "name": "fedmerge-federation",
                "version": __version__,
                "description": "A federation of fedmerge",
                "license": "Apache-2.0",
                "requires-python": ">=3.11",
                "dependencies": ["flwr>=1.41,<1.43"],
            },
            "tool": {
                "flwr": {
                    "app": {
                        "publisher": "fedmerge",
                        "components": {
                            "serverapp": "fedmerge.deploy.flower.server_app:app",
                            "clientapp": "fedmerge.deploy.flower.client_app:app",
                        },
                        "config": {"folder": str(folder)},
                    }
                }
            },
        }
    )


def _starters(roster: Roster) -> dict[str, str]:
    """Units of the server for systemd, and where there is a proxy its configuration and a compose file, by file."""
    folder, program, user = roster.folder, own_program(), user_of(os.getuid())
    texts = {
        "systemd/fedmerge-server.service": units.server_unit(folder, program, user),
        "systemd/fedmerge-run.service": units.run_unit(folder, program, user),
    }
    if not roster.has_proxy:
        return texts
    address, nginx = roster.deploy.address, Path(shutil.which("nginx") or "/usr/sbin/nginx")
    largest, port = roster.deploy.largest_request, host_and_port(address)[1]
    return {
        **texts,
        "systemd/fedmerge-proxy.service": units.proxy_unit(folder, nginx, user, port=port),
        "nginx.conf": units.nginx_text(folder, address, roster.link, largest_request=largest),
        "compose.yaml": compose_of(roster),
    }


def own_program() -> Path:
    """The command ``fedmerge`` on this machine."""
    return Path(sys.executable).with_name("fedmerge")


def user_of(number: int) -> str:
    """What a user is called by whose number it is."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # a number without a name, as in containers
        return str(number)


def compose_of(roster: Roster) -> str:
    """The compose file of a federation; empty without a proxy."""
    if not roster.has_proxy:
        return ""
    return units.compose_text(roster.folder, roster.deploy.address, roster.link, tuple(roster.sites))


def renew_compose(folder: Path, before: str) -> None:
    """Writes the compose file anew, unless somebody has changed it."""
    path = folder / "compose.yaml"
    if before and path.is_file() and path.read_text(encoding="utf-8") == before:
        write_atomically(path, compose_of(read_roster(folder)))


_SITE_HEAD = """\
# This site's own settings. The server never sees this file.

"""
_SITE_DATA = """\
# Where this site's examples are; they never leave its machine.
"""
_SITE_EXAMPLE = """\
# Exactly one of these, without the sign in front:
# [data]
# path = "examples.csv"            # .npz, .csv or .parquet; or a folder with train.*, validation.* and test.*
# huggingface = "name or folder"   # a data set in the format of Hugging Face
# python = "reader.py:examples"    # a function of your own that gives (x, y)
"""
