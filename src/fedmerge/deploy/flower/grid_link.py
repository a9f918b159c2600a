"""A `Link` over Flower's Grid."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence

from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedmerge.core.errors import FedmergeError
from fedmerge.core.text import shortened
from fedmerge.deploy.flower.wire import MOST_REASON, Refused, letter_from, records_of
from fedmerge.deploy.link import Contact, Failure
from fedmerge.deploy.messages import Kind, Letter

log = logging.getLogger(__name__)

_TYPES: dict[Kind, str] = {"hello": MessageType.QUERY, "round": MessageType.TRAIN, "final": MessageType.EVALUATE}
_LOST = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)
_WAIT = 2.0
"""Seconds that one look at all replies takes at most."""
_FORGOTTEN = 600.0
"""Seconds after which a reply that has come and that nobody asks for is dropped."""


class GridLink:
    """Sites as the nodes of a Flower federation.

    Args:
        grid: Of the ServerApp's run.
        keys: Each site by the bytes of its registered public key; empty where nodes have none.
    """

    def __init__(self, grid: Grid, keys: Mapping[bytes, str]) -> None:
        self._grid, self._keys = grid, keys
        self._looks: dict[str, _Look] = {}

    def contacts(self) -> Sequence[Contact]:
        """Nodes that are online."""
        return [
            Contact(node.node_id, node.last_activated_at, self._keys.get(node.public_key) if self._keys else None)
            for node in self._grid.get_nodes()
            if not self._keys or node.public_key in self._keys
        ]

    def push(self, contact: Contact, kind: Kind, letter: Letter, *, group: str, seconds: float) -> str | None:
        """One message; Flower takes lists only, and several at once may be too large for its server."""
        message = Message(
            records_of(letter),
            dst_node_id=contact.address,
            message_type=_TYPES[kind],
            ttl=seconds,
            group_id=group,
        )
        tickets = list(self._grid.push_messages([message]))
        return tickets[0] if tickets and tickets[0] else None

    def pull(self, tickets: Sequence[str]) -> Sequence[tuple[str, Letter | Failure]]:
        """Replies that have come whole; one that is still on its way is left on it, and holds up no other."""
        now = time.monotonic()
        self._looks = {
            ticket: look
            for ticket, look in self._looks.items()
            if ticket in tickets or look.ended is None or now - look.ended < _FORGOTTEN
        }
        for ticket in tickets:
            if ticket not in self._looks:
                self._looks[ticket] = _Look(self._grid, ticket)
        for ticket in tickets:
            self._looks[ticket].join(max(0.0, now + _WAIT - time.monotonic()))
        through = [ticket for ticket in tickets if not self._looks[ticket].is_alive()]
        looks = {ticket: self._looks.pop(ticket) for ticket in through}
        return [(ticket, _answer_of(message)) for ticket, look in looks.items() for message in look.found()]


class _Look(threading.Thread):
    """A look for one reply. Flower's call returns only when all of the reply is there.

    A site that dies while it sends, or takes its time, can put that off for minutes, and one that means to for hours.
    """

    def __init__(self, grid: Grid, ticket: str) -> None:
        super().__init__(name="fedmerge-look", daemon=True)
        self.ended: float | None = None
        self._grid, self._ticket = grid, ticket
        self._messages: list[Message] = []
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Looks."""
        try:
            self._messages = list(self._grid.pull_messages([self._ticket]))
        except Exception as error:  # raised again where the reply is asked for
            self._error = error
        finally:
            self.ended = time.monotonic()

    def found(self) -> list[Message]:
        """The reply, if it has come."""
        if self._error is not None:
            raise self._error
        return [message for message in self._messages if message.metadata.reply_to_message_id == self._ticket]


def _answer_of(message: Message) -> Letter | Failure:
    if message.has_error():
        error = message.error
        reason = shortened(error.reason or "no reason given", MOST_REASON)
        return Failure(f"{reason} (Flower's code {error.code})", error.code in _LOST)
    try:
        found = letter_from(message.content)
    except FedmergeError as error:
        return Failure(str(error), lost=False)
    return Failure(found.reason, lost=found.busy) if isinstance(found, Refused) else found
