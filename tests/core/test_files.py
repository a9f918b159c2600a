"""A file is there whole or not at all."""

import pytest

from fedmerge.core.files import write_atomically


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
