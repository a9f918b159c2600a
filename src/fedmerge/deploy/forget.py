"""A site leaves a federation: what the server keeps of it goes, its place stays, and what cannot be undone is said.

Its place among the clients stays, because randomness goes by a client's index: the others' numbers are those of a run
in which the site had stopped answering. The place is called ``forgotten-<index>``, has no key and is never asked.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

from fedmerge.core.errors import FedmergeError, UsageError, unknown_name
from fedmerge.core.files import write_atomically
from fedmerge.core.protocol import own_name, state_tensors, with_tensors
from fedmerge.core.strict_json import parse_json, read_bounded
from fedmerge.core.tensor_files import read_tensor_file
from fedmerge.deploy.deployment import Deployment, read_deployment, write_deployment
from fedmerge.deploy.federation import FILE, FederationConfig, read_federation, tombstone
from fedmerge.deploy.office import bases
from fedmerge.deploy.plan import Plan, plan_of
from fedmerge.deploy.private_state import site_held
from fedmerge.deploy.roster import FEDERATION_HEAD, change_sites, read_roster, write_federation
from fedmerge.deploy.site import read_site
from fedmerge.deploy.site_model import FOLDER as MODEL
from fedmerge.deploy.site_model import put_back, replacing
from fedmerge.experiment.book import held, standing
from fedmerge.experiment.checkpoint import Found, digest, restored, tensor_bytes, write_best, write_slot
from fedmerge.experiment.config import read_toml
from fedmerge.experiment.federation import drawer
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
from fedmerge.experiment.simulation import Progress, one_thread
from fedmerge.experiment.store import write_models

RECORD = "forgotten.json"
_INVITATION = ("site.toml", "ca.crt", "node.key", "node.pub", "federation.toml")
"""What `fedmerge deploy init` puts into a site's folder on the server."""
_ROWS = "soup.logits"
_PER_CLIENT = ("num_train", "num_validation", "num_test")
_STATES = ("models.safetensors", "last.safetensors")
_KEPT = ("serving.json",)
"""Files of a run that say nothing of single sites."""


@dataclass(frozen=True)
class Forgotten:
    """What was done about a site that left.

    Attributes:
        id: Random; what the entry in ``forgotten.json`` is called.
        client: Index of its place.
        place: What the place is called now.
        round: Rounds that were completed.
        last_reply: The last of them in which its reply counted; 0 for none.
        removed: What is gone.
        remains: What cannot be undone.
        unscored: Rounds that have lost all scores: without the site's another round than the one whose model was kept
            would look best, and theirs is gone.
        left: Files and folders of the federation's folder that somebody must still look at, with why; they may hold its
            name, which is why ``forgotten.json`` does not list them.
    """

    id: str
    client: int
    place: str
    round: int
    last_reply: int
    removed: tuple[str, ...]
    remains: tuple[str, ...]
    unscored: tuple[int, ...]
    left: tuple[str, ...]


def forget_site(folder: Path | str, name: str) -> Forgotten:
    """Forgets a site on the server, where no run is in progress.

    Killed at any moment, it leaves a folder that is whole; called again, it does what was left to do.

    Args:
        folder: Of the federation.
        name: Of the site.

    Raises:
        UsageError: if there is no such site, it is the last one, or the run is in progress.
        FedmergeError: if the run's folder is damaged.
    """
    federation = read_federation(folder)
    if name not in federation.living:
        raise UsageError(unknown_name("site", name, federation.living))
    if len(federation.living) == 1:
        raise UsageError(f"{name!r} is the federation's only site; remove {federation.folder} as a whole instead")
    client = federation.names.index(name)
    run = federation.run_folder
    put_back(run)
    with held(run) if run.is_dir() else nullcontext(), one_thread():
        done = _rewritten(federation, client) if (run / "run.json").is_file() else _nothing(federation)
        if run.is_dir() and not (run / "run.json").is_file():
            shutil.rmtree(run / "replies", ignore_errors=True)
            (run / "status.json").unlink(missing_ok=True)
        _change_federation(federation, client)
    removed, left = _clear_folder(federation.folder, name)
    removed = (f"its place, key and name in {FILE}", *done.removed, *removed)
    found = Forgotten(
        id=secrets.token_hex(8),
        client=client,
        place=tombstone(client),
        round=done.round,
        last_reply=done.last_reply,
        removed=removed,
        remains=(*done.remains, *_ELSEWHERE),
        unscored=done.unscored,
        left=left,
    )
    _note(federation.folder, found)
    return found


