"""A federation of Flower's in this process: nodes answer at once, and replies can be tampered with on their way."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Answer = Callable[[Message, Context], Message]
Tamper = Callable[[Message], "Iterable[Message]"]
RUN = 77


@contextmanager
def inside_a_run() -> Iterator[None]:
    """Within the block messages can be built, as in a process that Flower has started for a run."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@dataclass
class HereGrid(Grid):
    """Nodes in this process.

    Attributes:
        answer: What a node's app does.
        configs: Each node's configuration, by its number.
        tamper: What arrives of a reply.
        silent: Nodes that answer nothing.
        sent: Every message, as it was sent.
        since: When a node was connected, where it matters.
    """

    answer: Answer
    configs: dict[int, dict[str, Any]]
    tamper: Tamper = lambda message: [message]
    silent: set[int] = field(default_factory=set)
    sent: list[Message] = field(default_factory=list)
    since: Mapping[int, str] = field(default_factory=dict)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.configs)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, last_activated_at=self.since.get(node, "")) for node in self.configs]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        assert isinstance(messages, list), "a generator works in simulation only"
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            self.sent.append(message)
            node = message.metadata.dst_node_id
            if node not in self.silent:
                replies += self.tamper(self._replied(message, node))
        return replies[::-1]  # who answers first does not matter

    def _replied(self, message: Message, node: int) -> Message:
        context = Context(run_id=RUN, node_id=node, node_config=self.configs[node], state=RecordDict(), run_config={})
        try:
            return self.answer(message, context)
        except Exception as error:
            return Message(Error(2, str(error)), reply_to=message)
