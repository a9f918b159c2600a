"""What a user's own rows are to teach: numbers or texts on one side, classes, tags or completions on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError, unknown_name
from fedmerge.data.encoding import Encoder, Kind, encoded, tag_names
from fedmerge.data.federated import FederatedData
from fedmerge.data.pool import Ints
from fedmerge.data.table import Table, encode_labels


@dataclass(frozen=True)
class Learned:
    """Inputs and targets, table by table.

    Attributes:
        inputs: As they are, or tokens [n, L].
        targets: [n] classes, or [n, L].
        class_names: Of classes or tags; of completions one name that stands for all.
        kind: What the targets are.
        are_tokens: Whether inputs are tokens.
    """

    inputs: list[NDArray[Any]]
    targets: list[Ints]
    class_names: tuple[str, ...]
    kind: Kind
    are_tokens: bool


def learned_from(tables: Sequence[Table], encoder: Encoder | None, class_names: Sequence[str] | None) -> Learned:
    """Inputs and targets of all tables; texts go through the encoder.

    Args:
        tables: All of numbers or all of texts.
        encoder: Of the language model that is to read texts.
        class_names: Given by the user: the accepted classes or tags, in the order of their numbers.

    Raises:
        DataError: naming the file and line, or client and row, of the first that cannot be used.
    """
    are_texts = [table.inputs.dtype.kind == "U" for table in tables]
    if not any(are_texts):
        names, targets = encode_labels(tables, class_names)
        return Learned([table.inputs for table in tables], targets, names, "classes", are_tokens=False)
    if encoder is None:
        raise DataError(
            f"{tables[0].origin} holds texts, which this network cannot read; "
            "use a language model: model='hf:FOLDER-OR-HUB-NAME' (model.name=hf model.path=...)"
        )
    if encoder.kind == "classes":
        names, targets = encode_labels(tables, class_names)
        made = [encoded(table.inputs, None, encoder, (), table.at) for table in tables]
        return Learned([each.inputs for each in made], targets, names, "classes", are_tokens=True)
    answers = [table.labels.astype(np.str_) for table in tables]
    tags = tag_names(np.concatenate(answers), encoder, tables[0].origin)
    if encoder.kind == "tags" and class_names:
        _refuse_other_tags(tables, class_names)
        tags = tuple(class_names)
    made = [encoded(t.inputs, own, encoder, tags, t.at) for t, own in zip(tables, answers, strict=True)]
    targets = [each.targets for each in made if each.targets is not None]
    return Learned([each.inputs for each in made], targets, tags or ("text",), encoder.kind, are_tokens=True)


def _refuse_other_tags(tables: Sequence[Table], known: Sequence[str]) -> None:
    """Raises for the first row with a tag that is not among those named."""
    for table in tables:
        for row, answer in enumerate(table.labels):
            other = next((tag for tag in str(answer).split() if tag not in known), None)
            if other is not None:
                raise DataError(f"{table.at(row)}: {unknown_name('tag', other, known)}")


def tasks_by_label(data: FederatedData) -> FederatedData:
    """The same clients, where those that share no label, not even through others, have different tasks.

    A task is called after its first two classes. Where everybody is connected there is one task and nothing changes.
    """
    if data.kind != "classes":
        return data
    own = [set(np.flatnonzero(row).tolist()) for row in _all_counts(data)]
    parts = _joined(own)
    if len(parts) < 2:
        return data
    names = [" / ".join(data.class_names[k] for k in sorted(part)[:2]) for part in parts]
    of_class = {k: name for part, name in zip(parts, names, strict=True) for k in part}
    class_tasks = tuple(of_class.get(k, "unused") for k in range(data.num_classes))
    tasks = tuple(of_class[min(classes)] for classes in own)
    groups = tuple(names.index(task) for task in tasks)
    return replace(data, class_tasks=class_tasks, tasks=tasks, groups=groups)


def _all_counts(data: FederatedData) -> list[Ints]:
    """Examples of each class, all splits of a client together."""
    splits = [(client.train, client.validation, client.test) for client in data.clients]
    return [
        sum((np.bincount(part.targets.numpy(), minlength=data.num_classes) for part in parts), np.zeros(1, np.int64))
        for parts in splits
    ]


def _joined(sets: Sequence[set[int]]) -> list[set[int]]:
    """Sets that overlap made one, ordered by their smallest number.

    >>> _joined([{0, 1}, {2}, {1, 3}])
    [{0, 1, 3}, {2}]
    """
    parts: list[set[int]] = []
    for own in sets:
        touching = [part for part in parts if part & own]
        parts = [part for part in parts if not part & own] + [own.union(*touching)]
    return sorted(parts, key=min)