_ELSEWHERE = (
    "copies of models that other sites hold, as far as they were trained with its replies",
    f"its name and public key in the copies of {FILE} that other sites were given: send them the new one",
    "what Flower has written in superlink.db (public keys of nodes, messages on their way): its key must be taken off "
    "the SuperLink, which then never accepts it again; remove the file where the federation is done",
    "backups of this folder",
)


@dataclass(frozen=True)
class _Done:
    """What became of the run."""

    round: int = 0
    last_reply: int = 0
    removed: tuple[str, ...] = ()
    remains: tuple[str, ...] = ()
    unscored: tuple[int, ...] = ()


def _nothing(federation: FederationConfig) -> _Done:
    deployment = read_deployment(federation.run_folder) if federation.run_folder.is_dir() else None
    pooled = ("its part in the pooled mean and standard deviation of inputs",) if deployment and deployment.mean else ()
    return _Done(remains=pooled)


# ---------------------------------------------------------------- the server's state


def client_axes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Which axes of the state's tensors go by client, by name; those without one hold what clients made together.

    Found by asking the method, and what is around it, for its first state with one client more.

    Args:
        plan: Of the run.
    """
    setup, terms = plan.setup, plan.federation.terms
    facts, N = setup.facts, setup.facts.num_clients
    groups = None if facts.groups is None else (*facts.groups, facts.groups[-1])
    draw = drawer(terms.model, setup.data, setup.options.seed, setup.layout, setup.options.dtype)
    more = replace(facts, num_clients=N + 1, groups=groups)
    own, larger = (state_tensors(s) for s in (plan.start.state, setup.played.init(draw, more, setup.options.seed)))
    found = {}
    for name, tensor in own.items():
        sizes = zip(tensor.shape, larger[name].shape, strict=True)
        axes = tuple(axis for axis, (size, other) in enumerate(sizes) if (size, other) == (N, N + 1))
        if axes:
            found[name] = axes
    return found


def forgotten_state(plan: Plan, axes: Mapping[str, tuple[int, ...]], state: Any, client: int) -> Any:
    """The state with everything at a client's place as it was before its first reply.

    Its merging weights become uniform. A part whose form has changed since the start (merging weights of models that
    were added later) becomes 0.

    Args:
        plan: Of the run.
        axes: From `client_axes`.
        state: Of the run.
        client: Index.

    Raises:
        FedmergeError: if a tensor has not one entry for each client where it should.
    """
    N, fresh = plan.setup.facts.num_clients, state_tensors(plan.start.state)
    tensors = dict(state_tensors(state))
    for name, own in axes.items():
        if not tensors[name].numel():  # what a method keeps for some rounds only
            continue
        if any(axis >= tensors[name].dim() or tensors[name].shape[axis] != N for axis in own):
            raise FedmergeError(
                f"{name} is {list(tensors[name].shape)}; expected {N} entries on axis {own}: this method's state "
                "cannot forget a client"
            )
        tensors[name] = _blank(tensors[name], fresh[name], own, client, zero=own_name(name) == _ROWS)
    return with_tensors(state, tensors)


def _blank(tensor: Tensor, fresh: Tensor, axes: Sequence[int], client: int, *, zero: bool) -> Tensor:
    found = tensor.clone()
    for axis in axes:
        place, start = found.select(axis, client), fresh.select(axis, client)
        if place.shape == start.shape and not zero:
            place.copy_(start)
        else:
            place.zero_()
    return found


def _mixed(plan: Plan, axes: Mapping[str, tuple[int, ...]], state: Any, last_reply: int) -> tuple[str, ...]:
    """What of the state holds a client's replies together with others'."""
    if not last_reply:
        return ()
    fresh, shared = state_tensors(plan.start.state), []
    for name, tensor in state_tensors(state).items():
        if name not in axes and tensor.is_floating_point() and tensor.numel() and not _is(tensor, fresh[name]):
            shared.append(own_name(name))
    method = plan.federation.terms.plain()["method"]["name"]
    found = []
    if shared:
        found.append(
            f"its influence on what all sites trained together up to round {last_reply}: {', '.join(shared)}; only "
            "training anew without it undoes that"
        )
    if axes and method in _OTHERS_ROWS:
        found.append(_OTHERS_ROWS[method])
    return tuple(found)


def _is(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor, other)


_CLUSTERED = "which sites share a model, and how many models there are, was decided with its replies among the others'"
_OTHERS_ROWS: dict[str, str] = {
    "fedmerge": "other sites' merging weights were learned on models that its replies had moved; models that were "
    "added or groups of layers that were parted were decided with its replies too",
    "dp-fedmerge": "other sites' merging weights were learned on models that its replies had moved; the privacy that "
    "was promised for its replies holds for them as before",
    "fedamp": "the models of other sites, each of which was drawn towards those that were like it, its own among them",
    "cfl": _CLUSTERED,
    "cfl-smoothed": _CLUSTERED,
    "flhc": _CLUSTERED,
    "one-shot": _CLUSTERED,
    "femam": _CLUSTERED,
    "fesem": _CLUSTERED,
    "ifca": _CLUSTERED,
    "fedsoft": _CLUSTERED,
}
"""What remains of a client at the places of other clients, by method."""


# ---------------------------------------------------------------- the run's folder


def _rewritten(federation: FederationConfig, client: int) -> _Done:
    """The run's folder without the client, in one step in the place of the old one."""
    run, place = federation.run_folder, tombstone(client)
    record, deployment = read_run_alone(run), read_deployment(run)
    if deployment is None:
        raise UsageError(f"{run} is no deployed run; move it away")
    federation = scaled(federation, deployment)
    if record.client_names[client] == place:  # a process that was killed had come this far
        lines = read_run(run).rounds
        return _Done(lines[-1].round if lines else 0, removed=_REMOVED)
    before, after = plan_of(federation), plan_of(_with_tombstone(federation, client))
    if record.data_sha256 != before.digest:
        raise UsageError(f"{run} was run by other sites, or with another form of data, than {FILE} names")
    axes = client_axes(before)
    stand = standing(run, before.setup, before.start, before.digest) if record.status != "finished" else None
    ended, found = stand is None, None if stand is None else stand.found
    known = tuple(read_run(run).rounds if stand is None else stand.lines)
    pending = None if stand is None else stand.pending
    if ended:
        chosen = replace(record, rounds=known).selected().round
    else:
        chosen = -1 if found is None else found.manifest.selected
    last_reply = bases([*known, *([pending] if pending else [])], len(record.client_names))[client]
    rivals = chosen if record.select == "validation" else -1
    rest, unscored = _without_rivals([_forgotten_line(line, client) for line in known], rivals)
    mixed: tuple[str, ...] = ()
    with replacing(run, private=False) as new:
        content = append_rounds(new, rest) if rest else b""
        write_run(new, _forgotten_run(record, client, after.digest, rest if ended else ()))
        _write_deployment(new, deployment, federation.names[client])
        for name in _KEPT:
            if (run / name).is_file():
                write_atomically(new / name, (run / name).read_bytes())
        for name in _STATES:
            if (run / name).is_file():
                progress = _read_state(before, run / name)
                state = forgotten_state(before, axes, progress.state, client)
                mixed = _mixed(before, axes, progress.state, last_reply)
                write_models(new / name, replace(progress, state=state))
        if found is not None:
            mixed = _mixed(before, axes, found.last.state, last_reply)
            line = None if pending is None else _forgotten_line(pending, client)
            _write_checkpoint(new, before, axes, found, client, content, line, after.digest)
    number = pending.round if pending else known[-1].round if known else 0
    pooled = ("its part in the pooled mean and standard deviation of inputs",) if deployment.mean else ()
    return _Done(number, last_reply, (*_REMOVED, *_told_axes(axes)), (*mixed, *pooled), unscored)


