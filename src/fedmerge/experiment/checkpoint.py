"""What a run needs to go on after its process has died: durable before a round is announced, checked before it is used.

A run folder holds, while the run goes on::

    checkpoint-a, checkpoint-b     the state after the latest two checkpoints, in turn
    checkpoint-best-<round>        the state at the round that validation has selected so far

Each is written to a file beside it, flushed to the disk, renamed, and the folder flushed: at any moment a whole one is
there. A file is a line that names its kind, the length of a manifest (8 bytes), the manifest (JSON), the SHA-256 of
all that, and the tensors (safetensors), whose SHA-256 the manifest holds. Randomness has no state
(`core/randomness.py`), so the number of the round is all there is to say of it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.files import write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.protocol import in_type, state_tensors, with_tensors
from fedmerge.core.strict_json import parse_json_table
from fedmerge.core.tensor_files import read_tensors
from fedmerge.experiment.record import RoundRecord, rounds_from
from fedmerge.experiment.simulation import Progress
from fedmerge.runtime import Fleet

MAGIC = b"fedmerge checkpoint 1\n"
SLOTS = ("checkpoint-a", "checkpoint-b")
_BEST = "checkpoint-best-"
_LENGTH, _DIGEST = 8, 32
MOST_MANIFEST = 1 << 24
"""Bytes."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says beside its tensors.

    Attributes:
        round: Completed rounds.
        request: Digest of what was asked for, see `digest_of_request`.
        data: Digest of the clients' data.
        tensors: Digest of the tensors that follow.
        lines: Length in bytes of ``rounds.jsonl`` after that round.
        records: Digest of these bytes.
        selected: The round that validation has selected so far; −1 for none.
        best: Digest of the tensors at that round.
        seconds: Wall time of the run so far.
        pending: The record of that round as JSON, where its clients' scores are still to come and it is not among the
            lines yet; empty otherwise.
    """

    round: int
    request: str
    data: str
    tensors: str
    lines: int
    records: str
    selected: int
    best: str
    seconds: float
    pending: str = ""

    def fault(self) -> str | None:
        """Why it cannot be one; None if it can."""
        digests = (self.request, self.data, self.tensors, self.records)
        if not all(_is_digest(text) for text in digests) or not (self.best == "" or _is_digest(self.best)):
            return "a digest is not 64 hexadecimal digits"
        if not (0 <= self.round < 1 << 40 and 0 <= self.lines < 1 << 60 and -1 <= self.selected <= self.round):
            return "a number is out of range"
        if (self.selected >= 0) != (self.best != ""):
            return "a selected round and the digest of its tensors are there only together"
        return None if self.seconds >= 0 else "seconds are negative"


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


# ---------------------------------------------------------------- tensors


def progress_tensors(progress: Progress) -> dict[str, Tensor]:
    """All that changes in a run: ``server.*``, what clients keep as ``client.<i>.<k>``, and ``buffers.<i>``."""
    server = {f"server.{name}": tensor for name, tensor in state_tensors(progress.state).items()}
    return {**server, **fleet_tensors(progress.fleet)}


def fleet_tensors(fleet: Fleet) -> dict[str, Tensor]:
    """What clients keep, as ``client.<i>.<k>`` and ``buffers.<i>``; `restored_fleet` is the inverse."""
    tensors: dict[str, Tensor] = {}
    for i, (private, buffers) in enumerate(zip(fleet.private, fleet.buffers, strict=True)):
        tensors.update({f"client.{i}.{k}": leaf for k, leaf in enumerate(tree_leaves(private))})
        if fleet.policy == "local" and len(buffers):
            tensors[f"buffers.{i}"] = buffers
    return tensors


def own_tensors(progress: Progress) -> dict[str, Tensor]:
    """The same as `progress_tensors`, each in memory of its own, as files need them."""
    return in_own_memory(progress_tensors(progress))


def in_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share no memory with each other."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def tensor_bytes(progress: Progress) -> bytes:
    """The same as a safetensors file; equal states give equal bytes."""
    return save(own_tensors(progress))


def restored(start: Progress, tensors: Mapping[str, Tensor], round_number: int) -> Progress:
    """The progress that these tensors describe.

    Args:
        start: Of the same run before its first round: says what there must be.
        tensors: From `progress_tensors`.
        round_number: Completed rounds.

    Raises:
        FedmergeError: if a tensor is missing, superfluous, or of another dtype or rank.
    """
    expected = progress_tensors(start)
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        raise FedmergeError(f"it has not the tensors of this run: {', '.join(odd[:5])}{' ...' if odd[5:] else ''}")
    for name, tensor in tensors.items():
        if in_type(tensor, expected[name].dtype) is None or tensor.dim() != expected[name].dim():
            form = f"{tensor.dtype} with {tensor.dim()} axes"
            raise FedmergeError(f"{name} is {form}; expected {expected[name].dtype} with {expected[name].dim()}")
    server = {name.removeprefix("server."): t for name, t in tensors.items() if name.startswith("server.")}
    try:
        state = with_tensors(start.state, server)
    except ValueError as error:
        raise FedmergeError(f"its tensors contradict each other: {error}") from error
    return Progress(state, restored_fleet(start.fleet, tensors), round_number)


def restored_fleet(start: Fleet, tensors: Mapping[str, Tensor]) -> Fleet:
    """What clients keep, out of `progress_tensors`; buffers that were not saved are as at the start.

    Args:
        start: Before the first round: says what there must be.
        tensors: By name; others than those of clients may be among them.

    Raises:
        FedmergeError: if one is missing, or of another shape or dtype than at the start.
    """
    private, buffers = [], []
    for i, (own, kept) in enumerate(zip(start.private, start.buffers, strict=True)):
        leaves, spec = tree_flatten(own)
        found = [_like(tensors.get(f"client.{i}.{k}"), leaf, f"client.{i}.{k}") for k, leaf in enumerate(leaves)]
        private.append(tree_unflatten(found, spec))
        buffers.append(_like(tensors.get(f"buffers.{i}", kept), kept, f"buffers.{i}"))
    return replace(start, private=tuple(private), buffers=tuple(buffers))


def _like(found: Tensor | None, own: Tensor, name: str) -> Tensor:
    """A client's saved tensor, which has the form of a fresh client's."""
    if found is None:
        raise FedmergeError(f"it has no {name}")
    if found.shape != own.shape or found.dtype != own.dtype:
        raise FedmergeError(
            f"{name} is {found.dtype} {list(found.shape)}; expected {own.dtype} {list(own.shape)}".replace("torch.", "")
        )
    return found


# ---------------------------------------------------------------- files


def packed(manifest: Manifest, tensors: bytes) -> bytes:
    """A checkpoint as the content of a file."""
    text = json.dumps(asdict(manifest)).encode()
    head = MAGIC + len(text).to_bytes(_LENGTH, "little") + text
    return head + hashlib.sha256(head).digest() + tensors


def unpacked(content: bytes) -> tuple[Manifest, bytes]:
    """Manifest and tensors of a checkpoint, both whole.

    Raises:
        FedmergeError: saying what is wrong with it.
    """
    start = len(MAGIC) + _LENGTH
    if not content.startswith(MAGIC):
        raise FedmergeError(f"it does not begin with {MAGIC.decode().strip()!r}")
    length = int.from_bytes(content[len(MAGIC) : start], "little")
    if length > MOST_MANIFEST or len(content) < start + length + _DIGEST:
        raise FedmergeError("it is cut off, or the length of its manifest is wrong")
    stop = start + length
    if hashlib.sha256(content[:stop]).digest() != content[stop : stop + _DIGEST]:
        raise FedmergeError("the digest of its manifest does not fit")
    manifest, tensors = _manifest_of(content[start:stop]), content[stop + _DIGEST :]
    if digest(tensors) != manifest.tensors:
        raise FedmergeError("the digest of its tensors does not fit")
    return manifest, tensors


def _manifest_of(text: bytes) -> Manifest:
    faults: list[str] = []
    try:
        manifest = build_options(Manifest, parse_json_table(text), "manifest", faults)
    except ValueError as error:
        raise FedmergeError(f"its manifest is no JSON: {error}") from error
    if manifest is None:
        raise FedmergeError("; ".join(faults))
    fault = manifest.fault()
    if fault is not None:
        raise FedmergeError(f"its manifest is wrong: {fault}")
    return manifest


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write_slot(folder: Path, slot: int, manifest: Manifest, tensors: bytes) -> None:
    """Writes a checkpoint over the older one of the two."""
    write_atomically(folder / SLOTS[slot], packed(manifest, tensors), private=True)


def best_path(folder: Path, round_number: int) -> Path:
    """File of the state at a selected round."""
    return folder / f"{_BEST}{round_number}"


def write_best(folder: Path, round_number: int, tensors: bytes) -> None:
    """Writes the state at the round that is selected from now on."""
    write_atomically(best_path(folder, round_number), tensors, private=True)


def prune(folder: Path, keep: set[int]) -> None:
    """Removes the states of selected rounds that no checkpoint refers to."""
    for path in folder.glob(f"{_BEST}*"):
        if path.name.removeprefix(_BEST) not in {str(number) for number in keep}:
            path.unlink(missing_ok=True)


def remove_all(folder: Path) -> None:
    """Removes every checkpoint of a run that needs none any more."""
    prune(folder, set())
    for slot in SLOTS:
        (folder / slot).unlink(missing_ok=True)
        (folder / f"{slot}.part").unlink(missing_ok=True)  # of a process that was killed


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be used.

    Attributes:
        slot: Index of its slot.
        manifest: Beside the tensors.
        last: The state after its round.
        selected: The state at the round that is selected so far.
    """

    slot: int
    manifest: Manifest
    last: Progress
    selected: Progress


