"""Files made to harm: they claim terabytes, unpack to gigabytes or hold code; each is refused with a word, at once."""

from __future__ import annotations

import gzip
import io
import json
import resource
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmerge.core.errors import DataError
from fedmerge.data import archive
from fedmerge.data.form import form_from_plain
from fedmerge.data.npz import read_arrays
from fedmerge.data.partition import ClientPart, Partition
from fedmerge.data.readers import read_npz

MEGABYTE = 2**20
AT_MOST = 64 * MEGABYTE
"""Memory that refusing a file may take; each of them would take gigabytes to believe."""


def peak(action: Callable[[], object]) -> int:
    """Bytes that Python and numpy allocate at most while something is done."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(action: Callable[[], object], told: str, error: type[Exception] = DataError) -> None:
    """It is refused with this word, without much memory."""

    def attempt() -> None:
        with pytest.raises(error, match=told) as caught:
            action()
        assert str(caught.value).isprintable()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak(attempt) < AT_MOST
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2 * AT_MOST


def npy(shape: tuple[int, ...], descr: Any = "<f8", content: bytes = b"") -> bytes:
    """An array's file with this header, whatever its content."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


# ------------------------------------------------------------------------------------------------ a client's .npz


def test_sound_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "x": np.arange(6.0).reshape(2, 3),
        "y": np.array(["a", "bc"]),
        "n": np.empty((0, 4), np.uint8),
        "f": np.asfortranarray(np.arange(6).reshape(2, 3)),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = read_arrays(tmp_path / "a.npz")
        assert all(np.array_equal(found[name], array) for name, array in arrays.items())
        assert [found[name].dtype for name in arrays] == [array.dtype for array in arrays.values()]


