"""A checkpoint is used whole or not at all, and says what is wrong with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.experiment.checkpoint import (
    MAGIC,
    MOST_MANIFEST,
    SLOTS,
    Manifest,
    best_path,
    digest,
    latest,
    own_tensors,
    packed,
    progress_tensors,
    prune,
    remove_all,
    restored,
    rounds_seen,
    tensor_bytes,
    unpacked,
    write_best,
    write_slot,
)
from fedmerge.experiment.simulation import Progress
from fedmerge.runtime import Fleet

A, B, C = (letter * 64 for letter in "abc")


@dataclass(frozen=True)
class Server:
    models: Tensor
    count: Tensor


def progress_at(round_number: int, policy: str = "local") -> Progress:
    """Two clients that keep a tensor each, and buffers."""
    r = float(round_number)
    server = Server(torch.tensor([[r, 1.0], [2.0, 3.0]]), torch.tensor(round_number))
    fleet = Fleet(
        private=((torch.tensor([r]), {"k": torch.tensor(7)}), (torch.tensor([r + 1]), {"k": torch.tensor(8)})),
        buffers=(torch.tensor([r + 2]), torch.tensor([r + 3])),
        policy=policy,
        num_trainable=2,
    )
    return Progress(server, fleet, round_number)


START = progress_at(0)
LINES = b"".join(
    json.dumps(
        {"round": r, "cohort": [], "seconds": 0.0, "bytes_down": 0, "bytes_up": 0, "forward": 0, "backward": 0,
         "state": {}}
    ).encode() + b"\n"
    for r in range(4)
)  # fmt: skip


def manifest_of(round_number: int = 2, selected: int = 1, **changes: Any) -> Manifest:
    """Of the state at a round, while another is selected."""
    stop = [i + 1 for i, byte in enumerate(LINES) if byte == 10][round_number]
    best = digest(tensor_bytes(progress_at(selected))) if selected >= 0 else ""
    return replace(
        Manifest(
            round=round_number, request=A, data=B, tensors=digest(tensor_bytes(progress_at(round_number))), lines=stop,
            records=digest(LINES[:stop]), selected=selected, best=best, seconds=1.5,
        ),
        **changes,
    )  # fmt: skip


def same(one: Progress, other: Progress) -> bool:
    return one.round == other.round and tensor_bytes(one) == tensor_bytes(other)


# ---------------------------------------------------------------- tensors


def test_all_that_changes_is_there_by_name() -> None:
    assert set(progress_tensors(START)) == {
        "server.models", "server.count", "client.0.0", "client.0.1", "client.1.0", "client.1.1", "buffers.0",
        "buffers.1",
    }  # fmt: skip


@pytest.mark.parametrize("policy", ["merge", "recalibrate"])
def test_buffers_that_are_not_the_clients_own_are_not_there(policy: str) -> None:
    assert not [name for name in progress_tensors(progress_at(0, policy)) if name.startswith("buffers")]


def test_clients_without_buffers_have_none() -> None:
    fleet = replace(START.fleet, buffers=(torch.empty(0), torch.empty(0)))
    assert not [name for name in progress_tensors(replace(START, fleet=fleet)) if name.startswith("buffers")]


def test_tensors_for_files_share_no_memory_with_the_state() -> None:
    flipped = Server(START.state.models.T, START.state.count)
    own = own_tensors(replace(START, state=flipped))
    assert own["server.models"].is_contiguous()
    own["server.models"].zero_()
    assert float(START.state.models[1, 1]) == 3


def test_equal_states_give_equal_bytes_and_others_do_not() -> None:
    assert tensor_bytes(progress_at(1)) == tensor_bytes(progress_at(1))
    assert tensor_bytes(progress_at(1)) != tensor_bytes(progress_at(2))


def test_a_restored_state_is_the_one_that_was_saved() -> None:
    assert same(restored(START, progress_tensors(progress_at(3)), 3), progress_at(3))
    assert restored(START, progress_tensors(progress_at(3)), 3).fleet.private[1][1]["k"] == 8


def test_buffers_that_were_not_saved_are_those_of_the_start() -> None:
    start, later = progress_at(0, "merge"), progress_at(3, "merge")
    assert restored(start, progress_tensors(later), 3).fleet.buffers == start.fleet.buffers


TENSORS = progress_tensors(progress_at(3))
ODD_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "missing": ({k: v for k, v in TENSORS.items() if k != "client.1.0"}, r"not the tensors of this run: client.1.0$"),
    "superfluous": ({**TENSORS, "client.2.0": torch.zeros(1)}, r"not the tensors of this run: client.2.0$"),
    "five": ({**TENSORS, **dict.fromkeys("vwxyz", torch.zeros(1))}, r"of this run: v, w, x, y, z$"),
    "six": ({**TENSORS, **dict.fromkeys("uvwxyz", torch.zeros(1))}, r"of this run: u, v, w, x, y \.\.\.$"),
    "dtype": (
        {**TENSORS, "server.models": torch.zeros(2, 2, dtype=torch.float64)},
        r"server.models is torch.float64 with 2 axes; expected torch.float32 with 2",
    ),
    "rank": ({**TENSORS, "server.models": torch.zeros(4)}, "float32 with 1 axes; expected torch.float32 with 2"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), ODD_TENSORS.values(), ids=ODD_TENSORS)
def test_tensors_of_another_run_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(FedmergeError, match=message):
        restored(START, tensors, 3)


def test_a_state_that_grew_may_have_grown() -> None:
    """Methods that split clusters have more models later."""
    tensors = {**TENSORS, "server.models": torch.zeros(5, 2)}
    assert restored(START, tensors, 3).state.models.shape == (5, 2)


@dataclass(frozen=True)
class Careful:
    models: Tensor

    def __post_init__(self) -> None:
        if len(self.models) > 1:
            raise ValueError("one too many")


def test_tensors_that_contradict_each_other_are_refused() -> None:
    start = replace(START, state=Careful(torch.zeros(1)))
    tensors = {**progress_tensors(start), "server.models": torch.zeros(2)}
    with pytest.raises(FedmergeError, match="its tensors contradict each other: one too many"):
        restored(start, tensors, 1)


# ---------------------------------------------------------------- content


CONTENT = packed(manifest_of(), tensor_bytes(progress_at(2)))


def test_what_was_packed_is_unpacked() -> None:
    assert unpacked(CONTENT) == (manifest_of(), tensor_bytes(progress_at(2)))


def test_every_changed_bit_is_noticed() -> None:
    for at in range(len(CONTENT)):
        changed = bytearray(CONTENT)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(FedmergeError):
            unpacked(bytes(changed))


def test_every_cut_is_noticed() -> None:
    for length in range(len(CONTENT)):
        with pytest.raises(FedmergeError):
            unpacked(CONTENT[:length])
    with pytest.raises(FedmergeError, match="digest of its tensors"):
        unpacked(CONTENT + b"x")


def sealed(text: bytes, tensors: bytes = b"") -> bytes:
    """A file whose digests are right whatever its manifest says."""
    head = MAGIC + len(text).to_bytes(8, "little") + text
    return head + hashlib.sha256(head).digest() + tensors


def said_of(**changes: Any) -> bytes:
    table = {**dataclasses.asdict(manifest_of(tensors=digest(b""))), **changes}
    return sealed(json.dumps({key: value for key, value in table.items() if value != "left out"}).encode())


ODD_CONTENT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it does not begin with 'fedmerge checkpoint 1'$"),
    "another version": (CONTENT.replace(b"checkpoint 1", b"checkpoint 2", 1), "does not begin with"),
    "only the beginning": (MAGIC, "it is cut off, or the length of its manifest is wrong"),
    "long manifest": (sealed(b" " * MOST_MANIFEST + b"{}"), "the length of its manifest is wrong"),
    "no JSON": (sealed(b"round = 1"), "its manifest is no JSON: "),
    "a list": (sealed(b"[]"), "its manifest is no JSON: "),
    "unknown key": (said_of(wheel=1), "unknown option 'wheel'"),
    "missing key": (said_of(best="left out"), "manifest.best"),
    "text for a number": (said_of(round="1"), "manifest.round: got '1'"),
    "short digest": (said_of(request="a" * 63), "a digest is not 64 hexadecimal digits"),
    "capital digest": (said_of(data="A" * 64), "a digest is not 64 hexadecimal digits"),
    "digest of records": (said_of(records="g" * 64), "a digest is not 64 hexadecimal digits"),
    "digest of the best": (said_of(best="a"), "a digest is not 64 hexadecimal digits"),
    "digest of the tensors": (said_of(tensors=""), "a digest is not 64 hexadecimal digits"),
    "round": (said_of(round=-1, selected=-1, best=""), "its manifest is wrong: a number is out of range"),
    "large round": (said_of(round=1 << 40), "a number is out of range"),
    "lines": (said_of(lines=-1), "a number is out of range"),
    "many lines": (said_of(lines=1 << 60), "a number is out of range"),
    "selected later": (said_of(selected=3), "a number is out of range"),
    "selected earlier than never": (said_of(selected=-2, best=""), "a number is out of range"),
    "selected without digest": (said_of(best=""), "there only together"),
    "digest without selected": (said_of(selected=-1), "there only together"),
    "seconds": (said_of(seconds=-0.1), "seconds are negative"),
    "NaN": (sealed(said_of()[len(MAGIC) + 8 : -32].replace(b"1.5", b"NaN")), "its manifest"),
    "other tensors": (said_of() + b"x", "the digest of its tensors does not fit"),
}


@pytest.mark.parametrize(("content", "message"), ODD_CONTENT.values(), ids=ODD_CONTENT)
def test_what_is_wrong_is_said(content: bytes, message: str) -> None:
    with pytest.raises(FedmergeError, match=message):
        unpacked(content)


FINE: dict[str, bytes] = {
    "as it is": said_of(),
    "nothing selected": said_of(selected=-1, best=""),
    "selected now": said_of(selected=2),
    "the first round": said_of(round=0, selected=0),
    "many rounds": said_of(round=(1 << 40) - 1, lines=(1 << 60) - 1),
    "no time": said_of(seconds=0),
    "nothing written": said_of(lines=0),
    "a long manifest": sealed(said_of()[len(MAGIC) + 8 : -32].ljust(MOST_MANIFEST)),
}


@pytest.mark.parametrize("content", FINE.values(), ids=FINE)
def test_the_limits_themselves_are_fine(content: bytes) -> None:
    unpacked(content)


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Slot a has round 1, selected then; slot b has round 2, round 1 still being selected."""
    (tmp_path / "rounds.jsonl").write_bytes(LINES)
    write_best(tmp_path, 1, tensor_bytes(progress_at(1)))
    for slot, round_number in enumerate((1, 2)):
        write_slot(tmp_path, slot, manifest_of(round_number), tensor_bytes(progress_at(round_number)))
    return tmp_path


