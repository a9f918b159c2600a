"""The compiled kernels: made by the machine's own C compiler on first use, kept in the cache folder, and checked.

A build is a folder named after all that it depends on: the source, the flags, and what the compiler says about itself
and this processor. It appears whole, by one rename, so that builds at the same time cannot mix. Damaged builds are made
anew. Only a folder that nobody else can write to is loaded from.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from fedmerge.core.errors import FedmergeError
from fedmerge.data.cache import cache_folder

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
SWITCH = "FEDMERGE_NATIVE"
_LIBRARY, _DIGEST = "kernels.so", "kernels.sha256"
_SECONDS = 120.0


class NoKernelsError(FedmergeError):
    """There are no compiled kernels here; the text says why, and what would help."""


def library(folder: Path | None = None) -> ctypes.CDLL:
    """The kernels, compiled if they are not in `folder` yet (``native`` in the cache folder unless given).

    Raises:
        NoKernelsError: if they are switched off, cannot be compiled, kept or loaded.
    """
    if os.environ.get(SWITCH, "1") == "0":
        raise NoKernelsError(f"switched off by {SWITCH}=0")
    compiler = _compiler()
    source = SOURCE.read_bytes()
    build = (folder or cache_folder() / "native") / _key(compiler, source)
    try:
        if not _is_whole(build):
            _make(build, compiler)
        return ctypes.CDLL(str(build / _LIBRARY))
    except OSError as error:
        raise NoKernelsError(f"cannot keep or load kernels in {build.parent}: {error.strerror or error}") from error


def _compiler() -> str:
    wanted = os.environ.get("CC", "").strip()
    for name in [wanted] if wanted else ["cc", "gcc", "clang"]:
        found = shutil.which(name)
        if found:
            return found
    raise NoKernelsError(f"no C compiler found ({wanted or 'cc, gcc, clang'}); install one, or name it in CC")


def _run(words: list[str]) -> bytes:
    try:
        done = subprocess.run(words, capture_output=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernelsError(f"{words[0]} does not run: {error}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise NoKernelsError(f"{words[0]} failed with code {done.returncode}: {lines[0] if lines else 'no message'}")
    return done.stdout


def _key(compiler: str, source: bytes) -> str:
    """Names what a build depends on; the compiler's macros tell its version and the processor's instructions."""
    macros = _run([compiler, *FLAGS[:3], "-dM", "-E", "-x", "c", os.devnull])
    parts = (source, " ".join((compiler, *FLAGS)).encode(), macros)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _is_whole(build: Path) -> bool:
    """Whether a build is there, as it was made.

    Raises:
        NoKernelsError: if others could have written it.
    """
    for path in (build.parent, build, build / _LIBRARY):
        if not path.exists():
            return False
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NoKernelsError(f"{path} belongs to others or can be written by them: remove it, or mend its rights")
    digest = build / _DIGEST
    return digest.is_file() and digest.read_bytes() == _digest(build / _LIBRARY)


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()


def _make(build: Path, compiler: str) -> None:
    """Compiles into a folder beside `build`, which takes its name in one step."""
    build.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log.info("compiling kernels for this processor with %s", compiler)
    with tempfile.TemporaryDirectory(prefix="building-", dir=build.parent) as made:
        fresh = Path(made, "new")
        fresh.mkdir(mode=0o700)
        _run([compiler, *FLAGS, str(SOURCE), "-o", str(fresh / _LIBRARY), "-lm"])
        (fresh / _LIBRARY).chmod(0o700)
        (fresh / _DIGEST).write_bytes(_digest(fresh / _LIBRARY))
        try:
            fresh.rename(build)
        except OSError:
            if _is_whole(build):  # another process was faster
                return
            build.rename(Path(made, "damaged"))
            fresh.rename(build)
