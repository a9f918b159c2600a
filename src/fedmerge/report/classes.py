"""Which classes a model is for: those that are more frequent among its users than elsewhere. Within tasks, if known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedmerge.experiment.record import RunRecord
from fedmerge.report.kinds import known_tasks
from fedmerge.report.statistics import FloatArray

STANDS_OUT = 1.5  # a class this much more frequent than in the federation, and by so many standard errors, stands out
ERRORS = 3.0
SERVED = 0.05  # a task with less than this of the examples of a model's users says nothing about the model

IntArray = npt.NDArray[np.int64]


class ClassShare(NamedTuple):
    """A class, its share among a model's users, and how many times its share in the federation that is."""

    class_index: int
    share: float
    times: float


class Classes(NamedTuple):
    """What the clients have of each class.

    Attributes:
        counts: [N, K] train examples, or labels where an example has several.
        blocks: [K] the task that a class belongs to, an index of `tasks`; all 0 where classes are not of single tasks.
        tasks: Names of tasks; empty where classes are not of single tasks.
    """

    counts: FloatArray
    blocks: IntArray
    tasks: tuple[str, ...]


def classes_of(run: RunRecord) -> Classes | None:
    """None if class counts were not kept, or if there is but one class.

    Where no class has examples in two tasks, classes are compared within their task: that a model for spam mails sees
    no films is told by its tasks. A class without any examples is counted to the first task.
    """
    if run.class_counts is None or len(run.class_names) < 2:
        return None
    counts = np.array(run.class_counts, dtype=np.float64)
    of = known_tasks(run) or ()
    tasks = tuple(dict.fromkeys(of))
    held = np.array([counts[[own == task for own in of]].sum(axis=0) > 0 for task in tasks])
    if not tasks or (held.sum(axis=0) > 1).any():
        return Classes(counts, np.zeros(counts.shape[1], dtype=np.int64), ())
    return Classes(counts, held.argmax(axis=0), tasks)


def counted(run: RunRecord) -> str:
    """What class counts are of: ``examples``, or ``labels`` where an example has several."""
    totals = [sum(counts) for counts in run.class_counts or ()]
    return "labels" if any(total > size for total, size in zip(totals, run.num_train, strict=False)) else "examples"


def class_shares(weights: FloatArray, classes: Classes) -> FloatArray:
    """[d, K] share of each class in its task among a model's users, each counting with its weight.

    Within a task, row j is proportional to the sum over i of weights_ij counts_i; with one column of ones it is the
    federation's. NaN where the users of a model have less than `SERVED` of their examples in the task, or none at all.

    Args:
        weights: [N, d].
        classes: Of N clients.
    """
    mass = weights.T @ classes.counts
    whole = _task_mass(mass, classes)
    with np.errstate(invalid="ignore"):
        shares = mass / whole
        served = whole >= SERVED * mass.sum(axis=1, keepdims=True)
    return np.asarray(np.where(served, shares, np.nan))


def federation_shares(classes: Classes) -> FloatArray:
    """[K] share of each class in its task, all clients together; NaN for a task without examples."""
    mass = classes.counts.sum(axis=0, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.asarray((mass / _task_mass(mass, classes))[0])


def _task_mass(mass: FloatArray, classes: Classes) -> FloatArray:
    """[d, K] examples of all classes of the task that each class belongs to."""
    sums = [mass[:, classes.blocks == block].sum(axis=1) for block in range(max(len(classes.tasks), 1))]
    return np.stack(sums, axis=1)[:, classes.blocks]


def standing_out(weights: FloatArray, classes: Classes) -> tuple[ClassShare, ...]:
    """Classes over-represented among a model's users beyond what drawing as many examples by chance would explain.

    Args:
        weights: [N] of the model.
        classes: Of N clients.
    """
    everywhere, users = federation_shares(classes), class_shares(weights[:, None], classes)[0]
    examples = _task_mass(weights[None] @ classes.counts, classes)[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(everywhere * (1 - everywhere) / examples)
        found = (users >= STANDS_OUT * everywhere) & (users - everywhere > ERRORS * error) & (everywhere > 0)
    order = sorted(np.flatnonzero(found).tolist(), key=lambda k: (-users[k] / everywhere[k], k))
    return tuple(ClassShare(k, float(users[k]), float(users[k] / everywhere[k])) for k in order)
