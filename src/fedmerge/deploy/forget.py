"""A site leaves a federation: what the server keeps of it goes, its place stays, and what cannot be undone is said.

Its place among the clients stays, because randomness goes by a client's index: the others' numbers are those of a run
in which the site had stopped answering. The place is called ``forgotten-<index>``, has no key and is never asked.
"""

from __future__ import annotations

import json
import mmap
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tomli_w

from fedmerge.core.errors import FedmergeError, UsageError, unknown_name
from fedmerge.core.files import write_atomically
from fedmerge.core.strict_json import parse_json, read_bounded
from fedmerge.deploy.federation import FILE, FederationConfig, read_federation, tombstone
from fedmerge.deploy.forget_run import forget_in_run, with_tombstone
from fedmerge.deploy.private_state import site_held
from fedmerge.deploy.protection import FILE as PROTECTION
from fedmerge.deploy.replacing import put_back
from fedmerge.deploy.roster import FEDERATION_HEAD, change_sites, read_roster, write_federation
from fedmerge.deploy.site import read_site
from fedmerge.deploy.site_model import FOLDER as MODEL
from fedmerge.experiment.book import held
from fedmerge.experiment.config import read_toml
from fedmerge.experiment.record import (
    to_plain,
)
from fedmerge.experiment.simulation import one_thread

RECORD = "forgotten.json"
_INVITATION = ("site.toml", "ca.crt", "node.key", "node.pub", "federation.toml")
"""What `fedmerge deploy init` puts into a site's folder on the server."""


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
    client, run, place = federation.names.index(name), federation.run_folder, federation.folder
    put_back(run)
    with held(run) if run.is_dir() else nullcontext(), one_thread():
        done = forget_in_run(federation, client)
        found = Forgotten(
            id=secrets.token_hex(8),
            client=client,
            place=tombstone(client),
            round=done.round,
            last_reply=done.last_reply,
            removed=(f"its key and name in {FILE}", *done.removed, *_remove_invitations(place, name)),
            remains=(*done.remains, *_ELSEWHERE),
            unscored=done.unscored,
            left=(),
        )
        _note(place, found)
        _change_federation(federation, client)  # the last step: until it is done, the name can be given again
    return replace(found, left=_left(place, name))


_ELSEWHERE = (
    "copies of models that other sites hold, as far as they were trained with its replies",
    f"its name and public key in the copies of {FILE} that other sites were given: send them the new one",
    "what the SuperLink has in memory (public keys of nodes, messages on their way) until it is started again; the "
    "next run takes the key off",
    "backups of this folder",
)


# ---------------------------------------------------------------- the federation's folder


def _change_federation(federation: FederationConfig, client: int) -> None:
    """``federation.toml`` and the copies for other sites; comments go only where they name the site."""
    folder, own, changed = federation.folder, federation.names[client], with_tombstone(federation, client)
    others = [name for name in changed.living if (folder / "sites" / name).is_dir()]
    change_sites(read_roster(folder), changed.sites)
    text = (folder / FILE).read_text(encoding="utf-8")
    if _names(text, own):
        write_federation(folder, FEDERATION_HEAD + tomli_w.dumps(read_toml(folder / FILE)), others)


def _names(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def _remove_invitations(folder: Path, name: str) -> tuple[str, ...]:
    """Removes what was made for the site on the server, unless the site itself is on this machine."""
    places = [place for place in _own_folders(folder, name) if not _surplus(place)]
    for place in places:
        shutil.rmtree(place)
    return ("its folder with keys that was made for it on the server",) if places else ()


def _surplus(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name not in _INVITATION)


def _left(folder: Path, name: str) -> tuple[str, ...]:
    """What still holds its name."""
    own = [
        f"{place.relative_to(folder)}: holds {', '.join(_surplus(place))}, which are the site's own; the site removes "
        "what it kept with `forget_own_state`"
        for place in _own_folders(folder, name)
    ]
    files = [path.relative_to(folder) for path in _files(folder, name) if _holds(path, name.encode())]
    return (*own, *(f"{path}: names it; remove or replace it" for path in files))


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
                elif place.name == PROTECTION:
                    kept.append(
                        f"{site.state}/{place.name}: the secret behind its noise, and how many protected updates were "
                        "given; whoever removes it begins to count epsilon anew"
                    )
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
