"""What the server needs of a network: who is there, give a site a letter, and take what has come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from fedmerge.deploy.messages import Kind, Letter


class Contact(NamedTuple):
    """A site's program that is connected now.

    Attributes:
        address: Number by which it can be reached; may be another one after a restart.
        since: When it was connected; letters given to an earlier connection may be lost.
        name: The site, where a registered key proves it; None where it can only say so itself.
    """

    address: int
    since: str
    name: str | None


class Failure(NamedTuple):
    """Why a letter has no answer.

    Attributes:
        reason: What the network or the site's program said.
        lost: Whether the letter or the site was lost on the way, so that asking again may help at once; otherwise the
            site's program itself failed.
    """

    reason: str
    lost: bool


@runtime_checkable
class Link(Protocol):
    """A network of sites."""

    def contacts(self) -> Sequence[Contact]:
        """Sites that are connected now."""
        ...

    def push(self, contact: Contact, kind: Kind, letter: Letter, *, group: str, seconds: float) -> str | None:
        """Gives a letter to a site; None if it could not be given.

        Args:
            contact: The site.
            kind: Of the order.
            letter: What it is to get.
            group: Of messages that belong together, a round.
            seconds: How long letter and answer are kept for the other side.

        Returns:
            A ticket to ask for the answer with.
        """
        ...

    def pull(self, tickets: Sequence[str]) -> Sequence[tuple[str, Letter | Failure]]:
        """Answers that have come, each with its ticket; each is given once."""
        ...
