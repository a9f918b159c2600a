"""Who is there: connections become sites, by their key or by what they say, and say once what they have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fedmerge.core.errors import FedmergeError
from fedmerge.core.text import printable, shortened
from fedmerge.deploy.federation import DeployOptions
from fedmerge.deploy.link import Contact, Failure, Link
from fedmerge.deploy.messages import Answer, Letter, answer_from
from fedmerge.deploy.status import Board
from fedmerge.deploy.telling import note_of

log = logging.getLogger(__name__)

LOOK = 2.0
"""Seconds between two looks at who is connected."""
AT_ONCE, BYTES_AT_ONCE = 16, 1 << 29
"""Answers that are taken from the network at once, and their bytes, unless one alone has more: they are in memory."""
REFUSED = 60.0
"""Seconds after which a connection that was turned away is asked again: its site may have been mended."""
MOST_PAUSE = 600.0
"""Seconds between two tries to reach a site whose program fails, at most."""
MOST_LETTERS = 500
"""Of what others said, in logs."""
Connection = tuple[int, str]
Doubt = Callable[[Answer], str]
"""Looks at what a site says of itself; why it cannot take part, empty if it can."""


class Clock(NamedTuple):
    """Time, given from outside.

    Attributes:
        now: Seconds, steady.
        sleep: Waits.
    """

    now: Callable[[], float]
    sleep: Callable[[float], None]


def said(text: str) -> str:
    """What somebody else said, as it may stand in a log: one line, of bounded length."""
    return printable(shortened(text, MOST_LETTERS))


def pulled(link: Link, tickets: Sequence[str], num_bytes: int = 0) -> Iterator[tuple[str, Letter | Failure]]:
    """What has come for these tickets, a few at a time.

    Args:
        link: The network.
        tickets: Of the letters.
        num_bytes: That an answer has, about.
    """
    count = max(1, min(AT_ONCE, BYTES_AT_ONCE // max(1, num_bytes)))
    for start in range(0, len(tickets), count):
        yield from link.pull(tickets[start : start + count])


@dataclass
class Roll:
    """Sites that are connected, and what they have said of themselves.

    Attributes:
        link: The network.
        names: Of all sites that may take part.
        options: How long letters are kept.
        hello: The letter that asks a site who it is; may change.
        doubt: Says why a site that introduces itself cannot take part; may change.
        board: Where people see what is going on.
        clock: Time.
        reports: What each site said of itself, by name.
        familiar: Sites that need not be asked who they are where their key says it: the run knows their counts.
    """

    link: Link
    names: Sequence[str]
    options: DeployOptions
    hello: Callable[[str], Letter]
    doubt: Doubt
    board: Board
    clock: Clock
    reports: dict[str, Answer] = field(default_factory=dict)
    familiar: frozenset[str] = frozenset()
    _claims: dict[int, str] = field(default_factory=dict)
    _refused: dict[Connection, float] = field(default_factory=dict)
    _hellos: dict[str, Contact] = field(default_factory=dict)
    _greeted: set[Connection] = field(default_factory=set)
    _pauses: dict[Connection, tuple[float, float]] = field(default_factory=dict)
    _present: dict[str, Contact] = field(default_factory=dict)
    _looked: float = -LOOK

    def present(self) -> Mapping[str, Contact]:
        """Sites that are connected and known by name, as seen a moment ago."""
        now = self.clock.now()
        if now - self._looked >= LOOK:
            self._looked = now
            self._look(now)
        return self._present

    def _look(self, now: float) -> None:
        self._refused = {connection: until for connection, until in self._refused.items() if until > now}
        contacts = self.link.contacts()
        for contact in contacts:
            self._greet(contact, now)
        self._hear(now)
        self._present = {}
        for contact in sorted(contacts, key=lambda each: each.since):
            name = self._name_of(contact)
            if name is not None:
                self._present[name] = contact  # the latest, if an earlier one is not known to be gone yet
        self.board.seen(self._present)

    def _name_of(self, contact: Contact) -> str | None:
        if contact[:2] in self._refused:
            return None
        name = contact.name or self._claims.get(contact.address)
        return name if name in self.names and self._is_known(name) else None

    def _is_known(self, name: str | None) -> bool:
        return name in self.reports or name in self.familiar

    def _greet(self, contact: Contact, now: float) -> None:
        """Asks a connection once who it is, unless all that is known already."""
        connection = contact[:2]
        known = contact.name is not None and self._is_known(contact.name)
        due, _ = self._pauses.get(connection, (now, 0.0))
        if known or connection in self._greeted or connection in self._refused or now < due:
            return
        if contact.name is not None and contact.name not in self.names:
            self._refuse(contact, f"its key belongs to {contact.name!r}, which is no site of this federation")
            return
        letter = self.hello(contact.name or "")
        seconds = max(self.options.deadline, self.options.patience)
        ticket = self.link.push(contact, "hello", letter, group="hello", seconds=seconds)
        if ticket is not None:
            self._greeted.add(connection)
            self._hellos[ticket] = contact

    def _hear(self, now: float) -> None:
        for ticket, found in pulled(self.link, list(self._hellos)):
            contact = self._hellos.pop(ticket)
            if isinstance(found, Failure):
                log.warning("site %s: %s", contact.name or contact.address, said(found.reason))
                self.board.told(contact.name, found.reason)
                self._again_later(contact, now)
            else:
                self._introduced(contact, found)

    def _again_later(self, contact: Contact, now: float) -> None:
        """A failed site is asked again, each time after a longer pause: every try starts a process there."""
        connection = contact[:2]
        _, before = self._pauses.get(connection, (now, 0.0))
        pause = min(MOST_PAUSE, max(LOOK, 2 * before))
        self._pauses[connection] = (now + pause, pause)
        self._greeted.discard(connection)

    def _introduced(self, contact: Contact, letter: Letter) -> None:
        try:
            answer = answer_from(letter.text)
        except FedmergeError as error:
            self._refuse(contact, str(error))
            return
        if contact.name is not None and answer.site != contact.name:
            self._refuse(contact, f"its key belongs to {contact.name!r}, but it says that it is {answer.site!r}")
        elif answer.site not in self.names:
            self._refuse(contact, f"it says that it is {answer.site!r}, which is no site of this federation")
        elif why := self.doubt(answer):
            self._refuse(contact, f"site {answer.site!r}: {why}")
        else:
            self._claims[contact.address] = answer.site
            self.reports[answer.site] = answer
            self._hear_note(answer)

    def _hear_note(self, answer: Answer) -> None:
        note = note_of(answer.note, answer.versions)
        if note:
            log.warning("site %s: %s", answer.site, said(note))
            self.board.told(answer.site, note)

    def _refuse(self, contact: Contact, why: str) -> None:
        self._refused[contact[:2]] = self.clock.now() + REFUSED
        self._greeted.discard(contact[:2])
        log.warning("a connection is not taken in: %s", said(why))
        self.board.refused(contact.name, why)
