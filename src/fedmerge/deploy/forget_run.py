"""A run's folder without one of its sites, in one step in the place of the old one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.files import write_atomically
from fedmerge.core.protocol import own_name
from fedmerge.core.tensor_files import read_tensor_file
from fedmerge.deploy.deployment import Deployment, read_deployment, scaled, write_deployment
from fedmerge.deploy.federation import FILE, FederationConfig, tombstone
from fedmerge.deploy.forget_state import client_axes, forgotten_state, mixed_parts
from fedmerge.deploy.office import REPLIES, bases
from fedmerge.deploy.plan import Plan, plan_of
from fedmerge.deploy.replacing import replacing
from fedmerge.deploy.status import FILE as STATUS
from fedmerge.experiment.book import standing
from fedmerge.experiment.checkpoint import Found, digest, restored, tensor_bytes, write_best, write_slot
from fedmerge.experiment.record import (
    RoundRecord,
    RunRecord,
    Scores,
    append_rounds,
    read_run,
    read_run_alone,
    select,
    to_plain,
    write_run,
)
from fedmerge.experiment.simulation import Progress
from fedmerge.experiment.store import write_models

_PER_CLIENT = ("num_train", "num_validation", "num_test")
_STATES = ("models.safetensors", "last.safetensors")
_KEPT = ("serving.json",)
"""Files of a run that say nothing of single sites."""


@dataclass(frozen=True)
class RunForgotten:
    """What became of the run.

    Attributes:
        round: Rounds that were completed.
        last_reply: The last of them in which the client's reply counted; 0 for none.
        removed: What is gone.
        remains: What cannot be undone.
        unscored: Rounds that have lost their scores.
    """

    round: int = 0
    last_reply: int = 0
    removed: tuple[str, ...] = ()
    remains: tuple[str, ...] = ()
    unscored: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Before:
    """The run as it was.

    Attributes:
        plan: Of the run.
        record: Without its rounds.
        deployment: Its identity.
        lines: Complete rounds.
        pending: The round after them, whose scores are still to come.
        found: Its checkpoint, of a run that is not finished.
        chosen: Round whose model is kept as the best; −1 for none.
    """

    plan: Plan
    record: RunRecord
    deployment: Deployment
    lines: tuple[RoundRecord, ...]
    pending: RoundRecord | None
    found: Found | None
    chosen: int

    @property
    def all_lines(self) -> tuple[RoundRecord, ...]:
        """Complete rounds, and the one that waits for its scores."""
        return (*self.lines, *([self.pending] if self.pending else []))


def forget_in_run(federation: FederationConfig, client: int) -> RunForgotten:
    """Makes the run's folder one without the client, if there is a run; the folder is held by this process.

    Args:
        federation: As it was.
        client: Index.

    Raises:
        UsageError: if the run is that of other sites.
        FedmergeError: if its folder is damaged.
    """
    run = federation.run_folder
    if not (run / "run.json").is_file():
        deployment = read_deployment(run) if run.is_dir() else None
        shutil.rmtree(run / REPLIES, ignore_errors=True)
        (run / STATUS).unlink(missing_ok=True)
        return RunForgotten(remains=_pooled(deployment))
    record, deployment = read_run_alone(run), read_deployment(run)
    if deployment is None:
        raise UsageError(f"{run} is no deployed run; move it away")
    if len(record.client_names) != len(federation.names):
        raise UsageError(
            f"{run} was run by other sites than {FILE} names; `fedmerge deploy remove` takes out one of them"
        )
    if record.client_names[client] == tombstone(client):  # a process that was killed had come this far
        lines = read_run(run).rounds
        number = lines[-1].round if lines else 0
        influence = f"its influence on what all sites trained together up to round {number} or later"
        return RunForgotten(number, number, _REMOVED, (influence, *_pooled(deployment)))
    federation = scaled(federation, deployment)
    return _rewritten(_before(federation, record, deployment), with_tombstone(federation, client), client)


def _before(federation: FederationConfig, record: RunRecord, deployment: Deployment) -> _Before:
    run, plan = federation.run_folder, plan_of(federation)
    if record.data_sha256 != plan.digest:
        raise UsageError(f"{run} was run by other sites, or with another form of data, than {FILE} names")
    if record.status == "finished":
        whole = read_run(run)
        return _Before(plan, record, deployment, whole.rounds, None, None, whole.selected().round)
    stand = standing(run, plan.setup, plan.start, plan.digest)
    chosen = -1 if stand.found is None else stand.found.manifest.selected
    return _Before(plan, record, deployment, stand.lines, stand.pending, stand.found, chosen)


def _rewritten(before: _Before, federation: FederationConfig, client: int) -> RunForgotten:
    """Writes everything of a run anew, and puts it in the place of the old folder in one step."""
    run, plan, record = federation.run_folder, before.plan, before.record
    axes, data = client_axes(plan), plan_of(federation).digest
    last_reply = bases(before.all_lines, len(record.client_names))[client]
    rivals = before.chosen if record.select == "validation" else -1
    lines, unscored = _without_rivals([_forgotten_line(line, client) for line in before.lines], rivals)
    mixed: tuple[str, ...] = ()
    with replacing(run, private=False) as new:
        content = append_rounds(new, lines) if lines else b""
        write_run(new, _forgotten_run(record, client, data, lines if record.status == "finished" else ()))
        _write_deployment(new, before.deployment, plan.federation.names[client])
        for name in filter(lambda name: (run / name).is_file(), _KEPT):
            write_atomically(new / name, (run / name).read_bytes())
        for name in filter(lambda name: (run / name).is_file(), _STATES):
            progress = _read_state(plan, run / name)
            mixed = mixed_parts(plan, axes, progress.state, last_reply)
            write_models(new / name, replace(progress, state=forgotten_state(plan, axes, progress.state, client)))
        if before.found is not None:
            mixed = mixed_parts(plan, axes, before.found.last.state, last_reply)
            line = None if before.pending is None else _forgotten_line(before.pending, client)
            _write_checkpoint(new, plan, axes, before.found, client, content, line, data)
    number = before.all_lines[-1].round if before.all_lines else 0
    removed = (*_REMOVED, *_told_axes(axes))
    return RunForgotten(number, last_reply, removed, (*mixed, *_pooled(before.deployment)), unscored)


def _pooled(deployment: Deployment | None) -> tuple[str, ...]:
    found = deployment is not None and bool(deployment.mean)
    return ("its part in the pooled mean and standard deviation of inputs",) if found else ()


_REMOVED = (
    "its name, numbers of examples and scores in run.json and rounds.jsonl, its merging weights there, and that it was "
    "asked or answered",
    "replies that no round had taken in, earlier checkpoints, status.json",
    "everything else in the folder of the run that was made from it (reports)",
)


def _told_axes(axes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    names = [own_name(name) for name in axes]
    return (f"its place in what the server keeps of each client: {', '.join(names)}",) if names else ()


def with_tombstone(federation: FederationConfig, client: int) -> FederationConfig:
    """The federation with the place of one client empty."""
    own = federation.names[client]
    sites = {tombstone(client) if name == own else name: key for name, key in federation.sites.items()}
    return replace(federation, sites={**sites, tombstone(client): ""})


def _read_state(plan: Plan, path: Path) -> Progress:
    file = read_tensor_file(path)
    number = file.metadata.get("round", "")
    if not number.isdecimal():
        raise FedmergeError(f"{path} is damaged: it does not say of which round it is; the run cannot be used")
    return restored(plan.start, file.tensors, int(number))


def _write_checkpoint(
    folder: Path,
    plan: Plan,
    axes: Mapping[str, tuple[int, ...]],
    found: Found,
    client: int,
    lines: bytes,
    pending: RoundRecord | None,
    data: str,
) -> None:
    """The latest checkpoint, without the client; the one before it is not needed any more."""

    def without(progress: Progress) -> bytes:
        return tensor_bytes(replace(progress, state=forgotten_state(plan, axes, progress.state, client)))

    tensors, best = without(found.last), ""
    if found.manifest.selected >= 0:
        content = tensors if found.manifest.selected == found.manifest.round else without(found.selected)
        write_best(folder, found.manifest.selected, content)
        best = digest(content)
    manifest = replace(
        found.manifest,
        data=data,
        tensors=digest(tensors),
        lines=len(lines),
        records=hashlib.sha256(lines).hexdigest(),
        best=best,
        pending="" if pending is None else json.dumps(to_plain(pending)),
    )
    write_slot(folder, 0, manifest, tensors)


def _write_deployment(folder: Path, deployment: Deployment, name: str) -> None:
    delivered = tuple(other for other in deployment.delivered if other != name)
    write_deployment(folder, replace(deployment, delivered=delivered, stopped=""))


def _forgotten_run(record: RunRecord, client: int, data: str, lines: Sequence[RoundRecord]) -> RunRecord:
    counts: dict[str, Any] = {name: _with(getattr(record, name), client, 0) for name in _PER_CLIENT}
    names = _with(record.client_names, client, tombstone(client))
    return replace(record, client_names=names, data_sha256=data, rounds=tuple(lines), **counts)


def _with(values: Sequence[Any], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _forgotten_line(line: RoundRecord, client: int) -> RoundRecord:
    mixing = line.mixing
    if mixing is not None:
        width = len(mixing[client])
        mixing = _with(mixing, client, (round(1 / width, 6),) * width)
    return replace(
        line,
        cohort=tuple(i for i in line.cohort if i != client),
        dropped=tuple(i for i in line.dropped if i != client),
        refused=tuple(refusal for refusal in line.refused if refusal["client"] != client),
        validation=_forgotten_scores(line.validation, client),
        test=_forgotten_scores(line.test, client),
        mixing=mixing,
    )


def _forgotten_scores(scores: Scores | None, client: int) -> Scores | None:
    if scores is None:
        return None
    return Scores(_with(scores.accuracy, client, None), _with(scores.loss, client, None))


def _without_rivals(lines: Sequence[RoundRecord], chosen: int) -> tuple[list[RoundRecord], tuple[int, ...]]:
    """The rounds, of which the chosen one is still the best, and the numbers of those whose scores had to go for that.

    A model is kept of the chosen round alone. Without the client's scores another round may look better, which nobody
    can go back to.

    Args:
        lines: Of all complete rounds.
        chosen: Number of the selected one; −1 for none.
    """
    found, lost = list(lines), []
    while chosen >= 0:
        best = select([line for line in found if line.test is not None])
        if best.round == chosen:
            break
        place = next(k for k, line in enumerate(found) if line.round == best.round)
        found[place] = replace(best, validation=None, test=None, mixing=None)
        lost.append(best.round)
    return found, tuple(sorted(lost))
