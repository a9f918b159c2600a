"""Kills, failing disks, power cuts and races: the scripts of ``benchmarks/faults`` on a few cases each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not Path("/proc/self/fd").is_dir(), reason="needs fork, /proc"
)


def played(script: str, *words: str, out: Path) -> str:
    """The page that a script writes; it fails where a round was lost or bits differ."""
    command = [sys.executable, str(ROOT / "benchmarks" / "faults" / script), *words, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out.read_text()


def test_kills_at_random_lose_nothing(tmp_path: Path) -> None:
    text = played("durability.py", "--kills", "8", out=tmp_path / "page.md")
    assert "| kills (SIGKILL) | 8 |" in text
    assert "| announced rounds lost | 0 |" in text


def test_faults_at_single_calls_lose_nothing(tmp_path: Path) -> None:
    text = played("every_call.py", "--step", "29", out=tmp_path / "page.md")
    for what in ("new run", "resumption"):
        for fault in ("SIGKILL", "EIO", "ENOSPC"):
            assert f"| {what} | {fault} |" in text


def _can_mount(tmp_path: Path) -> bool:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        return False
    image, place = tmp_path / "try.img", tmp_path / "try"
    with image.open("wb") as file:
        file.truncate(4 << 20)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(place)], capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", str(place)], check=True)
    return True


def test_a_power_cut_loses_nothing_and_without_fsync_it_would(tmp_path: Path) -> None:
    if not _can_mount(tmp_path):
        pytest.skip("needs root, mkfs.ext4 and loop mounts")
    text = played("power_cut.py", "--cuts", "2", out=tmp_path / "page.md")
    assert "| as it is | 2 |" in text


def test_of_two_that_want_a_folder_one_gets_it(tmp_path: Path) -> None:
    text = played("locks.py", "--pairs", "16", "--runs", "2", out=tmp_path / "page.md")
    assert "| new folder | 8 | 8 | 8 | |" in text
