"""A file is there whole or not at all."""

import os
import stat

import pytest

from fedmerge.core.files import append_text, make_folder, truncate, write_atomically


def test_a_text_is_written_and_nothing_else_is_left(tmp_path):
    write_atomically(tmp_path / "a.json", "θ = 1\n")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "θ = 1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("a much longer text than the new one")
    write_atomically(path, "short")
    assert path.read_text() == "short"


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o277], ids=["open", "usual", "strange"])
def any_umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_private_file_is_its_owners_whatever_the_umask(tmp_path, any_umask):
    write_atomically(tmp_path / "a", "text", private=True)
    append_text(tmp_path / "b", "text", private=True)
    assert mode(tmp_path / "a") == mode(tmp_path / "b") == 0o600


def test_an_ordinary_file_follows_the_umask(tmp_path, any_umask):
    write_atomically(tmp_path / "a", b"bytes")
    append_text(tmp_path / "b", "text")
    assert mode(tmp_path / "a") == mode(tmp_path / "b") == 0o666 & ~any_umask


def test_a_private_file_is_closed_before_its_first_byte(tmp_path, any_umask, monkeypatch):
    """Every descriptor is looked at when it is turned into a file to write to: nothing can be written earlier."""
    seen, fdopen = [], os.fdopen

    def looked_at(descriptor, *rest):
        found = os.fstat(descriptor)
        seen.append((stat.S_IMODE(found.st_mode), found.st_size))
        return fdopen(descriptor, *rest)

    monkeypatch.setattr("os.fdopen", looked_at)
    write_atomically(tmp_path / "a", "text", private=True)
    append_text(tmp_path / "b", "text", private=True)
    assert seen == [(0o600, 0), (0o600, 0)]


def test_a_file_that_others_could_read_is_private_once_rewritten(tmp_path):
    for name in ("a", "a.part", "b"):
        (tmp_path / name).write_text("older\n")
        (tmp_path / name).chmod(0o666)
    write_atomically(tmp_path / "a", "new", private=True)
    append_text(tmp_path / "b", "new", private=True)
    assert mode(tmp_path / "a") == mode(tmp_path / "b") == 0o600
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "b").read_text() == "older\nnew"


def test_the_rest_of_a_killed_run_is_not_written_into(tmp_path):
    """Whoever holds an open remains of the file from before must not see what is written now."""
    (tmp_path / "a.part").write_text("half")
    with (tmp_path / "a.part").open() as others:
        write_atomically(tmp_path / "a", "secret", private=True)
        assert others.read() == "half"


# ---------------------------------------------------------------- what outlives a power cut


@pytest.fixture
def synced(monkeypatch):
    """What has been flushed to the disk, in order: names of files and folders, with the length at that time."""
    seen, fsync = [], os.fsync

    def noted(descriptor):
        path, found = os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor)
        seen.append((os.path.basename(path), found.st_size if stat.S_ISREG(found.st_mode) else "folder"))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", noted)
    return seen


linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to see what is flushed")


@linux
def test_a_whole_file_is_flushed_before_its_name_and_its_name_before_the_end(tmp_path, synced):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_atomically(folder / "a", b"12345")
    assert synced == [("a.part", 5), ("folder", "folder")]


@linux
def test_a_durable_line_is_flushed_and_so_is_the_name_of_a_new_file(tmp_path, synced):
    folder = tmp_path / "folder"
    folder.mkdir()
    append_text(folder / "a", "123\n", durable=True)
    append_text(folder / "a", "45\n", durable=True)
    assert synced == [("a", 4), ("folder", "folder"), ("a", 7)]


@linux
def test_an_ordinary_line_costs_no_flush(tmp_path, synced):
    append_text(tmp_path / "a", "123\n")
    assert synced == []


@linux
def test_a_cut_is_flushed(tmp_path, synced):
    (tmp_path / "a").write_bytes(b"12345")
    truncate(tmp_path / "a", 3)
    assert (tmp_path / "a").read_bytes() == b"123"
    assert synced == [("a", 3)]


@linux
def test_every_new_folder_is_flushed_into_the_one_above_it(tmp_path, synced):
    top = tmp_path / "top"
    top.mkdir()
    make_folder(top / "runs" / "one")
    assert (top / "runs" / "one").is_dir()
    assert synced == [("runs", "folder"), ("top", "folder")]
    make_folder(top / "runs" / "one")
    assert len(synced) == 2


def test_nothing_is_made_of_a_file_that_is_not_there(tmp_path):
    truncate(tmp_path / "a", 3)
    assert not (tmp_path / "a").exists()


def test_what_was_appended_is_given_back(tmp_path):
    assert append_text(tmp_path / "a", "θ\n") == "θ\n".encode()
    assert append_text(tmp_path / "a", "W\n", durable=True) == b"W\n"
    assert (tmp_path / "a").read_text(encoding="utf-8") == "θ\nW\n"


WAYS = {
    "whole": lambda path: write_atomically(path, "text"),
    "private": lambda path: write_atomically(path, "text", private=True),
    "line": lambda path: append_text(path, "text", durable=True),
    "cut": lambda path: truncate(path, 1),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_failure_names_the_file_and_the_reason(way, tmp_path, monkeypatch):
    """The system does not say which file a descriptor belongs to."""
    (tmp_path / "a").write_text("older")

    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        way(tmp_path / "a")
    assert caught.value.filename == str(tmp_path / "a")
    assert (caught.value.errno, caught.value.strerror) == (5, "Input/output error")


def test_the_first_fault_is_told_where_tidying_up_fails_too(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    def broken(path, *rest, **more):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr("os.unlink", broken)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(tmp_path / "a", "text")


def test_no_descriptor_is_left_open_after_a_failure(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("older")

    def broken(descriptor):
        raise OSError(5, "Input/output error")

    before = _lowest_free_descriptor()
    monkeypatch.setattr("os.fsync", broken)
    for way in WAYS.values():
        with pytest.raises(OSError, match="Input/output error"):
            way(tmp_path / "a")
    monkeypatch.setattr("os.fchmod", lambda descriptor, mode: broken(descriptor))
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "a", "text", private=True)
    assert _lowest_free_descriptor() == before


def _lowest_free_descriptor():
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor
