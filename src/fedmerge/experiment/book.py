"""A run's folder as the run goes: it is held by one process, and what is announced is on the disk."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedmerge.algorithms import ALGORITHMS
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.files import make_folder, truncate
from fedmerge.experiment import checkpoint
from fedmerge.experiment.checkpoint import Found, Manifest, digest
from fedmerge.experiment.config import plain_options
from fedmerge.experiment.lock import NAME as LOCK
from fedmerge.experiment.lock import run_lock
from fedmerge.experiment.record import RoundRecord, append_rounds, to_plain
from fedmerge.experiment.simulation import Progress, Setup

log = logging.getLogger(__name__)


@contextmanager
def new_run_folder(folder: Path) -> Iterator[None]:
    """Makes a new, empty run folder and holds it for this process.

    Raises:
        UsageError: if it exists with something in it, is in use, or cannot be written.
    """
    try:
        make_folder(folder)
        _refuse_full(folder)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise _unwritable(folder, error) from error
    with held(folder):
        _refuse_full(folder)  # somebody may have been faster
        yield


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the folder of a run that is there for this process.

    Raises:
        UsageError: if it is in use or cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(folder))
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield


def _unwritable(folder: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"cannot write run folder {folder}: {reason}. Choose another --out")


def _refuse_full(folder: Path) -> None:
    if any(path.name != LOCK for path in folder.iterdir()):
        raise UsageError(
            f"{folder} exists and is not empty; nothing was overwritten. Choose another --out or remove it first"
        )


def digest_of_request(setup: Setup) -> str:
    """Of all that decides a run's numbers beside the clients' data: method, network, training, options, engine."""
    free = {"checkpoint_every", "workers", "cluster"}  # numbers do not depend on them
    options = {key: value for key, value in plain_options(setup.options).items() if key not in free}
    asked = {
        "method": ALGORITHMS.name_of(setup.algorithm),
        "options": plain_options(setup.algorithm),
        "training": plain_options(setup.training),
        "run": options,
        "engine": type(getattr(setup.engine, "inner", setup.engine)).__name__,
        "layout": [(slot.name, slot.shape, str(slot.dtype), slot.role) for slot in setup.layout.slots],
        "start": digest(setup.layout.read(setup.module).contiguous().numpy().tobytes()),
        "presence": None if setup.presence is None else repr(setup.presence.spans),
    }
    return digest(json.dumps(asked, sort_keys=True, default=repr).encode())


@dataclass(frozen=True)
class _Entry:
    """Rounds that are to be written down, and the state after the last of them."""

    lines: tuple[RoundRecord, ...]
    last: Progress
    selected: tuple[int, Progress]
    seconds: float
    pending: RoundRecord | None = None

    def after(self, earlier: _Entry | None) -> _Entry:
        """Both as one."""
        return self if earlier is None else replace(self, lines=earlier.lines + self.lines)

    def may_grow(self) -> bool:
        """Whether later rounds may go to the disk with it. Round 0 goes alone: no round follows it unchecked."""
        return bool(self.lines) and self.lines[0].round > 0 and len(self.lines) < _MOST_BEHIND


class Book:
    """Writes a run down beside its computation. Rounds that `written` has given survive a kill or a power cut.

    The disk is slower than a small round, so a thread of its own writes: whatever has come in since it began goes to
    the disk together, with one checkpoint.

    Args:
        folder: Of the run; held by this process.
        setup: Of the run.
        data: Digest of its clients' data.
        found: Where it goes on; None for a new run.
    """

    def __init__(self, folder: Path, setup: Setup, data: str, found: Found | None = None) -> None:
        self._pages = _Pages(folder, digest_of_request(setup), data, every=setup.options.checkpoint_every)
        if found is not None:
            self._pages.go_on(found)
        self._change = threading.Condition()
        self._waiting: _Entry | None = None
        self._noted: _Entry | None = None
        self._written: list[RoundRecord] = []
        self._error: BaseException | None = None
        self._busy = self._closed = False
        self._thread = threading.Thread(target=self._work, name="fedmerge-book", daemon=True)
        self._thread.start()

    def note(self, line: RoundRecord, last: Progress, selected: tuple[int, Progress], seconds: float) -> None:
        """Hands in a round; waits where the disk is far behind.

        Args:
            line: Of the round.
            last: The state after it.
            selected: The round that is selected so far, −1 for none, and the state at it.
            seconds: Wall time of the run so far.

        Raises:
            OSError: if an earlier round could not be written.
        """
        with self._change:
            self._change.wait_for(lambda: self._waiting is None or self._waiting.may_grow())
            self._raise()
            self._waiting = self._noted = _Entry((line,), last, selected, seconds).after(self._waiting)
            self._change.notify_all()

    def keep(
        self,
        lines: Sequence[RoundRecord],
        pending: RoundRecord,
        last: Progress,
        selected: tuple[int, Progress],
        seconds: float,
    ) -> None:
        """Hands in a round whose scores are still to come, and returns when it is on the disk with a checkpoint.

        Args:
            lines: Earlier rounds that are complete now.
            pending: The record of the round so far.
            last: The state after it.
            selected: As in `note`.
            seconds: Wall time of the run so far.

        Raises:
            OSError: if it could not be written.
        """
        entry = _Entry(tuple(lines), last, selected, seconds, pending)
        with self._change:
            self._change.wait_for(lambda: self._waiting is None)
            self._raise()
            self._waiting = self._noted = entry
            self._change.notify_all()
        self.written(wait=True)

    def written(self, *, wait: bool = False) -> tuple[RoundRecord, ...]:
        """Rounds that have reached the disk since the last call; all that were handed in, if `wait`.

        Raises:
            OSError: if one could not be written.
        """
        with self._change:
            if wait:
                self._change.wait_for(lambda: (self._waiting is None and not self._busy) or self._error is not None)
            self._raise()
            found, self._written = tuple(self._written), []
            return found

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None or self._closed)
                entry, self._waiting = self._waiting, None
                self._busy = entry is not None
                self._change.notify_all()
            if entry is None:
                return
            try:
                self._pages.write(entry)
            except BaseException as error:  # raised again in the run's own thread
                self._error = error
            with self._change:
                self._written += () if self._error else entry.lines
                self._busy, self._waiting = False, None if self._error else self._waiting
                self._change.notify_all()

    def stop(self) -> None:
        """Ends the thread and writes a checkpoint of the last round that was handed in, if there is none yet.

        Raises:
            OSError: if it cannot be written.
        """
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        self._raise()
        if self._noted is not None:
            self._pages.save(self._noted)

    def close(self) -> None:
        """Ends the thread and removes the checkpoints: the run is finished, also where they cannot be removed."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        try:
            checkpoint.remove_all(self._pages.folder)
        except OSError as error:
            log.warning("cannot remove the checkpoints of a finished run: %s", error)