@pytest.mark.parametrize(
    ("member", "told"),
    [
        (npy((10**12,)), r"x\.npy is float64 \[1000000000000\], which needs 8,000,000,000,000 bytes; it has 0"),
        (npy((2**40, 2**40)), "which needs"),
        (npy((3,), content=b"x" * 16), r"x\.npy is float64 \[3\], which needs 24 bytes; it has 16"),
        (npy((-1,)), "an array has the shape"),
        (npy((2,), "|O", b"x" * 16), r"x\.npy holds Python objects"),
        (npy((2,), [("a", "<f8"), ("b", "|O")], b"x" * 32), r"x\.npy holds Python objects"),
        (npy((2,), [("a", "<f8")], b"x" * 16), r"x\.npy holds \[\('a', '<f8'\)\]; expected numbers or texts"),
        (npy((2,), "<M8[s]", b"x" * 16), "holds datetime64"),
        (b"\x93NUMPY\x03\x00" + b"\xff" * 100, r"format \(3, 0\)"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{}", "cannot be read"),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 24) + b"__import__('os').getcwd()"[:24], "cannot be read"),
        (b"\x80\x04cos\nsystem\n", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_an_array_that_is_not_what_it_says_is_refused(tmp_path: Path, member: bytes, told: str) -> None:
    path = zipped(tmp_path / "a.npz", {"x.npy": member, "y.npy": npy((2,), content=b"x" * 16)})
    refused(lambda: read_npz(path, "label"), told)


def test_a_bomb_of_zeros_is_refused(tmp_path: Path) -> None:
    """A gigabyte in one megabyte: the array is as large as it says, and nobody has such examples."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("x.npy", "w", force_zip64=True) as member:
        member.write(npy((2**27,)))
        for _ in range(1024):
            member.write(bytes(MEGABYTE))
    refused(lambda: read_npz(path, "label"), "unpack to 1,073,741,952, which no file of examples does")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_of_packing_are_refused(tmp_path: Path, method: int) -> None:
    path = zipped(tmp_path / "a.npz", {"x.npy": npy((0, 2)), "y.npy": npy((0,))}, method)
    refused(lambda: read_npz(path, "label"), "packed in a way that numpy does not write")


@pytest.mark.parametrize("code", [0xD800, 0xDFFF, 0x110000, 2**31])
@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_that_are_no_letters_are_refused_as_labels(tmp_path: Path, code: int, order: str) -> None:
    """numpy would crash with a SystemError as soon as somebody looks at one."""
    letters = np.array([[65, 0], [code, 0]], dtype=np.dtype("u4").newbyteorder(order))
    labels = npy((2,), f"{order}U2", letters.tobytes())
    path = zipped(tmp_path / "a.npz", {"x.npy": npy((2, 1), content=bytes(16)), "y.npy": labels})
    refused(lambda: read_npz(path, "label"), r"y\.npy holds numbers that are no letters")


def test_letters_of_both_byte_orders_are_read(tmp_path: Path) -> None:
    for order in "<>":
        np.savez(tmp_path / "a.npz", y=np.array(["a", "\U0010ffff"], dtype=f"{order}U2"), z=np.array([], dtype="U1"))
        assert read_arrays(tmp_path / "a.npz")["y"].tolist() == ["a", "\U0010ffff"]


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", {"x.npy": npy((0,)), "z.npy": npy((0,))})
    path.write_bytes(path.read_bytes().replace(b"z.npy", b"x.npy"))
    refused(lambda: read_arrays(path), "each name once", ValueError)


# ------------------------------------------------------------------------------------------------ archives


def test_an_archive_never_writes_outside_or_anywhere(tmp_path: Path) -> None:
    """Members with names that leave the folder are texts by a strange name, and nothing is unpacked."""
    strange = "../../escape.txt"
    zipped(tmp_path / "a.whl", {strange: b"text"})
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as file:
        for name, kind in ((strange, tarfile.REGTYPE), ("link", tarfile.SYMTYPE), ("/hard", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member, io.BytesIO())
    assert archive.read_wheel_folder(tmp_path / "a.whl", "") == {strange: b"text"}
    assert archive.read_tgz_folder(tmp_path / "a.tgz", "") == {strange: b""}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tgz", "a.whl"]


def test_archives_that_unpack_to_too_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is lowered, so that the test need not write a gigabyte."""
    monkeypatch.setattr(archive, "MOST_BYTES", 100 * 1024)
    zipped(tmp_path / "a.whl", {"a": bytes(60 * 1024), "b": bytes(60 * 1024)})
    refused(lambda: archive.read_wheel_folder(tmp_path / "a.whl", ""), "expected 102,400 at most")
    assert len(archive.read_wheel_folder(tmp_path / "a.whl", "a")["a"]) == 60 * 1024
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as file:
        member = tarfile.TarInfo("a")
        member.size = 120 * 1024
        file.addfile(member, io.BytesIO(bytes(member.size)))
    refused(lambda: archive.read_tgz_folder(tmp_path / "a.tgz", ""), "over 102,400 bytes")


def test_a_wheel_member_larger_than_it_says_is_not_unpacked_whole(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.whl", {"a": bytes(200 * MEGABYTE)})
    content = path.read_bytes()
    stated, true = struct.pack("<L", 10), struct.pack("<L", 200 * MEGABYTE)
    path.write_bytes(content.replace(true, stated))
    refused(lambda: archive.read_wheel(path, "a"), "is not a readable wheel")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_header_that_claims_terabytes_is_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("a")
    member.type, member.size = kind, 10**12
    (tmp_path / "a.tgz").write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    refused(lambda: archive.read_tgz_folder(tmp_path / "a.tgz", ""), "or says so")


@pytest.mark.parametrize("size", [b"-60", b"9" * 10, b"x", b"1e3"])
def test_a_debian_package_with_a_strange_size_is_refused(tmp_path: Path, size: bytes) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(b"!<arch>\n" + b"control".ljust(48) + size.ljust(10) + b"`\n" + b"x" * 100)
    refused(lambda: archive.read_deb_folder(path, ""), "is not a readable Debian package")


# ------------------------------------------------------------------------------------------------ our own files


def test_a_partition_of_a_pool_of_a_trillion_rows_takes_no_memory(tmp_path: Path) -> None:
    """Its hash is right; the size of the pool is a claim like any other."""
    rows = [np.array([number], dtype=np.int64) for number in (0, 10**12 - 1, 5)]
    made = Partition("iid", 0, {}, "pool", "00", 10**12, (ClientPart("a", *rows),))
    made.save(tmp_path / "p.json")
    assert peak(lambda: Partition.load(tmp_path / "p.json")) < AT_MOST
    plain = json.loads((tmp_path / "p.json").read_text())
    plain["clients"][0]["test"] = [0]
    (tmp_path / "p.json").write_text(json.dumps(plain))
    refused(lambda: Partition.load(tmp_path / "p.json"), "row 0 is used for train and for test")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shape": [10**6, 10**6]}, r"got shape \[1000000, 1000000\]; expected 268,435,456 numbers at most"),
        ({"shape": [0]}, "expected whole numbers >= 1"),
        ({"shape": [2.0]}, r"got shape \[2.0\]"),
        ({"shape": "2"}, "got shape '2'"),
        ({"dtype": "object"}, "got dtype 'object'"),
        ({"mean": [1.0, 2.0, 3.0]}, r"got mean \[1.0, 2.0, 3.0\]; expected finite numbers for inputs of shape \[2\]"),
        ({"mean": [[1.0], [2.0]]}, "got mean"),
        ({"mean": 1e300}, "got mean"),
        ({"mean": "x"}, "got mean"),
        ({"std": [1.0, 0.0]}, "got std with 0 in it"),
        ({"std": None}, "got std None"),
        ({"columns": [1, 2]}, r"got columns \[1, 2\]"),
    ],
)
def test_a_form_of_inputs_that_no_run_writes_is_refused(changes: dict[str, Any], told: str) -> None:
    sound = {"shape": [2], "dtype": "float32", "mean": [0.0, 1.0], "std": 1.0, "columns": ["a", "b"]}
    assert form_from_plain(sound).shape == (2,)
    refused(lambda: form_from_plain({**sound, **changes}), told)