def found_in(folder: Path, request: str = A, data: str = B) -> Any:
    return latest(folder, START, request=request, data=data)


def test_the_later_one_is_found(folder: Path) -> None:
    found, faults = found_in(folder)
    assert faults == []
    assert (found.slot, found.manifest) == (1, manifest_of(2))
    assert same(found.last, progress_at(2))
    assert same(found.selected, progress_at(1))


def test_the_later_one_may_be_in_the_first_slot(folder: Path) -> None:
    write_slot(folder, 0, manifest_of(3), tensor_bytes(progress_at(3)))
    found, _ = found_in(folder)
    assert (found.slot, found.manifest.round) == (0, 3)


def test_a_state_that_is_selected_itself_needs_no_other_file(folder: Path) -> None:
    (folder / SLOTS[1]).unlink()
    best_path(folder, 1).unlink()
    found, faults = found_in(folder)
    assert faults == []
    assert found.selected is found.last
    assert same(found.last, progress_at(1))


def test_with_nothing_selected_the_start_is(folder: Path) -> None:
    write_slot(folder, 1, manifest_of(2, selected=-1), tensor_bytes(progress_at(2)))
    found, _ = found_in(folder)
    assert found.selected is START


def test_a_folder_without_any_has_none(tmp_path: Path) -> None:
    assert found_in(tmp_path) == (None, [])


