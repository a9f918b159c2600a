"""From a pool and a partition to clients with examples of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedmerge.core.errors import DataError
from fedmerge.data.encoding import Encoder, encode_pool
from fedmerge.data.federated import ClientData, Examples, FederatedData, check_federation
from fedmerge.data.form import input_form, token_form
from fedmerge.data.partition import SPLITS, ClientPart, Partition, Split, check_sides
from fedmerge.data.pool import Ints, Pool
from fedmerge.data.transform import Scale, scale_of, turn


def deal(pool: Pool, partition: Partition, encoder: Encoder | None = None) -> FederatedData:
    """Every client's examples, turned, inverted, relabelled and normalised as the partition says.

    uint8 images become float32 ``(x / 255 - mean) / std`` with one mean and standard deviation per channel over the
    rows that any client trains on; float inputs stay as they are; texts become the encoder's tokens.

    Args:
        pool: The pool that the partition was made for.
        partition: Who gets which row.
        encoder: Of the language model that is to read a pool of texts.

    Raises:
        DataError: if it is another pool, an item is on two sides of a split, or the clients cannot be trained on.
    """
    if partition.pool_sha256 != pool.sha256():
        raise DataError(
            f"the partition was made for {partition.pool_name!r} with sha256 {partition.pool_sha256[:12]}…; "
            f"{pool.name!r} has {pool.sha256()[:12]}…. Give the same source with the same options, "
            "or make a new partition"
        )
    if pool.item is not None:
        check_sides(partition, np.unique(pool.item, return_inverse=True)[1], "item")
    groups = tuple(client.group for client in partition.clients if client.group is not None)
    shared: dict[str, Any] = {
        "groups": groups if len(groups) == len(partition.clients) else None,
        "partition": partition,
        "source": f"{pool.name}, {partition.kind} over {len(partition.clients)} clients",
        "class_tasks": pool.class_tasks if encoder is None or encoder.kind != "tags" else (),
        "tasks": _tasks(pool, partition),
    }
    data = _of_texts(pool, partition, encoder, shared) if pool.is_text else _of_numbers(pool, partition, shared)
    check_federation(data)
    return data


def _of_numbers(pool: Pool, partition: Partition, shared: dict[str, Any]) -> FederatedData:
    trained = np.unique(np.concatenate([client.train for client in partition.clients]))
    scale = scale_of(pool.inputs[trained], pool.name)
    return FederatedData(
        clients=tuple(_deal_client(pool, client, scale) for client in partition.clients),
        class_names=pool.class_names,
        form=input_form(pool.inputs, scale),
        **shared,
    )


def _of_texts(pool: Pool, partition: Partition, encoder: Encoder | None, shared: dict[str, Any]) -> FederatedData:
    turned = next((client.name for client in partition.clients if client.rotation or client.invert), None)
    if turned is not None:
        raise DataError(f"client {turned!r} turns or inverts its inputs, which texts cannot be; take another partition")
    texts = encode_pool(pool, encoder)
    relabelled = next((client.name for client in partition.clients if client.relabel is not None), None)
    if relabelled is not None and texts.targets is not None:
        raise DataError(
            f"client {relabelled!r} calls its classes by other names, but the model's task is not to tell classes; "
            "take another partition"
        )
    kind = encoder.kind if encoder is not None else "classes"
    counts = [np.bincount(pool.targets[client.train], minlength=len(pool.class_names)) for client in partition.clients]

    def examples(client: ClientPart, split: Split) -> Examples:
        rows = client.split(split)
        targets = _labels(pool, client)[pool.targets[rows]] if texts.targets is None else texts.targets[rows]
        return Examples(torch.from_numpy(texts.inputs[rows]), torch.from_numpy(targets))

    return FederatedData(
        clients=tuple(
            ClientData(client.name, *(examples(client, split) for split in SPLITS)) for client in partition.clients
        ),
        class_names=texts.tags or pool.class_names,
        form=token_form(texts.inputs.shape[1]),
        kind=kind,
        counts=tuple(tuple(row.tolist()) for row in counts) if kind == "completions" else None,
        **shared,
    )


def _tasks(pool: Pool, partition: Partition) -> tuple[str, ...] | None:
    """Each client's domain, where the pool has several and every client's rows are of one."""
    if pool.domain is None or len(pool.domain_names) < 2:
        return None
    rows = [np.concatenate([client.split(split) for split in SPLITS]) for client in partition.clients]
    domains = [np.unique(pool.domain[own]) for own in rows]
    return tuple(pool.domain_names[own[0]] for own in domains) if all(len(own) == 1 for own in domains) else None


def _deal_client(pool: Pool, client: ClientPart, scale: Scale) -> ClientData:
    labels = _labels(pool, client)

    def examples(rows: Ints) -> Examples:
        inputs = turn(torch.from_numpy(pool.inputs[rows]), client.rotation, invert=client.invert, scale=scale)
        return Examples(scale.apply(inputs), torch.from_numpy(labels[pool.targets[rows]]))

    return ClientData(client.name, *(examples(client.split(split)) for split in SPLITS))


def _labels(pool: Pool, client: ClientPart) -> Ints:
    """[K] what the client calls each class."""
    if client.relabel is not None and len(client.relabel) != len(pool.class_names):
        raise DataError(
            f"client {client.name!r} relabels {len(client.relabel)} classes; {pool.name} has {len(pool.class_names)}"
        )
    labels = np.array(client.relabel or range(len(pool.class_names)), dtype=np.int64)
    if pool.class_tasks and (np.array(pool.class_tasks)[labels] != np.array(pool.class_tasks)).any():
        raise DataError(f"client {client.name!r} calls classes of one task by names of another; take another partition")
    return labels
