"""What people see of a federation while it runs: one small file, written anew as things happen."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmerge.core.errors import FedmergeError
from fedmerge.core.files import write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.strict_json import parse_json_table, read_bounded
from fedmerge.core.text import shortened
from fedmerge.experiment.record import to_plain

FILE = "status.json"
EVERY = 1.0
"""Seconds between two writes, at least."""
_MOST_LETTERS = 500


@dataclass
class SiteStatus:
    """One site as the server sees it.

    Attributes:
        seen: Unix time when it was last connected; 0 for never.
        asked: What it was last asked for.
        answered: What it last answered.
        refusals: Its messages that were not believed.
        told: What it or the network last said that people should know.
    """

    seen: float = 0.0
    asked: str = ""
    answered: str = ""
    refusals: int = 0
    told: str = ""


@dataclass
class Status:
    """The whole federation.

    Attributes:
        run: Identity of the run.
        round: Rounds completed.
        rounds: Wanted.
        phase: What the server is doing.
        updated: Unix time.
        sites: By name.
        strangers: Why connections that are no site were turned away.
    """

    run: str = ""
    round: int = 0
    rounds: int = 0
    phase: str = ""
    updated: float = 0.0
    sites: dict[str, Any] = field(default_factory=dict)
    strangers: tuple[str, ...] = ()


@dataclass
class Board:
    """Keeps a `Status` up to date and on the disk. It is news, not state: nothing is lost with it.

    Attributes:
        folder: Of the run; None keeps it in memory.
        status: What is shown.
    """

    folder: Path | None
    status: Status
    _written: float = 0.0

    def _site(self, name: str) -> SiteStatus:
        found: SiteStatus = self.status.sites.setdefault(name, SiteStatus())
        return found

    def seen(self, names: Iterable[str]) -> None:
        """Sites that are connected now."""
        for name in names:
            self._site(name).seen = time.time()
        self._write()

    def asked(self, name: str, what: str) -> None:
        """A site was asked."""
        self._site(name).asked = what
        self._write()

    def answered(self, name: str, what: str) -> None:
        """A site's answer counts."""
        self._site(name).answered = what
        self._write()

    def refused(self, name: str | None, why: str) -> None:
        """A message or a connection was not believed."""
        if name is None:
            self.status.strangers = (*self.status.strangers, shortened(why, _MOST_LETTERS))[-20:]
        else:
            self._site(name).refusals += 1
            self._site(name).told = shortened(why, _MOST_LETTERS)
        self._write()

    def told(self, name: str | None, text: str) -> None:
        """Something that a site or the network said."""
        if name is not None and text:
            self._site(name).told = shortened(text, _MOST_LETTERS)
            self._write()

    def phase(self, text: str) -> None:
        """What the server does now."""
        if text != self.status.phase:
            self.status.phase = text
            self._write()

    def reached(self, round_number: int) -> None:
        """A round is complete."""
        self.status.round = round_number
        self._write(now=True)

    def _write(self, *, now: bool = False) -> None:
        moment = time.time()
        if self.folder is None or (not now and moment - self._written < EVERY):
            return
        self._written = self.status.updated = moment
        write_atomically(self.folder / FILE, json.dumps(to_plain(self.status)) + "\n", private=True)

    def close(self, text: str) -> None:
        """The last news."""
        self.status.phase = text
        self._write(now=True)


def read_status(run_folder: Path) -> Status | None:
    """What the server last said; None if it has said nothing yet.

    Raises:
        FedmergeError: if the file is damaged.
    """
    path = run_folder / FILE
    if not path.is_file():
        return None
    faults: list[str] = []
    try:
        plain = parse_json_table(read_bounded(path))
    except ValueError as error:
        raise FedmergeError(f"{path} is damaged: {error}; it is written anew as the run goes on") from error
    sites = plain.pop("sites", {})
    status = build_options(Status, plain, "status", faults)
    read = {name: build_options(SiteStatus, site, f"sites.{name}", faults) for name, site in sites.items()}
    if status is None or faults:
        raise FedmergeError(f"{path} is damaged: {'; '.join(faults)}")
    status.sites = read
    return status