def latest(folder: Path, start: Progress, *, request: str, data: str) -> tuple[Found | None, list[str]]:
    """The latest checkpoint of a folder that is whole, and what is wrong with the other.

    Args:
        folder: Of the run.
        start: Of the same run before its first round.
        request: Digest of what is asked for now.
        data: Digest of the data that are there now.

    Raises:
        UsageError: if a checkpoint belongs to another configuration or to other data.
    """
    found, faults = [], []
    for number, slot in enumerate(SLOTS):
        path = folder / slot
        if not path.exists():
            continue
        try:
            found.append(_read(number, path, start, request=request, data=data))
        except (FedmergeError, OSError) as error:
            if isinstance(error, UsageError):
                raise
            faults.append(f"{path}: {error}")
    return max(found, key=lambda one: one.manifest.round, default=None), faults


def _read(slot: int, path: Path, start: Progress, *, request: str, data: str) -> Found:
    manifest, tensors = unpacked(path.read_bytes())
    if manifest.request != request:
        raise UsageError(
            f"{path} was made with another configuration than is asked for now; resume with the same method, network, "
            "training and run options, or make a new run"
        )
    if manifest.data != data:
        raise UsageError(f"{path} was made on other data than are there now; bring the same data, or make a new run")
    _check_records(path.with_name("rounds.jsonl"), manifest)
    last = restored(start, read_tensors(tensors, name=str(path)), manifest.round)
    if manifest.selected == manifest.round:
        return Found(slot, manifest, last, last)
    if manifest.selected < 0:
        return Found(slot, manifest, last, start)
    best = best_path(path.parent, manifest.selected)
    content = best.read_bytes()
    if digest(content) != manifest.best:
        raise FedmergeError(f"{best.name} does not have the digest that it should have")
    return Found(slot, manifest, last, restored(start, read_tensors(content, name=str(best)), manifest.selected))


