"""A site's own configuration file."""

from pathlib import Path

import pytest

from fedmerge.core.errors import UsageError
from fedmerge.deploy.site import SiteConfig, SiteData, read_site

HEAD = 'name = "clinic-a"\nserver = "fed.example.org:9092"\n'


def site_of(folder, text):
    (folder / "site.toml").write_text(text)
    return read_site(folder)


def faults_of(folder, text):
    with pytest.raises(UsageError) as caught:
        site_of(folder, text)
    first, *faults = str(caught.value).splitlines()
    assert first == f"{folder / 'site.toml'}:"
    return faults


def test_paths_start_from_the_site_s_folder(tmp_path):
    site = site_of(tmp_path, HEAD + '[data]\npath = "mine/a.csv"\n')
    assert site == SiteConfig(
        "clinic-a", "fed.example.org:9092", SiteData(path=str(tmp_path / "mine" / "a.csv")), folder=tmp_path
    )
    assert site.state_folder == tmp_path / "state"
    assert not site.anew
    elsewhere = site_of(tmp_path, f'state = "/var/lib/fed"\n{HEAD}[data]\npath = "/data/a.csv"\n')
    assert (elsewhere.state_folder, elsewhere.data.path) == (Path("/var/lib/fed"), "/data/a.csv")


def test_a_site_s_folder_may_be_given_from_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert site_of(Path(), HEAD + '[data]\npath = "a.csv"\n').state_folder == tmp_path / "state"


def test_a_file_with_a_function_is_the_site_s_own_and_a_module_is_left_as_it_is(tmp_path):
    assert site_of(tmp_path, HEAD + '[data]\npython = "load.py:load"\n').data.python == f"{tmp_path}/load.py:load"
    assert site_of(tmp_path, HEAD + '[data]\npython = "my.pack:load"\n').data.python == "my.pack:load"


def test_a_data_set_is_a_folder_of_the_site_or_one_of_the_hub(tmp_path):
    (tmp_path / "saved").mkdir()
    assert site_of(tmp_path, HEAD + '[data]\nhuggingface = "saved"\n').data.huggingface == str(tmp_path / "saved")
    assert site_of(tmp_path, HEAD + '[data]\nhuggingface = "own/name"\n').data.huggingface == "own/name"


def test_all_faults_are_told_together_with_the_nearest_names(tmp_path):
    text = 'nme = "a"\nname = "a b"\nserver = "example.org"\ndevice = "gpu"\nanew = 1\nfolder = "/"\n'
    faults = faults_of(tmp_path, text + '[data]\npaht = "a.csv"\nsize = 0\n')
    starts = [
        "name: got 'a b'; expected 1 to 100 printable characters",
        "server: got the address 'example.org'; expected host:port",
        "device: got 'gpu'; expected cpu, cuda or cuda:NUMBER",
        "data: got none of them; expected exactly one of path, huggingface, python",
        "unknown option 'folder'",
        "unknown option 'nme'; did you mean 'name'?",
        "anew: got 1; expected true or false",
        "data: unknown option 'paht'; did you mean 'path'?",
        "data.size: got 0; expected a whole number >= 1 or none",
    ]
    assert len(faults) == len(starts)
    for start in starts:
        assert any(fault.startswith(start) for fault in faults), (start, faults)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ("", "data: got none of them; expected exactly one of path, huggingface, python: where this site's examples"),
        ('path = "a.csv"\npython = "a:b"', "data: got path and python; expected exactly one of path, huggingface, pyt"),
        ('path = "a.csv"\nsubset = "x"', "data.subset: belongs to huggingface, not to path; leave it out"),
        ('python = "a:b"\nlabel_column = "x"', "data.label_column: belongs to path and huggingface, not to python"),
        ('python = "a.b.c"', "data.python: got 'a.b.c'; expected 'package.module:function' or 'path/to/file.py:funct"),
        ('python = "a:b(1)"', "data.python: got 'a:b(1)'; expected 'package.module:function'"),
        ('path = ""', "data.path: got an empty text; expected a name"),
        ('huggingface = "a/b"\ntest_splits = ["test"]', "data.splits: none named beside those of validation or test"),
    ],
)
def test_where_the_examples_are_is_said_once(tmp_path, data, fault):
    faults = faults_of(tmp_path, f"{HEAD}[data]\n{data}\n")
    assert len(faults) == 1
    assert faults[0].startswith(fault)


def test_a_site_without_a_table_of_data_is_told_what_to_write(tmp_path):
    assert faults_of(tmp_path, HEAD) == [
        "data: got none of them; expected exactly one of path, huggingface, python: where this site's examples are"
    ]
    assert faults_of(tmp_path, 'data = "a.csv"\n' + HEAD) == ["data: got 'a.csv'; expected a table"]


def test_a_folder_without_the_file_and_a_file_that_is_no_toml_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"is no site: it has no site.toml"):
        read_site(tmp_path)
    with pytest.raises(UsageError, match=r"site.toml is not valid TOML"):
        site_of(tmp_path, "name = ")


def test_what_is_made_in_python_is_checked_alike():
    with pytest.raises(UsageError, match=r"SiteConfig.device: got 'tpu'"):
        SiteConfig("a", "localhost:1", SiteData(path="a.csv"), device="tpu")
    with pytest.raises(UsageError, match="got path and huggingface; expected exactly one"):
        SiteData(path="a.csv", huggingface="a/b")
