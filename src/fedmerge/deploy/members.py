"""What is done to a federation's folder later: sites, keys and the certificate come, go and are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fedmerge.core.errors import UsageError, together, unknown_name
from fedmerge.core.files import make_folder, write_atomically
from fedmerge.core.text import brief
from fedmerge.deploy import identity, units
from fedmerge.deploy.blueprint import (
    SITE_FILE,
    compose_of,
    make_site,
    own_program,
    renew_compose,
    user_of,
    write_site_file,
)
from fedmerge.deploy.replacing import put_back
from fedmerge.deploy.roster import Roster, change_sites, name_faults, read_roster
from fedmerge.experiment.book import held
from fedmerge.experiment.record import read_run_alone

SITE_UNIT = "fedmerge-site.service"
_RUN = "run"


def add_site(
    folder: Path | str, name: str, public_key_line: str | None = None, *, data: Mapping[str, Any] | None = None
) -> Path:
    """Lets one more site take part, or gives one that takes part already another key.

    The SuperLink takes in a new key and removes the old one when sites are registered next, before every run.

    Args:
        folder: The federation's.
        name: Of the site.
        public_key_line: Of a key that the site made itself; None makes a pair here, to be copied with the folder.
        data: Table ``data`` of its ``site.toml``; None leaves an example.

    Returns:
        The site's folder on the server, which has all that the site needs but a key that it made itself.

    Raises:
        UsageError: if the name or the key is taken or cannot be one, or a run has begun without the site.
    """
    roster = read_roster(folder)
    if name in roster.sites:
        return _replace_key(roster, name, _own_line(roster, name, public_key_line))
    faults = name_faults("", (*roster.sites, name))
    if faults:
        raise UsageError(together(faults))
    begun = _names_of_run(roster)
    if begun is not None and name not in begun:
        raise UsageError(
            f"{roster.folder / _RUN} has begun without {brief(name)}: a site that comes later gets a model of its own "
            "with `fedmerge deploy offer` and `join`; for a new run of all sites move that folder away first"
        )
    place = units.check_path(roster.folder / "sites" / name)
    if place.exists():
        raise UsageError(f"{place} is there already; move it away first")
    line = _own_line(roster, name, public_key_line)
    before = compose_of(roster)
    key = make_site(roster.folder, name, insecure=roster.deploy.insecure, line=line)
    write_site_file(place, name, roster.deploy.address, data)
    change_sites(roster, {**roster.sites, name: key})
    renew_compose(roster.folder, before)
    return place


def _names_of_run(roster: Roster) -> tuple[str, ...] | None:
    """The sites of a run that has begun; None if none has."""
    run = roster.folder / _RUN
    return read_run_alone(run).client_names if (run / "run.json").is_file() else None


def _own_line(roster: Roster, name: str, line: str | None) -> str | None:
    """A public key in the form in which it is written down; refused if another site has it."""
    if line is None:
        return None
    if roster.deploy.insecure:
        raise UsageError("got a public key for a federation without keys (deploy.insecure); leave it out")
    own = identity.public_line(line)
    for other, key in roster.sites.items():
        if other != name and key and identity.public_line(key) == own:
            raise UsageError(f"got the public key {identity.fingerprint(own)}; it is the key of site {brief(other)}")
    return own


def _replace_key(roster: Roster, name: str, line: str | None) -> Path:
    """Another key for a site; what the server has of the old one goes."""
    if line is None:
        raise UsageError(
            f"sites: got {brief(name)}, which takes part already; for another key of it give its public half "
            "(--public-key), which the site makes with `fedmerge deploy key`"
        )
    place = roster.folder / "sites" / name
    change_sites(roster, {**roster.sites, name: line})
    if place.is_dir():
        if not _has_key(place, line):
            (place / identity.NODE_KEY).unlink(missing_ok=True)
        write_atomically(place / identity.NODE_LINE, line + "\n")
    return place


def _has_key(place: Path, line: str) -> bool:
    """Whether a site's folder holds the private half of a key: it is the site itself then, on this machine."""
    try:
        return identity.line_of_key_file(place / identity.NODE_KEY) == line
    except UsageError:
        return False


def remove_site(folder: Path | str, name: str) -> Path | None:
    """Takes a site out before the first run: its key is no longer registered, its folder moves to ``removed``.

    Flower takes a removed key only when it was started again: a site that comes back before needs a new one.

    Returns:
        Where its folder is now; None if there was none.

    Raises:
        UsageError: if there is no such site, or a run has begun with it.
    """
    roster = read_roster(folder)
    if name not in roster.sites:
        raise UsageError(unknown_name("site", name, roster.sites))
    run = roster.folder / _RUN
    put_back(run)
    with held(run) if run.is_dir() else nullcontext():
        if name in (_names_of_run(roster) or ()):
            raise UsageError(
                f"{run} has begun with {brief(name)}, whose place in it stays: `fedmerge deploy forget` takes it out"
            )
        return _moved_away(roster, name)


def _moved_away(roster: Roster, name: str) -> Path | None:
    before = compose_of(roster)
    change_sites(roster, {other: key for other, key in roster.sites.items() if other != name})
    renew_compose(roster.folder, before)
    place = roster.folder / "sites" / name
    if not place.is_dir():
        return None
    make_folder(roster.folder / "removed")
    target = next(
        path
        for number in range(1_000_000)
        if not (path := roster.folder / "removed" / (name if not number else f"{name}.{number}")).exists()
    )
    place.rename(target)
    return target


def make_site_key(folder: Path | str) -> str:
    """Makes a key pair in a site's own folder, so that the private half never travels; gives the line for the server.

    Raises:
        UsageError: if there is a key already.
    """
    place = Path(folder)
    make_folder(place)
    return identity.make_key_pair(place)


def renew_certificate(folder: Path | str, *, days: int, hosts: Sequence[str] = ()) -> identity.CertificateFacts:
    """Replaces the server's certificate by one for the same hosts; sites need nothing new.

    SuperLink and proxy go on with the old one until they are started again.

    Args:
        folder: The federation's.
        days: How long it is valid.
        hosts: Further DNS names and IP addresses of the server.

    Raises:
        UsageError: if the federation has no certificates, or its authority is not there or cannot sign.
    """
    roster = read_roster(folder)
    if roster.deploy.insecure:
        raise UsageError(f"{roster.folder} is a federation without certificates (deploy.insecure)")
    if not (roster.folder / identity.CA_KEY).exists():
        raise UsageError(
            f"{roster.folder / identity.CA_KEY} is not there: it signs the new certificate; put it back for this "
            "command, then away again"
        )
    hosts = [*identity.describe(roster.folder / identity.SERVER).hosts, *hosts]
    identity.make_server_certificate(roster.folder, roster.deploy.name, hosts, days=days)
    return identity.describe(roster.folder / identity.SERVER)


def write_site_unit(folder: Path | str) -> Path:
    """Writes a unit for systemd into a site's folder, at the site; gives its path.

    It runs as the owner of the folder, but for root: then the user is left to be filled in.

    Raises:
        UsageError: if the folder is no site.
    """
    place = units.check_path(Path(folder))
    if not (place / SITE_FILE).is_file():
        raise UsageError(f"{folder} is no site: it has no {SITE_FILE}, which `fedmerge deploy init` makes")
    owner = place.stat().st_uid
    text = units.site_unit(place, own_program(), user_of(owner) if owner else None)
    write_atomically(place / SITE_UNIT, text)
    return place / SITE_UNIT
