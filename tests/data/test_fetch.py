"""Fetching runs the real pip, npm and apt-get against registries made of a folder or a loopback address."""

from __future__ import annotations

import http.server
import json
import logging
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from tiny_archives import sha256, write_deb, write_tgz, write_wheel

from fedmerge.core.errors import DataError, FedmergeError
from fedmerge.data.archive import read_deb, read_deb_folder, read_tgz, read_wheel
from fedmerge.data.fetch import Package, fetch, fingerprint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip finds without any index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return write_wheel(folder, "tiny_data", "1.0", {"tiny_data/x.csv": b"1,2\n"})


def pip_package(wheel: Path, **changes) -> Package:
    facts = {"client": "pip", "name": "tiny-data", "version": "1.0", "sha256": sha256(wheel), "megabytes": 0.1}
    return Package(**{**facts, **changes})


def stored(cache: Path) -> list[str]:
    """What is in the cache beside its lock files."""
    return sorted(path.name for path in (cache / "archives").iterdir() if path.suffix != ".lock")


# --- what is fetched is whole, checked, and fetched once ---


def test_pip_fetches_a_wheel_and_reports_progress(cache, wheel):
    told = []
    path = fetch(pip_package(wheel), progress=lambda *what: told.append(what))
    assert read_wheel(path, "tiny_data/x.csv") == (b"1,2\n",)
    assert told == [
        ("fetching pip package tiny-data 1.0 (0.1 MB)", 0, 1),
        ("fetched pip package tiny-data 1.0", 1, 1),
    ]
    assert stored(cache) == ["tiny-data-1.0.whl"]


def test_an_archive_that_is_there_is_not_fetched_again(cache, wheel):
    package = pip_package(wheel)
    fetch(package)
    wheel.unlink()  # a second download could not succeed
    assert fetch(package).exists()


def test_a_file_put_into_the_cache_by_hand_is_used(cache, wheel):
    package = pip_package(wheel)
    package.path().parent.mkdir(parents=True)
    shutil.move(wheel, package.path())
    assert fetch(package) == package.path()


@pytest.mark.parametrize("damage", [b"", b"PK", b"something else"])
def test_a_damaged_archive_is_named_deleted_and_fetched_again(cache, wheel, damage, caplog):
    package = pip_package(wheel)
    fetch(package).write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        path = fetch(package)
    assert sha256(path) == sha256(wheel)
    assert str(path) in caplog.text
    assert "deleted and fetched again" in caplog.text


def test_what_a_killed_fetch_left_is_cleaned_up(cache, wheel):
    package = pip_package(wheel)
    left = package.path().with_name(package.file_name + ".part")
    left.mkdir(parents=True)
    (left / "tiny_data-1.0-py3-none-any.whl.half").write_bytes(b"PK")
    fetch(package)
    assert stored(cache) == ["tiny-data-1.0.whl"]


def test_another_archive_than_the_pinned_one_is_refused_and_not_kept(cache, wheel):
    package = pip_package(wheel, sha256="0" * 64)
    with pytest.raises(FedmergeError) as caught:
        fetch(package)
    assert str(caught.value) == (
        "`pip download --no-deps tiny-data==1.0` gave tiny_data-1.0-py3-none-any.whl, which is not the pip package "
        f"tiny-data 1.0 that was tested: SHA-256 is {sha256(wheel)}, expected {'0' * 64}. It was not kept. "
        "Does a mirror or proxy change what pip downloads?"
    )
    assert stored(cache) == []


def test_two_fetches_at_once_download_once(cache, wheel):
    package, told = pip_package(wheel), []
    threads = [
        threading.Thread(target=fetch, args=(package,), kwargs={"progress": lambda *what: told.append(what)})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done for _, done, _ in told) == 1


# --- when a client cannot ---