def pending_round(folder: Path, found: Found, num_clients: int) -> RoundRecord | None:
    """The round that a checkpoint saw and whose scores were still to come; None if there is none.

    Args:
        folder: Of the run.
        found: From `latest`.
        num_clients: Of the run, N.
    """
    text = found.manifest.pending
    return next(rounds_from([text.encode() + b"\n"], num_clients, folder), None) if text else None


def _check_records(path: Path, manifest: Manifest) -> None:
    """The lines of the rounds so far must be those that the checkpoint saw."""
    size = path.stat().st_size if manifest.lines or path.exists() else 0
    if size < manifest.lines or digest(_beginning(path, manifest.lines)) != manifest.records:
        raise FedmergeError(f"{path.name} does not begin with the rounds that it saw")


def _beginning(path: Path, length: int) -> bytes:
    if not length:
        return b""
    with path.open("rb") as file:
        return file.read(length)


def rounds_seen(folder: Path, found: Found, num_clients: int) -> tuple[RoundRecord, ...]:
    """The rounds that a checkpoint saw; whatever stands behind them, torn or not, is of rounds that are made again.

    Args:
        folder: Of the run.
        found: From `latest`.
        num_clients: Of the run, N.
    """
    path = folder / "rounds.jsonl"
    content = io.BytesIO(_beginning(path, found.manifest.lines))
    return tuple(rounds_from(content, num_clients, path))
