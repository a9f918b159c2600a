"""A `Link` over Flower's Grid."""

from __future__ import annotations

import logging
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


class GridLink:
    """Sites as the nodes of a Flower federation.

    Args:
        grid: Of the ServerApp's run.
        keys: Each site by the bytes of its registered public key; empty where nodes have none.
    """

    def __init__(self, grid: Grid, keys: Mapping[bytes, str]) -> None:
        self._grid, self._keys = grid, keys

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
        """Replies that have come."""
        if not tickets:
            return []
        asked = set(tickets)
        found = ((message.metadata.reply_to_message_id, message) for message in self._grid.pull_messages(list(tickets)))
        return [(ticket, _answer_of(message)) for ticket, message in found if ticket in asked]


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
