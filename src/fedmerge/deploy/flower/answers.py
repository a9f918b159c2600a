"""What clients of an app that is not ours answer: tensors and metrics, nothing of them taken for granted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from fedmerge.core.errors import FedmergeError
from fedmerge.core.replies import Reply
from fedmerge.deploy.flower.arrays import tensors_of

NUM_EXAMPLES = "num-examples"
"""The metric that says how many training examples a client has, as for Flower's FedAvg."""
Metrics = dict[str, float]


@dataclass(frozen=True)
class Asked:
    """An open round: who was asked, at which node, in which of Flower's runs."""

    run: str
    clients: Mapping[int, int]


def reply_of(message: Message, asked: Asked) -> tuple[Reply, Metrics]:
    """What a client sent, as the gate takes it, and its metrics."""
    count, metrics = metrics_of(message)
    records = list(message.content.array_records.values())
    tensors: Any = f"{len(records)} array records"
    if len(records) == 1:
        try:
            tensors = tensors_of(records[0])
        except FedmergeError as error:
            tensors = str(error)
    about, number = message.metadata, message.metadata.group_id
    return (
        Reply(
            run=str(about.run_id),
            round=int(number) if number.isascii() and number.isdigit() and len(number) < 19 else number,
            client=asked.clients.get(about.src_node_id),
            num_examples=count,
            tensors=tensors,
        ),
        metrics,
    )


def metrics_of(message: Message) -> tuple[Any, Metrics]:
    """The number of examples as it was given, whole if it is, and the other single numbers of all metric records."""
    found: dict[str, Any] = {}
    for record in message.content.metric_records.values():
        found.update({name: value for name, value in record.items() if isinstance(value, (int, float))})
    count = found.pop(NUM_EXAMPLES, None)
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    return count, {name: float(value) for name, value in found.items()}


def means(metrics: Mapping[str, Metrics], weights: Mapping[str, int]) -> Metrics:
    """Means over clients, by weight, of what all of them measured."""
    common = set.intersection(*(set(own) for own in metrics.values())) if metrics else set()
    total = sum(weights[key] for key in metrics)
    return {name: sum(weights[key] * own[name] for key, own in metrics.items()) / total for name in sorted(common)}
