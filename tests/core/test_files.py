"""A file is there whole or not at all."""

import os
import stat

import pytest

from fedmerge.core.files import append_text, write_atomically


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
