"""A tensor file is believed only as a whole: every damage is named, and nothing is allocated before."""

from __future__ import annotations

import json
import os
import resource
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fedmerge.core.errors import FedmergeError
from fedmerge.core.tensor_files import DTYPES, MOST_HEADER, read_tensor_file, read_tensors

SOUND = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}, {"round": "3"})


def made(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, well formed or not, in front of the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def refused(content: bytes, *told: str) -> None:
    with pytest.raises(FedmergeError) as caught:
        read_tensors(content, name="x.safetensors")
    message = str(caught.value)
    assert message.startswith("x.safetensors is damaged: ")
    assert message.isprintable()
    for text in told:
        assert text in message


def test_a_sound_file_is_read_from_disk_and_from_memory(tmp_path: Path) -> None:
    path = tmp_path / "models.safetensors"
    path.write_bytes(SOUND)
    for found in (read_tensor_file(path), read_tensor_file(SOUND)):
        assert found.metadata == {"round": "3"}
        assert found.tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert found.tensors["b"].tolist() == [True, False]
    assert read_tensors(save({})) == {}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (3, 1)])
def test_every_type_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"a": torch.ones(shape, dtype=dtype), "b": torch.zeros(5, dtype=dtype)}
    found = read_tensors(save(tensors), forms={name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes; expected 8 at least"),
        (struct.pack("<Q", 2**63) + b"{}", "its header says that it has 9,223,372,036,854,775,808 bytes"),
        (struct.pack("<Q", 3) + b"{}", "its header says that it has 3 bytes; expected 2..2"),
        (made(b"[]"), "expected a JSON object"),
        (made(b"\xff\xfe{}"), "its header is no plain JSON"),
        (made(b"[" * 100_000), "nested more than 32 deep"),
        (made(b'{"a": 1, "a": 2}'), "the key 'a' stands twice"),
        (made(b'{"a": NaN}'), "got NaN"),
        (made({"a": 5}), "a: got 5; expected dtype, shape and data_offsets"),
        (made({"a": entry(more=1)}, b"x" * 8), "expected dtype, shape and data_offsets"),
        (made({"a": entry(dtype="C64")}, b"x" * 8), "a: got dtype 'C64'; expected one of F64, F32"),
        (made({"a": entry(dtype=["F32"])}, b"x" * 8), "a: got dtype ['F32']"),
        (made({"a": entry(shape=[-2])}, b"x" * 8), "a: got shape [-2]"),
        (made({"a": entry(shape=[2.0])}, b"x" * 8), "a: got shape [2.0]"),
        (made({"a": entry(shape=[True, 2])}, b"x" * 8), "a: got shape [True, 2]"),
        (made({"a": entry(shape=2)}, b"x" * 8), "a: got shape 2"),
        (made({"a": entry(shape=[1] * 33)}, b"x" * 8), "up to 32 whole numbers"),
        (made({"a": entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])}), "a: got shape"),
        (made({"a": entry(shape=[2**40])}, b"x" * 8), "needs 4398046511104 bytes; got the range [0, 8]"),
        (made({"a": entry(data_offsets=[8, 0])}, b"x" * 8), "got the range [8, 0]"),
        (made({"a": entry(data_offsets=[0])}, b"x" * 8), "a: got data_offsets [0]"),
        (made({"a": entry(data_offsets=[4, 12])}, b"x" * 12), "without gap or overlap"),
        (made({"a": entry(), "b": entry()}, b"x" * 8), "without gap or overlap"),
        (made({"a": entry()}, b"x" * 4), "of the 4 bytes after the header"),
        (made({"a": entry()}, b"x" * 12), "of the 12 bytes after the header"),
        (made({}, b"x"), "of the 1 bytes after the header"),
        (made({"__metadata__": {"round": 3}}), "__metadata__ is {'round': 3}; expected texts"),
        (made({"a": entry(dtype="BOOL")}, b"\x00\x02"), "a: BOOL [2] needs 2 bytes"),
        (made({"a": entry(dtype="BOOL", data_offsets=[0, 2])}, b"\x00\x02"), "a: a byte is neither true nor false"),
    ],
)
def test_damage_is_named(content: bytes, told: str) -> None:
    refused(content, told)


@pytest.mark.parametrize(
    "name",
    ["", "../../etc/passwd", "a/../b", "/etc/passwd", "a\x00b", "a\nb", "\x1b[2J", "a\u202eb", "a\\b", "x" * 501],
)
def test_a_name_that_could_be_more_than_a_name_is_refused(name: str) -> None:
    refused(made({name: entry()}, b"x" * 8), "a tensor is called")


def test_every_difference_from_what_must_be_there_is_named() -> None:
    forms = {"a": ((2, 2), torch.float32), "c": ((1,), torch.int64)}
    with pytest.raises(FedmergeError) as caught:
        read_tensors(SOUND, name="x", forms=forms)
    assert str(caught.value) == (
        "x is damaged: it lacks c; it has b, which does not belong there; a is float32 [2, 3]; expected float32 [2, 2]"
    )


def test_a_file_larger_than_allowed_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(10**12)  # a sparse file: nothing is written
    with pytest.raises(FedmergeError, match="it has 1,000,000,000,000 bytes; expected 1,000 at most"):
        read_tensors(path, most_bytes=1000)


def test_a_claimed_size_allocates_nothing(tmp_path: Path) -> None:
    """A header of 60 bytes that claims a terabyte, and one that claims to be as long as it may."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(made({"a": entry(shape=[2**38], data_offsets=[0, 2**40])}), "without gap or overlap")
    refused(struct.pack("<Q", MOST_HEADER) + b"{}", "its header says")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_HEADER / 1024 / 4


def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FedmergeError, match="is damaged: "):
            read_tensors(path)


@given(st.data())
def test_no_change_of_a_byte_escapes_as_another_error(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(SOUND) - 1))
    changed = bytearray(SOUND)
    changed[place] = data.draw(st.integers(0, 255))
    with suppress(FedmergeError):
        read_tensors(bytes(changed))
