"""What the merging weights of a run say: groups of clients, what each model is for, and what is odd about them.

Numbers only; `fedmerge.report.explain_text` puts them into words and tables, `explain_figures` into pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import special

from fedmerge.core.errors import UsageError
from fedmerge.experiment.record import RunRecord
from fedmerge.report.classes import ClassShare, classes_of, standing_out
from fedmerge.report.kinds import known_tasks
from fedmerge.report.likeness import Likeness, likeness, nearest
from fedmerge.report.statistics import FloatArray
from fedmerge.report.study import Study, client_accuracies

Name = TypeVar("Name", int, str)  # of a true group or of a task

NAMED = 0.10  # weights below this are not named in words
MOST = 3  # models of a client, clients of a model, classes of a model that are named
COLLINEAR = 0.99  # cosine of two models' columns from which they count as one


class Weight(NamedTuple):
    """A model and its weight in 0..1."""

    model: int
    weight: float


class Group(NamedTuple):
    """Clients that share at least half of their weight.

    Attributes:
        name: A, B, … in the order of the tree.
        members: Client indices.
        models: That carry the group's mean row, heaviest first.
        true_groups: (true group, members of it), most members first; None where true groups are not known.
        accuracy: Mean test accuracy of the members; NaN without test items.
        tasks: (task, members of it) likewise; None unless there are several tasks.
    """

    name: str
    members: tuple[int, ...]
    models: tuple[Weight, ...]
    true_groups: tuple[tuple[int, int], ...] | None
    accuracy: float
    tasks: tuple[tuple[str, int], ...] | None


class ModelUse(NamedTuple):
    """Who uses one model, and for what; users count with the weight that they give it.

    Attributes:
        model: j.
        share: Of all clients' weight, 0..1: the mean of column j.
        heaviest_of: Clients whose heaviest model it is; of equally heavy models the first counts.
        clients: Up to three heaviest users, with their weights.
        classes: Classes that stand out among its users, the most over-represented first; None if not recorded
            or if there is but one class.
        true_groups: (true group, its share of the model's weight), heaviest first; None if not known.
        accuracy: Mean test accuracy of its users; NaN without test items or users.
        tasks: (task, its share of the model's weight), heaviest first; None unless there are several tasks.
    """

    model: int
    share: float
    heaviest_of: int
    clients: tuple[tuple[int, float], ...]
    classes: tuple[ClassShare, ...] | None
    true_groups: tuple[tuple[int, float], ...] | None
    accuracy: float
    tasks: tuple[tuple[str, float], ...] | None


class ClientUse(NamedTuple):
    """One client's own mixture.

    Attributes:
        client: Index.
        group: Name of its group.
        models: Up to three heaviest, those of at least a tenth; the heaviest always.
        nearest: Up to three clients that share the most weight with it, and how much.
        effective: Effective number of models.
        accuracy: On its test items; NaN without.
        gain: Accuracy less that of its Local-only model; NaN without such a run.
    """

    client: int
    group: str
    models: tuple[Weight, ...]
    nearest: tuple[tuple[int, float], ...]
    effective: float
    accuracy: float
    gain: float


@dataclass(frozen=True)
class Explanation:
    """What the merging weights of a run at its selected round say.

    Attributes:
        run: The run.
        mixing: [N, d] at the selected round.
        accuracy: [N] test accuracy there.
        local: [N] test accuracy of the Local-only models of the same seed; None without such a run.
        likeness: Order, groups and tree of the clients.
        groups: In the order of the tree.
        models: [d].
        group_of: [N] index of every client's group.
    """

    run: RunRecord
    mixing: FloatArray
    accuracy: FloatArray
    local: FloatArray | None
    likeness: Likeness
    groups: tuple[Group, ...]
    models: tuple[ModelUse, ...]
    group_of: tuple[int, ...]


def explain(run: RunRecord, local: RunRecord | None = None) -> Explanation:
    """Explains a run by its merging weights at the selected round.

    Args:
        run: Of a method with merging weights.
        local: The Local-only run on the same clients and seed, to compare accuracies with.

    Raises:
        UsageError: if the run has no merging weights.
    """
    record = run.selected()
    if record.mixing is None:
        raise UsageError(
            f"run {run.label!r} (seed {run.seed}) has no merging weights: {run.method} does not mix shared models, so "
            "there is nothing to explain; give a run of a method that does, for example fedmerge"
        )
    mixing, accuracy = np.array(record.mixing, dtype=np.float64), client_accuracies(record)
    found = likeness(mixing)
    groups = tuple(_group(index, members, mixing, accuracy, run) for index, members in enumerate(found.groups))
    models = tuple(_model_use(model, mixing, accuracy, run) for model in range(mixing.shape[1]))
    compared = None if local is None else client_accuracies(local.selected())
    places = {client: index for index, members in enumerate(found.groups) for client in members}
    group_of = tuple(places[client] for client in range(len(mixing)))
    return Explanation(run, mixing, accuracy, compared, found, groups, models, group_of)


def explained(study: Study) -> Explanation | None:
    """Explains the first seed of the reference, or of the first method that has merging weights; None without any.

    Of a method's runs the first is taken, because models of different seeds have nothing in common but their numbers.
    """
    firsts = {label: next(iter(runs.values())) for label, runs in study.runs.items()}
    merging = {label: run for label, run in firsts.items() if run.selected().mixing is not None}
    if not merging:
        return None
    run = merging.get(study.reference, next(iter(merging.values())))
    return explain(run, study.local_run(run.seed))


def group_name(index: int) -> str:
    """Letters as a spreadsheet counts columns: A to Z, then AA.

    >>> [group_name(index) for index in (0, 25, 26, 53)]
    ['A', 'Z', 'AA', 'BB']
    """
    name = ""
    while index >= 0:
        index, letter = divmod(index, 26)
        name, index = chr(ord("A") + letter) + name, index - 1
    return name


def heaviest(row: FloatArray, most: int = MOST) -> tuple[Weight, ...]:
    """Up to `most` models of at least a tenth, heaviest first; the heaviest always.

    Args:
        row: [d] weights.
        most: At least 1.
    """
    order = np.argsort(-row, kind="stable")[:most]
    return tuple(Weight(int(j), float(row[j])) for j in order if j == order[0] or row[j] >= NAMED)


def effective_models(mixing: FloatArray) -> FloatArray:
    """[N] exp of the entropy of each row: 1 for a client with one model, d for one that uses all alike.

    Args:
        mixing: [N, d].
    """
    return np.asarray(np.exp(special.entr(mixing).sum(axis=1)))


def client_use(explanation: Explanation, client: int) -> ClientUse:
    """What one client uses, and with whom."""
    mixing, local = explanation.mixing, explanation.local
    accuracy = float(explanation.accuracy[client])
    return ClientUse(
        client=client,
        group=explanation.groups[explanation.group_of[client]].name,
        models=heaviest(mixing[client]),
        nearest=nearest(mixing, client, MOST),
        effective=float(effective_models(mixing[client : client + 1])[0]),
        accuracy=accuracy,
        gain=math.nan if local is None else accuracy - float(local[client]),
    )


# What is odd


def unused_models(mixing: FloatArray) -> tuple[int, ...]:
    """Models to which no client gives 5 %, nor half of what it would if it used all alike."""
    return tuple(np.flatnonzero(mixing.max(axis=0) < min(0.05, 0.5 / mixing.shape[1])).tolist())


def near_equal_models(mixing: FloatArray) -> tuple[tuple[int, ...], ...]:
    """Sets of used models whose columns are nearly proportional: the same clients use them in the same ratio.

    Proportional columns could be replaced by one model, their sum in that ratio, without changing any client's own.
    With a single client every two columns are proportional, which says nothing: then there are none.

    Args:
        mixing: [N, d].
    """
    if len(mixing) < 2:
        return ()
    used = [model for model in range(mixing.shape[1]) if model not in unused_models(mixing)]
    columns = mixing[:, used] / np.linalg.norm(mixing[:, used], axis=0)
    close = columns.T @ columns >= COLLINEAR
    sets: list[list[int]] = []
    for index, model in enumerate(used):
        home = next((known for known in sets if close[index, used.index(known[0])]), None)
        if home is None:
            sets.append([model])
        else:
            home.append(model)
    return tuple(tuple(members) for members in sets if len(members) > 1)


def undecided_clients(mixing: FloatArray) -> tuple[int, ...]:
    """Clients whose every weight is within a quarter of 1 / d; none if there is one model.

    Args:
        mixing: [N, d].
    """
    models = mixing.shape[1]
    if models < 2:
        return ()
    return tuple(np.flatnonzero((np.abs(mixing * models - 1) <= 0.25 + 1e-9).all(axis=1)).tolist())


# Parts


def _mean(values: FloatArray, weights: FloatArray) -> float:
    known = ~np.isnan(values) & (weights > 0)
    return float(np.average(values[known], weights=weights[known])) if known.any() else math.nan


def _group(index: int, members: tuple[int, ...], mixing: FloatArray, accuracy: FloatArray, run: RunRecord) -> Group:
    chosen, tasks = list(members), known_tasks(run)
    return Group(
        name=group_name(index),
        members=members,
        models=heaviest(mixing[chosen].mean(axis=0)),
        true_groups=None if run.groups is None else _counted([run.groups[client] for client in members]),
        accuracy=_mean(accuracy[chosen], np.ones(len(chosen))),
        tasks=None if tasks is None else _counted([tasks[client] for client in members]),
    )


def _counted(names: Sequence[Name]) -> tuple[tuple[Name, int], ...]:
    """Each name and how often it occurs, the commonest first."""
    return tuple(sorted(((name, names.count(name)) for name in set(names)), key=lambda pair: (-pair[1], pair[0])))


def _model_use(model: int, mixing: FloatArray, accuracy: FloatArray, run: RunRecord) -> ModelUse:
    weights, tasks = mixing[:, model], known_tasks(run)
    users = [int(i) for i in np.argsort(-weights, kind="stable")[:MOST] if weights[i] >= NAMED]
    classes = classes_of(run)
    return ModelUse(
        model=model,
        share=float(weights.mean()),
        heaviest_of=int((mixing.argmax(axis=1) == model).sum()),
        clients=tuple((client, float(weights[client])) for client in users),
        classes=None if classes is None else standing_out(weights, classes),
        true_groups=None if run.groups is None else _shared_out(weights, run.groups),
        accuracy=_mean(accuracy, weights),
        tasks=None if tasks is None else _shared_out(weights, tasks),
    )


def _shared_out(weights: FloatArray, names: Sequence[Name]) -> tuple[tuple[Name, float], ...]:
    """(name, its clients' share) of a model's weight, heaviest first; empty for a model without any."""
    total = float(weights.sum())
    if total <= 0:
        return ()
    sums = {name: float(weights[[own == name for own in names]].sum()) / total for name in sorted(set(names))}
    return tuple(sorted(((name, share) for name, share in sums.items() if share > 0), key=lambda p: (-p[1], p[0])))