_MOST_BEHIND = 64
"""Rounds that may wait for the disk."""


class _Pages:
    """What is in the folder, and the only one that changes it while the run goes."""

    def __init__(self, folder: Path, request: str, data: str, *, every: int) -> None:
        self.folder, self._every = folder, every
        self._request, self._data = request, data
        self._records, self._lines = hashlib.sha256(), 0
        self._slot, self._saved = 1, -1
        self._referred: list[set[int]] = [set(), set()]
        self._best = (-1, "")

    def go_on(self, found: Found) -> None:
        """Takes the folder back to where the checkpoint was made: later lines are of rounds that are made again."""
        manifest, path = found.manifest, self.folder / "rounds.jsonl"
        truncate(path, manifest.lines)
        self._records.update(path.read_bytes() if path.exists() else b"")
        self._lines, self._slot, self._saved = manifest.lines, found.slot, manifest.round
        if manifest.selected < manifest.round:  # else it was not read, and is written again
            self._best = (manifest.selected, manifest.best)
        self._referred[found.slot] = {manifest.selected}

    def write(self, entry: _Entry) -> None:
        """Writes rounds down, and a checkpoint if one of them asks for it."""
        text = append_rounds(self.folder, entry.lines) if entry.lines else b""
        self._records.update(text)
        self._lines += len(text)
        if self._every and (entry.pending or any(line.round % self._every == 0 for line in entry.lines)):
            self.save(entry)

    def save(self, entry: _Entry) -> None:
        """Writes a checkpoint, if there is none of this round yet and the run has any."""
        if self._every == 0 or self._saved == entry.last.round:
            return
        tensors = checkpoint.tensor_bytes(entry.last)
        number, state = entry.selected
        if number != self._best[0]:
            chosen = tensors if number == entry.last.round else checkpoint.tensor_bytes(state)
            checkpoint.write_best(self.folder, number, chosen)
            self._best = (number, digest(chosen))
        manifest = Manifest(
            round=entry.last.round,
            request=self._request,
            data=self._data,
            tensors=digest(tensors),
            lines=self._lines,
            records=self._records.hexdigest(),
            selected=number,
            best=self._best[1],
            seconds=entry.seconds,
            pending="" if entry.pending is None else json.dumps(to_plain(entry.pending)),
        )
        self._slot = 1 - self._slot
        checkpoint.write_slot(self.folder, self._slot, manifest, tensors)
        self._saved, self._referred[self._slot] = entry.last.round, {number}
        checkpoint.prune(self.folder, self._referred[0] | self._referred[1])


@dataclass(frozen=True)
class Standing:
    """Where an interrupted run stands.

    Attributes:
        found: Its checkpoint; None if nothing of it was announced.
        lines: Its rounds so far.
        pending: The round after them, whose scores are still to come; None if there is none.
    """

    found: Found | None
    lines: tuple[RoundRecord, ...]
    pending: RoundRecord | None = None


def standing(folder: Path, setup: Setup, start: Progress, data: str) -> Standing:
    """Finds where a run can go on.

    Args:
        folder: Of the run; held by this process.
        setup: Of the run as it is asked for now.
        start: Before its first round.
        data: Digest of its clients' data.

    Raises:
        UsageError: if the folder's run is another one, or was made without checkpoints.
        FedmergeError: if no checkpoint can be used.
    """
    found, faults = checkpoint.latest(folder, start, request=digest_of_request(setup), data=data)
    for fault in faults:
        log.warning("a checkpoint cannot be used: %s", fault)
    if found is not None:
        if faults:
            log.warning("going on from the other one, after round %d", found.manifest.round)
        N = len(setup.data.clients)
        return Standing(found, checkpoint.rounds_seen(folder, found, N), checkpoint.pending_round(folder, found, N))
    if faults:
        raise FedmergeError("no checkpoint of this run can be used, make it again:\n" + "\n".join(faults))
    path = folder / "rounds.jsonl"
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    if lines > 1 or (lines and setup.options.checkpoint_every == 0):
        raise UsageError(
            f"{folder} holds {lines} rounds and no checkpoint: it was made with checkpoint_every=0, or they were "
            "removed; make it again"
        )
    log.warning("no round of %s was finished: it begins anew", folder)
    truncate(path, 0)
    return Standing(None, ())