def test_an_offline_pip_says_what_ran_what_it_said_and_how_to_mend(cache, wheel):
    package = pip_package(wheel, version="9.9")
    with pytest.raises(FedmergeError) as caught:
        fetch(package)
    assert str(caught.value) == (
        "cannot fetch pip package tiny-data 9.9: `pip download --no-deps tiny-data==9.9` failed with exit code 1: "
        "ERROR: No matching distribution found for tiny-data==9.9. Is this machine offline? pip must reach its package "
        "index, or a mirror that pip is configured for, or run `pip download --no-deps tiny-data==9.9` on another "
        f"machine and put its file here as {cache}/archives/tiny-data-9.9.whl"
    )
    assert stored(cache) == []


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ("npm", "cannot fetch npm package tiny 1: npm is not on this machine. Install Node.js, which brings npm"),
        ("apt", "cannot fetch apt package tiny 1: apt-get is not on this machine. This data set is a Debian package"),
    ],
)
def test_a_missing_client_is_named(cache, tmp_path, monkeypatch, client, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FedmergeError) as caught:
        fetch(Package(client=client, name="tiny", version="1", sha256="0" * 64, megabytes=0.1))
    assert str(caught.value).startswith(message)


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, wheel):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(FedmergeError, match=r"cannot write to the cache folder .*file/archives: .*FEDMERGE_CACHE"):
        fetch(pip_package(wheel))


# --- npm and apt-get ---


