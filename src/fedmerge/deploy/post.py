"""Asking many sites and waiting for them: who was asked, who is asked again, and when it is enough."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fedmerge.core.errors import FedmergeError
from fedmerge.core.text import shortened
from fedmerge.deploy.link import Contact, Failure
from fedmerge.deploy.messages import Kind, Letter
from fedmerge.deploy.roll import LOOK, Roll, pulled, said

log = logging.getLogger(__name__)

GRACE = 120.0
"""Seconds beyond the time that is waited for an answer in which the network still keeps it."""
REST = 60.0
"""Seconds before sites that have failed too often are asked once more, while too few others have answered."""


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
        letters: What each site is to get, by name; made when it is sent, from the number of times that its program has
            failed at it.
        take: Is given each answer; raises FedmergeError for one that cannot be read.
        needed: Answers that must count before the waiting can end.
        num_bytes: That an answer has, about.
    """

    kind: Kind
    group: str
    letters: Mapping[str, Callable[[int], Letter]]
    take: Take
    needed: int
    num_bytes: int = 0


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
class _Tally:
    """Where the asking stands.

    Attributes:
        waiting: Sites that may still answer.
        tired: Those whose program has failed as often as it may.
        missing: Why others have no answer that counts.
        counted: Answers that count.
        began: When the asking began.
        moved: When something last came from a site, or one was there that may still answer.
    """

    waiting: dict[str, _Open]
    began: float
    moved: float
    tired: dict[str, _Open] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    counted: int = 0


@dataclass
class Post:
    """Letters to sites and their answers, over a link that may lose both.

    Attributes:
        roll: Who is there.
    """

    roll: Roll

    def wait_for_reports(self, number: int) -> None:
        """Waits until so many sites have said what they have.

        Raises:
            FedmergeError: if they do not come within the patience.
        """
        roll = self.roll
        began, told = roll.clock.now(), -1
        while len(roll.reports) < number:
            here = roll.present()
            if len(roll.reports) != told:
                told = len(roll.reports)
                log.info("%d of %d sites have reported, %d are connected", told, number, len(here))
            roll.board.phase(f"waiting for sites: {len(roll.reports)} of {number} have reported")
            if len(roll.reports) < number:
                self._pause(began, f"{len(roll.reports)} of {number} sites have reported")

    def _pause(self, began: float, where: str) -> None:
        options = self.roll.options
        if self.roll.clock.now() - began >= options.patience:
            raise FedmergeError(
                f"{where} within {options.patience:g} s (deploy.patience); see `fedmerge deploy status` for what "
                "each site said, mend it and run again: the run goes on from here"
            )
        self.roll.clock.sleep(options.poll)

    def ask(self, asking: Asking) -> dict[str, str]:
        """Asks sites and hands in their answers, until all have answered or it is enough.

        A site that is not there is asked when it comes; one whose connection or program is new since it was asked, is
        asked again: what it answers is the same. One whose program fails is asked `attempts` times, and again after a
        rest while too few others have answered. When enough have, those that are not connected are waited for
        `absent` seconds, those that are until the deadline.

        Returns:
            Why each site that has no answer that counts has none, by name.

        Raises:
            FedmergeError: if fewer than needed answer within the patience.
        """
        now = self.roll.clock.now()
        tally = _Tally({name: _Open() for name in asking.letters}, now, now)
        while tally.waiting:
            self._send(asking, tally)
            before = tally.counted
            self._take(asking, tally)
            if self._is_enough(asking, tally):
                break
            self.roll.board.phase(f"{asking.group}: {tally.counted} of {len(asking.letters)} sites have answered")
            if tally.counted == before and tally.waiting:
                where = f"{asking.group}: {tally.counted} of {asking.needed} answers that are needed came"
                self._pause(tally.began, where)
            self._rested(asking, tally)
        late = {name: site.reason or "no answer in time" for name, site in (tally.waiting | tally.tired).items()}
        missing = {**tally.missing, **late}
        if tally.counted < asking.needed:
            raise FedmergeError(
                f"{asking.group}: {tally.counted} of {asking.needed} answers that are needed came, and no more can: "
                f"{_told(missing)}"
            )
        return missing

    def _is_enough(self, asking: Asking, tally: _Tally) -> bool:
        """Whether a round may close before all have answered."""
        if tally.counted < asking.needed:
            return False
        now, options = self.roll.clock.now(), self.roll.options
        if tally.waiting.keys() & self.roll.present().keys():
            tally.moved = now
        return now - tally.began >= options.deadline or now - tally.moved >= options.absent

    def _rested(self, asking: Asking, tally: _Tally) -> None:
        """Sites that have failed are asked once more after a while, if the others are too few."""
        if tally.waiting or tally.counted >= asking.needed:
            return
        for site in tally.tired.values():
            site.not_before, site.failures = self.roll.clock.now() + REST, self.roll.options.attempts - 1
        tally.waiting, tally.tired = tally.tired, {}

    def _send(self, asking: Asking, tally: _Tally) -> None:
        roll = self.roll
        here, now = roll.present(), roll.clock.now()
        seconds = max(roll.options.deadline, roll.options.patience if asking.needed else 0.0) + GRACE
        for name, site in tally.waiting.items():
            contact = here.get(name)
            if contact is None or now < site.not_before:
                continue
            if site.ticket is None or site.is_lost_on(contact):
                letter = asking.letters[name](site.failures)
                site.ticket = roll.link.push(contact, asking.kind, letter, group=asking.group, seconds=seconds)
                site.contact = contact
                roll.board.asked(name, asking.group)

    def _take(self, asking: Asking, tally: _Tally) -> None:
        """Hands in what has come."""
        owners = {site.ticket: name for name, site in tally.waiting.items() if site.ticket is not None}
        for ticket, found in pulled(self.roll.link, list(owners), asking.num_bytes):
            name, tally.moved = owners[ticket], self.roll.clock.now()
            if isinstance(found, Failure):
                self._failed(name, found, tally)
                continue
            del tally.waiting[name]
            taken = _taken(asking, name, found)
            tally.counted += taken.counts
            if taken.why:
                tally.missing[name] = taken.why
            else:
                self.roll.board.answered(name, asking.group)

    def _failed(self, name: str, failure: Failure, tally: _Tally) -> None:
        """A site is asked again after a pause, which grows where its own program fails."""
        site = tally.waiting[name]
        site.ticket, site.reason = None, failure.reason
        site.failures += not failure.lost
        site.not_before = self.roll.clock.now() + LOOK * 5.0 ** min(site.failures, 3)
        log.warning("site %s: %s", name, said(failure.reason))
        self.roll.board.told(name, failure.reason)
        if site.failures >= self.roll.options.attempts:
            tally.tired[name] = tally.waiting.pop(name)


def _taken(asking: Asking, name: str, letter: Letter) -> Taken:
    try:
        return asking.take(name, letter)
    except FedmergeError as error:
        return Taken(False, str(error))


def _told(missing: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {shortened(why, 200)}" for name, why in sorted(missing.items()))
