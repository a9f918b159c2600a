"""A power cut: the image of a mounted file system is copied while a run writes to it, and the run goes on in the copy.

Run from the repository's root, as root (loop mounts)::

    OMP_NUM_THREADS=1 python benchmarks/faults/power_cut.py

The run's folder is on an ext4 file system (data=ordered) in a file of its own. What the copy of that file holds is
what the file system had sent to its disk; what only was in memory is missing, as after a power cut. The copy is made
right after a round was announced, with the child stopped for that moment and nothing synced: a copy made while the file
system writes would mix moments, old inode tables with a journal that has moved on. It is mounted, which replays its
journal, and the run is resumed there. Then the same with fsync taken out of the children, which shows that the check
can fail.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from crash import RESULTS, Child, World, begun, can_go_on, is_finished, left_behind, lost, page, resumed, timed, warm

from fedmerge.core.randomness import generator

MEGABYTES = 16


@dataclass
class Tally:
    """What became of the cuts.

    Attributes:
        cuts: Copies that were resumed from.
        announced: Rounds before the cut.
        lost: Of these.
        losing: Cuts after which at least one was lost.
        nothing: Of these, cuts after which there was no run at all.
        equal: Runs that ended with the digest of an undisturbed one.
    """

    cuts: int = 0
    announced: int = 0
    lost: int = 0
    losing: int = 0
    nothing: int = 0
    equal: int = 0


def mounted(image: Path, place: Path) -> None:
    """Mounts an image; its journal is replayed where it was not left in order."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,data=ordered", str(image), str(place)], check=True)


def unmounted(place: Path) -> None:
    """Takes it away again."""
    subprocess.run(["umount", str(place)], check=True)


def without_fsync() -> None:
    """What a program does that believes a write to be on the disk."""
    os.fsync = lambda _: None  # type: ignore[assignment]


def _frozen(child: Child) -> None:
    """Stops a child where it is, as a power cut does; a copy made while it writes would be of no moment at all."""
    os.kill(child.process, signal.SIGSTOP)
    threads = Path(f"/proc/{child.process}/task")
    while any(_state(path) not in "TZX" for path in threads.iterdir()):
        time.sleep(0.001)


def _state(thread: Path) -> str:
    """T for one that is stopped, Z or X for one that has ended."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def cut(world: World, room: Path, after: int, *, careless: bool) -> tuple[list[int], Path]:
    """Runs until a round is announced and copies the image at once; what was announced, and the copy."""
    image, copy, place = room / "disk.img", room / "copy.img", room / "disk"
    with image.open("wb") as file:
        file.truncate(MEGABYTES << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    mounted(image, place)
    child = begun(world, place / "run", without_fsync if careless else lambda: None)
    while after not in child.announced and child.read():
        pass
    _frozen(child)
    announced = list(child.announced)
    shutil.copyfile(image, copy)
    while not filecmp.cmp(image, copy, shallow=False):  # the system wrote meanwhile: no moment at all
        shutil.copyfile(image, copy)
    child.kill()
    child.end()
    unmounted(place)
    return announced, copy


def one(world: World, room: Path, after: int, whole: str, tally: Tally, *, careless: bool) -> None:
    """One power cut, and what is left after it."""
    announced, copy = cut(world, room, after, careless=careless)
    place = room / "copy"
    mounted(copy, place)
    try:
        folder = place / "run"
        gone = _resumed(world, folder, announced, tally)
        tally.cuts += 1
        tally.announced += len(announced)
        tally.lost += gone
        tally.losing += gone > 0
        tally.equal += left_behind(folder) == whole
    finally:
        unmounted(place)


def _resumed(world: World, folder: Path, announced: list[int], tally: Tally) -> int:
    """Goes on, or begins again where nothing usable is left; announced rounds that were lost."""
    if can_go_on(folder) and is_finished(folder):
        return 0
    if can_go_on(folder):
        child = resumed(folder, said=folder.parent.with_name("said"))
        if child.end() == 0:
            return lost(announced, child.announced)
    tally.nothing += 1
    shutil.rmtree(folder, ignore_errors=True)
    timed(begun(world, folder))
    return len(announced)


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS / "power_cut.md")
    options = parser.parse_args()
    world = warm(options.rounds)
    draws = generator(0, "power cut")
    careful, careless = Tally(), Tally()
    with tempfile.TemporaryDirectory(prefix="fedmerge-") as name:
        room = Path(name)
        timed(begun(world, room / "whole"))
        whole = left_behind(room / "whole")
        for _ in range(options.cuts):
            after = int(draws.integers(1, options.rounds - 1))
            one(world, room, after, whole, careful, careless=False)
            one(world, room, after, whole, careless, careless=True)
    page("Power cut", lines_of(careful, careless, options.rounds), options.out)
    if careful.lost or careful.equal != careful.cuts or not careless.lost:
        raise SystemExit(1)


def lines_of(careful: Tally, careless: Tally, rounds: int) -> list[str]:
    """The table."""
    lines = [
        f"Digits, 5 clients, perceptron of 8 units, {rounds} rounds, a checkpoint after each, on a loop-mounted ext4 "
        f"image of {MEGABYTES} MB (data=ordered), copied right after a round drawn at random was announced.",
        "",
        "| | cuts | rounds announced | lost | cuts that lost some | cuts that left no usable run | equal digest at "
        "the end |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, t in (("as it is", careful), ("fsync taken out", careless)):
        lines.append(
            f"| {name} | {t.cuts} | {t.announced} | {t.lost} | {t.losing} | {t.nothing} | {t.equal} of {t.cuts} |"
        )
    return lines


if __name__ == "__main__":
    main()
