"""Asking many sites and waiting for them: who is there, who was asked, who is asked again, and when it is enough."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fedmerge.core.errors import FedmergeError
from fedmerge.core.text import shortened
from fedmerge.deploy.federation import DeployOptions
from fedmerge.deploy.link import Contact, Failure, Link
from fedmerge.deploy.messages import Answer, Kind, Letter, answer_from
from fedmerge.deploy.status import Board

log = logging.getLogger(__name__)

LOOK = 2.0
"""Seconds between two looks at who is connected."""
AT_ONCE = 16
"""Answers that are taken from the network at once: they are in memory together."""
_GRACE = 120.0
"""Seconds beyond the deadline that letters are kept for."""


class Clock(NamedTuple):
    """Time, given from outside.

    Attributes:
        now: Seconds, steady.
        sleep: Waits.
    """

    now: Callable[[], float]
    sleep: Callable[[float], None]


class Taken(NamedTuple):
    """What became of an answer.

    Attributes:
        counts: Whether it is one of those that are needed.
        why: Why it was not believed; empty if it was.
    """

    counts: bool
    why: str = ""


Take = Callable[[str, Letter], Taken]


class Asking(NamedTuple):
    """What sites are to be asked.

    Attributes:
        kind: Of the order.
        group: Of the messages, a round.
        letters: What each site is to get, by name; made when it is sent.
        take: Is given each answer; raises FedmergeError for one that cannot be read.
        needed: Answers that must count before the deadline can end the waiting.
    """

    kind: Kind
    group: str
    letters: Mapping[str, Callable[[], Letter]]
    take: Take
    needed: int


@dataclass
class _Open:
    """A site that has not answered yet."""

    ticket: str | None = None
    contact: Contact | None = None
    failures: int = 0
    reason: str = ""
    not_before: float = 0.0

    def is_lost_on(self, contact: Contact) -> bool:
        """Whether the site has another connection than the one its letter went to."""
        return self.contact is not None and self.contact[:2] != contact[:2]


@dataclass
class Post:
    """Letters to sites and their answers, over a link that may lose both.

    Attributes:
        link: The network.
        names: Of all sites that may take part.
        options: Deadline, patience and the like.
        hello: The letter that asks a site who it is.
        board: Where people see what is going on.
        clock: Time.
        reports: What each site said of itself, by name.
    """

    link: Link
    names: Sequence[str]
    options: DeployOptions
    hello: Callable[[str], Letter]
    board: Board
    clock: Clock
    reports: dict[str, Answer] = field(default_factory=dict)
    _claims: dict[int, str] = field(default_factory=dict)
    _refused: set[tuple[int, str]] = field(default_factory=set)
    _hellos: dict[str, Contact] = field(default_factory=dict)
    _greeted: set[tuple[int, str]] = field(default_factory=set)
    _present: dict[str, Contact] = field(default_factory=dict)
    _looked: float = -LOOK

    # ------------------------------------------------------------ who is there

    def present(self) -> Mapping[str, Contact]:
        """Sites that are connected and known by name, as seen a moment ago."""
        now = self.clock.now()
        if now - self._looked >= LOOK:
            self._looked = now
            self._look()
        return self._present

    def _look(self) -> None:
        contacts = self.link.contacts()
        for contact in contacts:
            self._greet(contact)
        self._hear()
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
        return name if name in self.names else None

    def _greet(self, contact: Contact) -> None:
        """Asks a connection once who it is, unless all that is known already."""
        known = contact.name is not None and contact.name in self.reports
        if known or contact[:2] in self._greeted or contact[:2] in self._refused:
            return
        if contact.name is not None and contact.name not in self.names:
            self._refuse(contact, f"its key belongs to {contact.name!r}, which is no site of this federation")
            return
        self._greeted.add(contact[:2])
        letter = self.hello(contact.name or "")
        ticket = self.link.push(contact, "hello", letter, group="hello", seconds=self.options.deadline + _GRACE)
        if ticket is None:
            self._greeted.discard(contact[:2])
        else:
            self._hellos[ticket] = contact

    def _hear(self) -> None:
        for ticket, found in self._pulled(list(self._hellos)):
            contact = self._hellos.pop(ticket)
            if isinstance(found, Failure):
                log.warning("site %s: %s", contact.name or contact.address, found.reason)
                self.board.told(contact.name, found.reason)
                self._greeted.discard(contact[:2])
                continue
            self._introduce(contact, found)

    def _introduce(self, contact: Contact, letter: Letter) -> None:
        try:
            answer = answer_from(letter.text)
        except FedmergeError as error:
            self._refuse(contact, str(error))
            return
        if contact.name is not None and answer.site != contact.name:
            self._refuse(contact, f"its key belongs to {contact.name!r}, but it says that it is {answer.site!r}")
        elif answer.site not in self.names:
            self._refuse(contact, f"it says that it is {answer.site!r}, which is no site of this federation")
        else:
            self._claims[contact.address] = answer.site
            self.reports[answer.site] = answer
            self.board.told(answer.site, answer.note)

    def _refuse(self, contact: Contact, why: str) -> None:
        self._refused.add(contact[:2])
        log.warning("a connection is not taken in: %s", why)
        self.board.refused(contact.name, why)

    def _pulled(self, tickets: Sequence[str]) -> Iterator[tuple[str, Letter | Failure]]:
        for start in range(0, len(tickets), AT_ONCE):
            yield from self.link.pull(tickets[start : start + AT_ONCE])

    def wait_for_reports(self, number: int) -> None:
        """Waits until so many sites have said what they have.

        Raises:
            FedmergeError: if they do not come within the patience.
        """
        give_up = self.clock.now() + self.options.patience
        told = -1
        while len(self.reports) < number:
            here = self.present()
            if len(self.reports) != told:
                told = len(self.reports)
                log.info("%d of %d sites have reported, %d are connected", told, number, len(here))
            self.board.phase(f"waiting for sites: {len(self.reports)} of {number} have reported")
            if len(self.reports) < number:
                self._pause(give_up, f"{len(self.reports)} of {number} sites have reported")

    def _pause(self, give_up: float, where: str) -> None:
        if self.clock.now() >= give_up:
            raise FedmergeError(
                f"{where} within {self.options.patience:g} s (deploy.patience); see `fedmerge deploy status` for what "
                "each site said, mend it and run again: the run goes on from here"
            )
        self.clock.sleep(self.options.poll)

    # ------------------------------------------------------------ asking

    def ask(self, asking: Asking) -> dict[str, str]:
        """Asks sites and hands in their answers, until all have answered or it is enough.

        A site that is not there is asked when it comes; one whose connection or program is new since it was asked, is
        asked again: what it answers is the same. One whose program fails is asked `attempts` times.

        Returns:
            Why each site that has no answer that counts has none, by name.

        Raises:
            FedmergeError: if fewer than needed answer within the patience.
        """
        began = self.clock.now()
        waiting = {name: _Open() for name in asking.letters}
        missing: dict[str, str] = {}
        counted = 0
        while waiting:
            self._send(asking, waiting)
            answered = self._take(asking, waiting, missing)
            counted += answered
            if not waiting:
                break
            late = self.clock.now() - began >= self.options.deadline
            if late and counted >= asking.needed:
                break
            self.board.phase(f"{asking.group}: {counted} of {len(asking.letters)} sites have answered")
            if not answered:
                where = f"{asking.group}: {counted} of {asking.needed} answers that are needed came"
                self._pause(began + self.options.patience, where)
        missing.update({name: open_.reason or "no answer by the deadline" for name, open_ in waiting.items()})
        if counted < asking.needed:
            raise FedmergeError(f"{asking.group}: {counted} of {asking.needed} needed answers came: {_told(missing)}")
        return missing

    def _send(self, asking: Asking, waiting: Mapping[str, _Open]) -> None:
        here, now = self.present(), self.clock.now()
        for name, site in waiting.items():
            contact = here.get(name)
            if contact is None or now < site.not_before:
                continue
            if site.ticket is None or site.is_lost_on(contact):
                seconds = self.options.deadline + _GRACE
                site.ticket = self.link.push(
                    contact, asking.kind, asking.letters[name](), group=asking.group, seconds=seconds
                )
                site.contact = contact
                self.board.asked(name, asking.group)

    def _take(self, asking: Asking, waiting: dict[str, _Open], missing: dict[str, str]) -> int:
        """Hands in what has come; the number of answers that count."""
        owners = {site.ticket: name for name, site in waiting.items() if site.ticket is not None}
        counted = 0
        for ticket, found in self._pulled(list(owners)):
            name = owners[ticket]
            if isinstance(found, Failure):
                self._failed(name, waiting, found, missing)
                continue
            del waiting[name]
            taken = _taken(asking, name, found)
            counted += taken.counts
            if taken.why:
                missing[name] = taken.why
            else:
                self.board.answered(name, asking.group)
        return counted

    def _failed(self, name: str, waiting: dict[str, _Open], failure: Failure, missing: dict[str, str]) -> None:
        site = waiting[name]
        site.ticket, site.reason = None, failure.reason
        site.not_before = self.clock.now() + LOOK
        log.warning("site %s: %s", name, shortened(failure.reason, 1000))
        self.board.told(name, failure.reason)
        if failure.lost:
            return
        site.failures += 1
        if site.failures >= self.options.attempts:
            missing[name] = failure.reason
            del waiting[name]


def _taken(asking: Asking, name: str, letter: Letter) -> Taken:
    try:
        return asking.take(name, letter)
    except FedmergeError as error:
        return Taken(False, str(error))


def _told(missing: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {shortened(why, 200)}" for name, why in sorted(missing.items()))