@pytest.fixture
def npm_registry(tmp_path, monkeypatch):
    """A registry on a loopback address that has one package, @us/tiny 1.0.0; yields its archive."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    archive = write_tgz(tmp_path / "tiny.tgz", {"package/package.json": b'{"name": "@us/tiny", "version": "1.0.0"}'})

    class Registry(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path in ("/@us%2ftiny", "/tiny.tgz")
            self.send_response(200 if known else 404)
            self.end_headers()
            if self.path == "/tiny.tgz":
                self.wfile.write(archive.read_bytes())
            elif known:
                tarball = f"http://127.0.0.1:{self.server.server_port}/tiny.tgz"
                version = {"name": "@us/tiny", "version": "1.0.0", "dist": {"tarball": tarball}}
                page = {"name": "@us/tiny", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
                self.wfile.write(json.dumps(page).encode())

        def log_message(self, *message):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
        yield archive
        server.shutdown()


def test_npm_fetches_an_archive(cache, npm_registry):
    path = fetch(Package("npm", "@us/tiny", "1.0.0", sha256(npm_registry), 0.1))
    assert path.name == "us-tiny-1.0.0.tgz"
    assert read_tgz(path, "package/package.json") == (b'{"name": "@us/tiny", "version": "1.0.0"}',)


def test_npm_without_such_a_version_says_so(cache, npm_registry):
    with pytest.raises(FedmergeError, match=r"notarget No matching version found for @us/tiny@2.0.0. Is this machine"):
        fetch(Package("npm", "@us/tiny", "2.0.0", "0" * 64, 0.1))


def test_an_offline_npm_says_so(cache, npm_registry, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(FedmergeError, match=r"failed, reason: .*ECONNREFUSED.*Is this machine offline\?"):
        fetch(Package("npm", "@us/tiny", "1.0.0", "0" * 64, 0.1))


@pytest.fixture
def apt_archive(tmp_path, monkeypatch):
    """A Debian archive in a folder that has one package, tiny 2-1, and apt's own state beside it; yields the .deb."""
    if shutil.which("apt-get") is None:
        pytest.skip("apt-get is not installed")
    root = tmp_path / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial", "parts", "repository"):
        (root / folder).mkdir(parents=True)
    deb = write_deb(root / "repository/tiny_2-1_all.deb", {"usr/share/tiny/x": b"data", "usr/share/doc/tiny/y": b"doc"})
    (root / "repository/Packages").write_text(
        "Package: tiny\nVersion: 2-1\nArchitecture: all\nMaintainer: us\nDescription: tiny\n"
        f"Filename: ./tiny_2-1_all.deb\nSize: {deb.stat().st_size}\nSHA256: {sha256(deb)}\n"
    )
    (root / "sources.list").write_text(f"deb [trusted=yes] copy:{root}/repository ./\n")
    (root / "status").write_text("")
    (root / "apt.conf").write_text(
        f'Dir::State "{root}/state"; Dir::State::status "{root}/status"; Dir::Cache "{root}/cache";\n'
        f'Dir::Etc::sourcelist "{root}/sources.list"; Dir::Etc::sourceparts "{root}/parts";\n'
        f'Dir::Etc::preferencesparts "{root}/parts"; APT::Sandbox::User "";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(root / "apt.conf"))
    subprocess.run(["apt-get", "update", "-q"], check=True, capture_output=True)
    return deb


def test_apt_fetches_a_package_whose_data_are_the_pinned_ones(cache, apt_archive):
    package = Package("apt", "tiny", "1-1", "", 0.1, "usr/share/tiny/")
    package = Package("apt", "tiny", "1-1", fingerprint(package, apt_archive), 0.1, "usr/share/tiny/")
    path = fetch(package)  # another version, the same data
    assert read_deb(path, "usr/share/tiny/x") == (b"data",)
    assert stored(cache) == ["tiny-1-1.deb"]


def test_apt_with_other_data_says_that_the_distribution_may_have_moved_on(cache, apt_archive):
    with pytest.raises(FedmergeError, match=r"gave tiny_2-1_all.deb, which is not the apt package tiny 1-1 .*moved on"):
        fetch(Package("apt", "tiny", "1-1", "0" * 64, 0.1, "usr/share/tiny/"))


def test_apt_without_the_package_says_so(cache, apt_archive):
    with pytest.raises(FedmergeError, match=r"E: Unable to locate package nothing. .*sudo apt-get update"):
        fetch(Package("apt", "nothing", "1", "0" * 64, 0.1))


# --- reading archives ---


def test_a_debian_packages_fingerprint_depends_on_its_data_alone(tmp_path):
    package = Package("apt", "tiny", "1", "", 0.1, "data/")
    first = write_deb(tmp_path / "a.deb", {"data/x": b"1", "data/y": b"2", "doc": b"Debian"})
    packed_anew = write_deb(tmp_path / "b.deb", {"doc": b"Ubuntu", "data/y": b"2", "data/x": b"1"})
    swapped = write_deb(tmp_path / "c.deb", {"data/x": b"2", "data/y": b"1"})
    assert fingerprint(package, first) == fingerprint(package, packed_anew)
    assert fingerprint(package, first) != fingerprint(package, swapped)


def test_a_folder_of_a_debian_package_is_read_by_path(tmp_path):
    deb = write_deb(tmp_path / "a.deb", {"data/x": b"1", "data/sub/y": b"2", "doc": b"3"})
    assert read_deb_folder(deb, "data/") == {"data/x": b"1", "data/sub/y": b"2"}


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_dpkg_reads_our_debian_packages_as_we_do(tmp_path):
    deb = write_deb(tmp_path / "a.deb", {"data/x": b"odd"})
    subprocess.run(["dpkg-deb", "-x", deb, tmp_path / "out"], check=True)
    assert (tmp_path / "out/data/x").read_bytes() == b"odd" == read_deb(deb, "data/x")[0]


@pytest.mark.parametrize("kind", ["wheel", "tgz", "deb"])
def test_a_missing_member_and_any_truncation_are_data_errors(tmp_path, kind):
    members = {"a": b"1" * 100, "b": b"2" * 99}
    path = {
        "wheel": lambda: write_wheel(tmp_path, "tiny", "1", members),
        "tgz": lambda: write_tgz(tmp_path / "a.tgz", members),
        "deb": lambda: write_deb(tmp_path / "a.deb", members),
    }[kind]()
    read = {"wheel": read_wheel, "tgz": read_tgz, "deb": read_deb}[kind]
    assert read(path, "b", "a") == (members["b"], members["a"])
    with pytest.raises(DataError, match=r"no such member.*nothing"):
        read(path, "a", "nothing")
    whole = path.read_bytes()
    for length in range(0, len(whole) - 30, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=path.name):
            read(path, "b")


def test_a_member_that_points_out_of_the_archive_is_only_a_name(tmp_path):
    archive = write_tgz(tmp_path / "a.tgz", {"../../evil": b"1"})
    assert read_tgz(archive, "../../evil") == (b"1",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tgz"]
