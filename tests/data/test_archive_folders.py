"""Folders of wheels and of gzipped tar files are read into memory by path."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest
from tiny_archives import write_tgz, write_wheel

from fedmerge.core.errors import DataError
from fedmerge.data.archive import read_tgz_folder, read_wheel_folder

MEMBERS = {"data/x.txt": b"1", "data/sub/y.txt": b"2", "data/z.json": b"3", "other/x.txt": b"4"}
KINDS = {
    "wheel": (lambda folder: write_wheel(folder, "tiny", "1", MEMBERS), read_wheel_folder),
    "tgz": (lambda folder: write_tgz(folder / "a.tgz", MEMBERS), read_tgz_folder),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_by_path_and_ending(tmp_path, kind):
    write, read = KINDS[kind]
    path = write(tmp_path)
    assert read(path, "data/", ending=".txt") == {"data/x.txt": b"1", "data/sub/y.txt": b"2"}
    assert read(path, "data/") == {name: content for name, content in MEMBERS.items() if name.startswith("data/")}
    assert read(path, "nothing/") == {}
    assert MEMBERS.items() <= read(path, "").items()


@pytest.mark.parametrize("kind", KINDS)
def test_a_torn_archive_is_a_data_error(tmp_path, kind):
    write, read = KINDS[kind]
    path = write(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 30, 31):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=path.name):
            read(path, "data/")


def test_folders_and_links_are_no_files(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in {"data": tarfile.DIRTYPE, "data/link": tarfile.SYMTYPE}.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/hostname"
            archive.addfile(entry)
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(buffer.getvalue()))
    assert read_tgz_folder(path, "") == {}
    assert "data/" not in read_wheel_folder(write_wheel(tmp_path, "tiny", "1", {"data/": b"", "data/x": b"1"}), "data/")