def test_the_files_are_their_owners(folder: Path) -> None:
    assert {(folder / name).stat().st_mode & 0o777 for name in (*SLOTS, "checkpoint-best-1")} == {0o600}


@pytest.mark.parametrize("name", SLOTS)
def test_other_requests_and_data_are_refused_even_beside_a_good_one(folder: Path, name: str) -> None:
    slot = SLOTS.index(name)
    write_slot(folder, slot, manifest_of(1 + slot, request=C), tensor_bytes(progress_at(1 + slot)))
    with pytest.raises(UsageError, match=f"{name} was made with another configuration than is asked for now"):
        found_in(folder)
    write_slot(folder, slot, manifest_of(1 + slot, data=C), tensor_bytes(progress_at(1 + slot)))
    with pytest.raises(UsageError, match=f"{name} was made on other data than are there now"):
        found_in(folder)


BROKEN: dict[str, tuple[str, str]] = {
    "no best state": ("checkpoint-best-1", "No such file or directory"),
    "no rounds": ("rounds.jsonl", "No such file or directory"),
}


@pytest.mark.parametrize(("name", "message"), BROKEN.values(), ids=BROKEN)
def test_what_it_needs_must_be_there(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    _, faults = found_in(folder)
    assert message in faults[-1]
    assert faults[-1].startswith(f"{folder / SLOTS[1]}: ")


def test_another_best_state_is_noticed(folder: Path) -> None:
    write_best(folder, 1, tensor_bytes(progress_at(0)))
    found, faults = found_in(folder)
    assert found.manifest.round == 1  # which is selected itself
    assert faults == [f"{folder / SLOTS[1]}: checkpoint-best-1 does not have the digest that it should have"]


def test_rounds_must_begin_as_they_did(folder: Path) -> None:
    (folder / "rounds.jsonl").write_bytes(LINES[: manifest_of(2).lines])
    assert found_in(folder)[1] == []
    (folder / "rounds.jsonl").write_bytes(LINES[: manifest_of(2).lines - 1])
    found, faults = found_in(folder)
    assert found.manifest.round == 1
    assert faults == [f"{folder / SLOTS[1]}: rounds.jsonl does not begin with the rounds that it saw"]


def test_a_length_that_no_memory_holds_is_only_wrong(folder: Path) -> None:
    write_slot(folder, 1, manifest_of(2, lines=(1 << 60) - 1), tensor_bytes(progress_at(2)))
    _, faults = found_in(folder)
    assert faults == [f"{folder / SLOTS[1]}: rounds.jsonl does not begin with the rounds that it saw"]


def test_the_rounds_that_it_saw_are_read_and_no_others(folder: Path) -> None:
    found, _ = found_in(folder)
    with (folder / "rounds.jsonl").open("ab") as file:
        file.write(b"\0\0\n")
    assert [line.round for line in rounds_seen(folder, found, 2)] == [0, 1, 2]


def test_a_round_that_cannot_be_is_told_with_its_file(folder: Path) -> None:
    odd = LINES.replace(b'"cohort": []', b'"cohort": [7]', 1)
    (folder / "rounds.jsonl").write_bytes(odd)
    seen = manifest_of(0, selected=-1, lines=odd.index(b"\n") + 1, records=digest(odd[: odd.index(b"\n") + 1]))
    write_slot(folder, 0, seen, tensor_bytes(progress_at(0)))
    (folder / SLOTS[1]).unlink()
    found, _ = found_in(folder)
    with pytest.raises(FedmergeError, match=f"{folder / 'rounds.jsonl'}, line 1"):
        rounds_seen(folder, found, 2)


def test_only_states_that_are_referred_to_stay(folder: Path) -> None:
    for number in (0, 1, 2, 11):
        write_best(folder, number, b"")
    (folder / "checkpoint-best-11.part").touch()
    prune(folder, {1, 11, -1})
    assert sorted(path.name for path in folder.glob("checkpoint-best*")) == ["checkpoint-best-1", "checkpoint-best-11"]
    assert (folder / SLOTS[0]).exists()


def test_all_of_them_can_go(folder: Path) -> None:
    (folder / "checkpoint-b.part").touch()
    (folder / "models.safetensors").touch()
    remove_all(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["models.safetensors", "rounds.jsonl"]
    remove_all(folder)
