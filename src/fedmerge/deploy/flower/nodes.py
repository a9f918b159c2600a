"""Which of Flower's nodes is which client. A node's number is no identity: it may be another after a restart."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.files import write_atomically
from fedmerge.core.strict_json import parse_json_table, read_bounded
from fedmerge.core.text import brief

log = logging.getLogger(__name__)

KEY = "client-key"
"""Names a client in its node's configuration and in its answer."""
FILE = "clients.json"
MOST_KEY = 200
"""Letters of a key."""
_LOOK = 1.0
"""Seconds between two looks at who is there."""


def tell_client_key(message: Message, context: Context) -> Message:
    """A query function for your own ClientApp, ``app.query()(tell_client_key)``: says who this node is.

    That is ``client-key`` of the node's configuration (``--node-config 'client-key="clinic-a"'``); in a simulation its
    place, ``partition-id``.
    """
    own = context.node_config
    key = own.get(KEY, own.get("partition-id"))
    return Message(RecordDict({"config": ConfigRecord({} if key is None else {KEY: str(key)})}), reply_to=message)


class Nodes:
    """The clients of a federation and the nodes that they are reached at.

    A client's index follows from its key: keys are given indices in their order when they are first seen, and keep
    them, also after a restart if there is a folder.

    Args:
        num_clients: N.
        folder: Where the keys are kept; None: nowhere.
        query_seconds: To wait for a node that is asked for its key.
    """

    def __init__(self, num_clients: int, folder: Path | None, query_seconds: float) -> None:
        self._num_clients, self._seconds = num_clients, query_seconds
        self._path = None if folder is None else folder / FILE
        self._keys: dict[int, str] = {}
        self._index: dict[str, int] = {} if self._path is None else _read(self._path, num_clients)
        self._refused: set[str] = set()

    @property
    def keys(self) -> Mapping[int, str]:
        """Each client's key by its index."""
        return {index: key for key, index in self._index.items()}

    def wait(self, grid: Grid, number: int, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Waits until as many clients are connected.

        Raises:
            FedmergeError: if they are not there in time.
        """
        left = seconds
        while len(here := set(self._names(grid).values())) < number:
            if left <= 0:
                raise FedmergeError(
                    f"{len(here)} of {number} clients are connected after {seconds:g} s (patience); start their "
                    "SuperNodes, or ask for fewer (min_nodes)"
                )
            log.info("%d of %d clients are connected", len(here), number)
            sleep(min(_LOOK, left))
            left -= _LOOK

    def present(self, grid: Grid) -> dict[int, int]:
        """Node of every client that is connected, by the client's index, ascending."""
        names = self._names(grid)
        self._admit(names.values())
        found = {self._index[key]: node for node, key in names.items() if key in self._index}
        return dict(sorted(found.items()))

    def _names(self, grid: Grid) -> dict[int, str]:
        """Key of every connected node, the latest connections last."""
        nodes = sorted(grid.get_nodes(), key=lambda node: (node.last_activated_at, node.node_id))
        unknown = [node.node_id for node in nodes if node.node_id not in self._keys]
        if unknown:
            self._ask(grid, unknown)
        return {node.node_id: self._keys[node.node_id] for node in nodes if node.node_id in self._keys}

    def _ask(self, grid: Grid, nodes: list[int]) -> None:
        """Asks nodes for their keys; those that are silent are asked again at the next look."""
        messages = [
            Message(RecordDict({"config": ConfigRecord({"ask": KEY})}), node, MessageType.QUERY, group_id="client-key")
            for node in nodes
        ]
        for reply in grid.send_and_receive(messages, timeout=self._seconds):
            node = reply.metadata.src_node_id
            if node not in nodes:
                continue
            key = None if reply.has_error() else _key_in(reply.content)
            if key is None:
                key = f"node {node}"
                log.warning(
                    "%s tells no %r: what is learned of this client is lost if it restarts; give its node the "
                    'configuration %s="name" and your app a query function (fedmerge\'s tell_client_key)',
                    key,
                    KEY,
                    KEY,
                )
            self._keys[node] = key

    def _admit(self, keys: Iterable[str]) -> None:
        """Gives new keys the next indices, in the order of the keys."""
        new = sorted(set(keys) - self._index.keys() - self._refused, key=_natural)
        taken = dict(self._index)
        for key in new:
            if len(taken) < self._num_clients:
                taken[key] = len(taken)
            else:
                self._refused.add(key)
                log.warning("%s is not asked: there are %d clients already (num_clients)", key, self._num_clients)
        if len(taken) > len(self._index):
            self._index = taken
            if self._path is not None:
                write_atomically(self._path, json.dumps({"clients": taken}, indent=1) + "\n", private=True)


def _key_in(content: RecordDict) -> str | None:
    """The key that an answer holds, a text or a whole number."""
    records: list[ConfigRecord | MetricRecord] = [*content.config_records.values(), *content.metric_records.values()]
    for record in records:
        found = record.get(KEY)
        if isinstance(found, int) and not isinstance(found, bool):
            return str(found)
        if isinstance(found, str) and 0 < len(found) <= MOST_KEY and found.isprintable():
            return found
    return None


def _natural(key: str) -> tuple[bool, int, str]:
    """Numbers before names, 2 before 10."""
    number = key.isascii() and key.isdigit()
    return not number, int(key) if number else 0, key


def _read(path: Path, num_clients: int) -> dict[str, int]:
    if not path.is_file():
        return {}
    try:
        found = parse_json_table(read_bounded(path)).get("clients")
    except ValueError as error:
        raise FedmergeError(f"{path} is damaged: {error}; restore it, or begin in another folder") from error
    if not isinstance(found, dict) or sorted(map(repr, found.values())) != sorted(map(repr, range(len(found)))):
        raise FedmergeError(f"{path} is damaged: got {brief(found)} for its clients; expected an index for each key")
    if len(found) > num_clients:
        raise UsageError(f"num_clients: got {num_clients}; {path} knows {len(found)} clients")
    return {str(key): int(index) for key, index in found.items()}
