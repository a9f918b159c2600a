"""Who takes part in a federation and where its server is: read from ``federation.toml`` and changed in it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedmerge.core.errors import UsageError, together
from fedmerge.core.files import write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.text import brief
from fedmerge.deploy.federation import FILE, SITE_NAME, DeployOptions, federation_table, is_site_name, is_tombstone
from fedmerge.experiment.config import subtable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]

FEDERATION_HEAD = """\
# What this federation trains (as in any configuration of fedmerge, without source and partition), on which form of
# data, where its server is, and which sites may take part. Every site has a copy; nothing in it is secret.

"""


OPEN_ADVICE = (
    "whoever reaches the SuperLink there can start any program on the server and at all sites (its proxy lets sites "
    "through and nothing else); expected a loopback address, 127.0.0.1:PORT, or deploy.open = true"
)
"""What is wrong with a SuperLink that other machines can reach, and what to do."""


@dataclass(frozen=True)
class Roster:
    """Where the server is and who may take part, whatever is trained.

    Attributes:
        folder: The federation's, absolute.
        deploy: Addresses.
        sites: Public key by name, in the order of their names; texts are empty without keys. Not those that were
            forgotten.
        forgotten: Names that stand for them in the file.
    """

    folder: Path
    deploy: DeployOptions
    sites: Mapping[str, str]
    forgotten: tuple[str, ...] = ()

    @property
    def link(self) -> str:
        """``host:port`` where the SuperLink listens."""
        return self.deploy.listen or self.deploy.address

    @property
    def has_proxy(self) -> bool:
        """Whether sites reach the SuperLink through a proxy."""
        return not self.deploy.insecure and self.link != self.deploy.address


def read_roster(folder: Path | str) -> Roster:
    """Reads the tables ``deploy`` and ``sites`` of a federation.

    Raises:
        UsageError: with one line per fault, all of them together.
    """
    place = Path(folder).absolute()
    path, table = federation_table(place)
    faults: list[str] = []
    deploy = build_options(DeployOptions, subtable(table, "deploy", faults), "deploy", faults)
    listed = subtable(table, "sites", faults)
    sites = {name: key for name, key in listed.items() if not is_tombstone(name)}
    faults += name_faults("", tuple(sites))
    faults += [f"sites.{n}: got {brief(key)}; expected a text" for n, key in sites.items() if not isinstance(key, str)]
    if deploy is None or faults:
        raise UsageError(f"{path}:\n{together(faults)}")
    forgotten = tuple(name for name in listed if is_tombstone(name))
    return Roster(place, deploy, {name: sites[name] for name in sorted(sites)}, forgotten)


def name_faults(name: str, sites: Sequence[str]) -> list[str]:
    """What is wrong with the names of a federation and of its sites, a line for each."""
    faults = [] if name.isprintable() else [f"name: got {brief(name)}; expected characters that can be seen"]
    seen: set[str] = set()
    for site in sites:
        if not is_site_name(site) or is_tombstone(site):
            faults.append(f"sites: got the name {brief(site)}; expected {SITE_NAME}")
        if site.casefold() in seen:
            faults.append(f"sites: got {brief(site)} twice; capitals do not count, because names are folders")
        seen.add(site.casefold())
    return faults


def write_federation(folder: Path, text: str, sites: Sequence[str]) -> None:
    """Writes ``federation.toml`` and the copies that sites get."""
    write_atomically(folder / FILE, text)
    for name in sites:
        if (folder / "sites" / name).is_dir():
            write_atomically(folder / "sites" / name / FILE, text)


def change_sites(roster: Roster, sites: Mapping[str, str]) -> None:
    """Writes another table of sites; what else the file says, and its comments, stay."""
    path = roster.folder / FILE
    text = _text_with_sites(path.read_text(encoding="utf-8"), {**sites, **dict.fromkeys(roster.forgotten, "")})
    write_federation(roster.folder, text, tuple(sites))


def _text_with_sites(text: str, sites: Mapping[str, str]) -> str:
    """A configuration with another table of sites; comments stay where the table is written one site a line."""
    wanted = {**tomllib.loads(text), "sites": dict(sites)}
    lines = text.splitlines()
    start = next((place for place, line in enumerate(lines) if _SITES_HEADER.fullmatch(line)), None)
    if start is not None:
        rest = range(start + 1, len(lines))
        end = next((place for place in rest if lines[place].lstrip().startswith("[")), len(lines))
        kept = [line for line in lines[start + 1 : end] if _says(line, sites)]
        known = {name for line in kept for name in _table_of(line)}
        new = [tomli_w.dumps({name: key}).rstrip("\n") for name, key in sites.items() if name not in known]
        while kept and not kept[-1].strip():
            new.append(kept.pop())
        changed = "\n".join([*lines[: start + 1], *kept, *new, *lines[end:]]) + "\n"
        if _loads(changed) == wanted:
            return changed
    return FEDERATION_HEAD + tomli_w.dumps(wanted)


_SITES_HEADER = re.compile(r"\s*\[\s*sites\s*\]\s*(#.*)?")


def _says(line: str, sites: Mapping[str, str]) -> bool:
    """Whether a line of the table holds a comment or a site that stays as it is."""
    return all(sites.get(name) == key for name, key in _table_of(line).items())


def _table_of(line: str) -> Table:
    return _loads(line) or {}


def _loads(text: str) -> Table | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