_REMOVED = (
    "its name, numbers of examples and scores in run.json and rounds.jsonl, its merging weights there, and that it was "
    "asked or answered",
    "replies that no round had taken in, earlier checkpoints, status.json",
    "everything else in the folder of the run that was made from it (reports)",
)


def _told_axes(axes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    names = [own_name(name) for name in axes]
    return (f"its place in what the server keeps of each client: {', '.join(names)}",) if names else ()


def scaled(federation: FederationConfig, deployment: Deployment) -> FederationConfig:
    """The federation with the scale of inputs that its run found, where that was left open."""
    terms = federation.terms
    if not terms.schema.needs_moments or not deployment.mean:
        return federation
    return replace(federation, terms=replace(terms, schema=terms.schema.with_scale(deployment.mean, deployment.std)))


def _with_tombstone(federation: FederationConfig, client: int) -> FederationConfig:
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


# ---------------------------------------------------------------- the federation's folder


def _change_federation(federation: FederationConfig, client: int) -> None:
    """``federation.toml`` and the copies for other sites; comments go only where they name the site."""
    folder, own, changed = federation.folder, federation.names[client], _with_tombstone(federation, client)
    others = [name for name in changed.living if (folder / "sites" / name).is_dir()]
    change_sites(read_roster(folder), changed.sites)
    text = (folder / FILE).read_text(encoding="utf-8")
    if _names(text, own):
        write_federation(folder, FEDERATION_HEAD + tomli_w.dumps(read_toml(folder / FILE)), others)


def _names(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def _clear_folder(folder: Path, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Removes the site's invitation; what is gone, and what is left that holds its name."""
    removed, left = [], []
    for place in _own_folders(folder, name):
        surplus = sorted(path.name for path in place.iterdir() if path.name not in _INVITATION)
        if surplus:
            left.append(
                f"{place.relative_to(folder)}: holds {', '.join(surplus)}, which are the site's own; the site removes "
                "what it kept with `forget_own_state`"
            )
        else:
            shutil.rmtree(place)
            removed.append("its folder with keys that was made for it on the server")
    where = [path for path in _files(folder, name) if _holds(path, name.encode())]
    left += [f"{path.relative_to(folder)}: names it; remove or replace it" for path in where]
    return tuple(removed), tuple(left)


def _own_folders(folder: Path, name: str) -> list[Path]:
    moved = [path for path in folder.glob("removed/*") if re.fullmatch(rf"{re.escape(name)}(\.\d+)?", path.name)]
    return [path for path in (folder / "sites" / name, *sorted(moved)) if path.is_dir()]


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Files of the federation; what sites that are on this machine have of their own is theirs."""
    own = _own_folders(folder, name)
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_sites_own = parts[0] == "sites" and not (len(parts) == 3 and parts[2] in _INVITATION)
        if path.is_file() and not path.is_symlink() and not is_sites_own and not any(o in path.parents for o in own):
            yield path


def _holds(path: Path, name: bytes) -> bool:
    """Whether a file names the site, not only another one whose name begins or ends alike."""
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return re.search(rb"(?<![\w-])" + re.escape(name) + rb"(?![\w-])", content) is not None


def _note(folder: Path, found: Forgotten) -> None:
    """Appends to ``forgotten.json``, without what may hold the name."""
    path = folder / RECORD
    try:
        entries = parse_json(read_bounded(path)) if path.is_file() else []
    except ValueError as error:
        raise FedmergeError(f"{path} is damaged: {error}; the site is forgotten, move the file away") from error
    plain = {key: value for key, value in asdict(found).items() if key != "left"}
    write_atomically(path, json.dumps([*entries, to_plain(plain)], indent=1) + "\n", private=True)


# ---------------------------------------------------------------- the site's side


@dataclass(frozen=True)
class OwnForgotten:
    """What a site has removed of a federation.

    Attributes:
        removed: Folders that are gone, from the site's folder.
        kept: Those that were left, with why.
    """

    removed: tuple[str, ...]
    kept: tuple[str, ...]


_STATE = re.compile(r"[0-9a-f]{16}")


def forget_own_state(site_folder: Path | str, *, model: bool = False) -> OwnForgotten:
    """Removes what a site keeps of a federation in its own folder: private states of all runs, never its examples.

    Args:
        site_folder: With ``site.toml``.
        model: Whether its own model goes too.

    Raises:
        UsageError: if it is no site's folder, or a process of the site is at work.
    """
    site = read_site(site_folder)
    removed, kept = [], []
    if site.state_folder.is_dir():
        with site_held(site.state_folder, 0.0):
            for place in sorted(site.state_folder.iterdir()):
                states = [*place.glob("private-*.safetensors*")] if place.is_dir() else []
                surplus = {*place.iterdir()} - {*states} if place.is_dir() else set()
                if place.is_dir() and _STATE.fullmatch(place.name) and not surplus:
                    shutil.rmtree(place)
                    removed.append(f"{site.state}/{place.name}")
                elif place.name != ".lock":
                    kept.append(f"{site.state}/{place.name}: is no private state of a run")
        if not kept:
            shutil.rmtree(site.state_folder, ignore_errors=True)
    place = site.folder / MODEL
    put_back(place)
    if model and place.is_dir():
        shutil.rmtree(place)
        removed.append(MODEL)
    elif place.is_dir():
        kept.append(f"{MODEL}: the site's own model; it goes with model=True")
    return OwnForgotten(tuple(removed), tuple(kept))
