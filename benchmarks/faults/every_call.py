"""A kill, an input/output error and a full disk at every single call by which a run changes its folder.

Run from the repository's root::

    OMP_NUM_THREADS=1 python benchmarks/faults/every_call.py

The K-th call fails, for every K of a run of three rounds and for every K of the resumption of a run that was stopped
after round 1 (see `faulty_disk.py`, which stands between the package and the system; strace counts the calls once more
and must find the same number). Then the run is resumed on a sound disk. Also run on real file systems (tmpfs) that are
too small.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from crash import (
    RESULTS,
    Child,
    World,
    begun,
    can_go_on,
    commanded,
    is_finished,
    left_behind,
    leftovers,
    lost,
    page,
    resumed,
    timed,
    warm,
)
from faulty_disk import FAULTS, FaultyDisk

from fedmerge.experiment import book

REASONS = {"EIO": "Input/output error", "ENOSPC": "No space left on device"}


@dataclass
class Tally:
    """What happened at all calls of one kind of fault.

    Attributes:
        calls: Calls that failed, by kind.
        early: Runs that could not say yet what they are.
        late: Runs that were finished already.
        ignored: Faults that the run survived.
        announced: Rounds.
        lost: Of these.
        equal: Runs that ended with the right digest.
        unclear: Messages without the file's name or the reason, and tracebacks.
        left: Names of files that were left after the end.
    """

    calls: Counter[str] = field(default_factory=Counter)
    early: int = 0
    late: int = 0
    ignored: int = 0
    announced: int = 0
    lost: int = 0
    equal: int = 0
    unclear: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Calls that failed."""
        return sum(self.calls.values())


def one_by_one() -> None:
    """Every round goes to the disk for itself, so that all runs make the same calls."""
    book._MOST_BEHIND = 1


def failing(disk: FaultyDisk) -> Callable[[], None]:
    """Done in the child before it starts."""

    def before() -> None:
        one_by_one()
        disk.install()

    return before


@dataclass(frozen=True)
class Case:
    """Where faults are put.

    Attributes:
        world: What runs.
        folder: Of the run.
        whole: Digest of a run without faults.
        stopped: Folder of a stopped run whose resumption fails; None to have a new run fail.
    """

    world: World
    folder: Path
    whole: str
    stopped: Path | None = None

    def child(self, disk: FaultyDisk, said: Path) -> Child:
        """A child on a faulty disk; through the command line where it can end with a message."""
        if self.stopped is not None:
            shutil.copytree(self.stopped, self.folder)
            return resumed(self.folder, failing(disk), said)
        if disk.fault == "SIGKILL":
            return begun(self.world, self.folder, failing(disk), said)
        return commanded(self.world, self.folder, said, failing(disk))


def calls_of(case: Case) -> list[str]:
    """All calls of a run in which none fails."""
    log, said = case.folder.with_name("log"), case.folder.with_name("said")

    def note(line: str) -> None:
        with log.open("a") as file:
            file.write(line + "\n")

    timed(case.child(FaultyDisk(case.folder, "SIGKILL", 0, note), said))
    found = log.read_text().splitlines()
    log.unlink()
    shutil.rmtree(case.folder)
    return found


def sweep(case: Case, fault: str, calls: list[str], count: Tally, step: int) -> None:
    """Fails at every call, or at every `step`-th, one after another."""
    for at, call in [*enumerate(calls, 1)][::step]:
        said = case.folder.with_name("said")
        said.unlink(missing_ok=True)
        child = case.child(FaultyDisk(case.folder, fault, at), said)
        code = child.end()
        count.calls[re.sub(r" .*", "", call)] += 1
        count.announced += len(child.announced)
        if code == 0:
            count.ignored += 1
        elif fault != "SIGKILL" and case.stopped is None:
            count.unclear += _unclear(said.read_text(), REASONS[fault], f"{fault} at call {at}, {call}", code)
        _go_on(case, child.announced, count)
        shutil.rmtree(case.folder, ignore_errors=True)


def _unclear(text: str, reason: str, where: str, code: int) -> list[str]:
    plain = re.sub(r"\s+", " ", text)
    good = "Traceback" not in plain and reason in plain and "a file:" not in plain and code in (1, 2)
    return [] if good else [f"{where}: exit {code}, {plain[:200]!r}"]


def _go_on(case: Case, announced: list[int], count: Tally) -> None:
    """Resumes on a sound disk and looks at the end."""
    if not can_go_on(case.folder):
        count.early += 1
        count.lost += len(announced)
        shutil.rmtree(case.folder, ignore_errors=True)
        timed(begun(case.world, case.folder))
    elif not is_finished(case.folder):
        child = resumed(case.folder)
        timed(child)
        count.lost += lost(announced, child.announced)
    else:
        count.late += 1
        assert resumed(case.folder).end() == 2  # it says so, and tidies up
    count.equal += left_behind(case.folder) == case.whole
    count.left.update(leftovers(case.folder))


def stopped_run(world: World, folder: Path) -> None:
    """A run that is killed once it has announced round 1."""
    child = begun(world, folder, _slow)
    while 1 not in child.announced and child.read():
        pass
    child.kill()
    child.end()


def _slow() -> None:
    """Waits a while after every round, so that the kill comes in time."""
    one_by_one()
    note = book.Book.note

    def noted(self: book.Book, *rest: object) -> None:
        note(self, *rest)  # type: ignore[arg-type]
        signal.sigtimedwait([], 0.3)

    book.Book.note = noted  # type: ignore[assignment,method-assign]


# ---------------------------------------------------------------- what the system sees


_TRACED = "openat,write,pwrite64,fsync,rename,unlink,ftruncate,mkdir"


def traced(world: World, folder: Path) -> tuple[int, int]:
    """Calls of one run as the shim counts them and as strace does."""
    output, log = folder.with_name("strace"), folder.with_name("log")
    reading, writing = os.pipe()

    def before() -> None:
        os.read(reading, 1)  # until strace is there
        one_by_one()
        disk = FaultyDisk(folder, "SIGKILL", 0)
        disk.log = lambda _: log.write_text(str(disk.count))
        disk.install()

    child = begun(world, folder, before)
    strace = subprocess.Popen(
        ["strace", "-f", "-y", "-e", f"trace={_TRACED}", "-o", str(output), "-p", str(child.process)],
        stderr=subprocess.PIPE,
    )
    assert strace.stderr is not None
    strace.stderr.readline()  # "attached"
    os.write(writing, b"x")
    timed(child)
    strace.wait()
    shutil.rmtree(folder)
    return int(log.read_text()), _counted(output.read_text().splitlines(), folder)


def _counted(lines: list[str], folder: Path) -> int:
    there: set[str] = set()
    count = 0
    for line in lines:
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if call is None or str(folder) not in line:
            continue
        name, rest = call.groups()
        paths = re.findall(r'"([^"]*)"', rest)
        if name == "openat":
            new = "O_CREAT" in rest and paths[0] not in there
            there.update(paths[:1] if "O_CREAT" in rest else ())
            count += new
        elif name == "unlink":
            count += not re.search(r"= -1", rest)
            there.discard(paths[0])
        else:
            if name == "rename":
                there.discard(paths[0])
                there.add(paths[1])
            count += 1
    return count


# ---------------------------------------------------------------- real disks that are full


def too_small(world: World, whole: str, place: Path, sizes: range, count: Tally) -> None:
    """Runs on tmpfs of growing size; resumed after it has been given more room."""
    for size in sizes:
        _mount("-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place))
        try:
            folder, said = place / "run", place.with_name("said")
            said.unlink(missing_ok=True)
            child = commanded(world, folder, said)
            code = child.end()
            count.announced += len(child.announced)
            if code == 0:
                count.ignored += 1
            else:
                count.calls["too small"] += 1
                count.unclear += _unclear(said.read_text(), REASONS["ENOSPC"], f"tmpfs of {size} kB", code)
            _mount("-o", "remount,size=16m", str(place))
            _go_on(Case(world, folder, whole), child.announced, count)
        finally:
            subprocess.run(["umount", str(place)], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


# ---------------------------------------------------------------- the page


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", type=int, default=1, help="every how many calls")
    parser.add_argument("--out", type=Path, default=RESULTS / "every_call.md")
    options = parser.parse_args()
    world = warm(options.rounds)
    with tempfile.TemporaryDirectory(prefix="fedmerge-") as name:
        lines, good = everything(world, Path(name), options.step)
    page("A fault at every call", lines, options.out)
    if not good:
        raise SystemExit(1)


def everything(world: World, place: Path, step: int) -> tuple[list[str], bool]:
    """All sweeps; the lines of the page and whether nothing was lost."""
    timed(begun(world, place / "whole", one_by_one))
    whole = left_behind(place / "whole")
    stopped_run(world, place / "stopped")
    tallies: dict[tuple[str, str], Tally] = {}
    for what, case in (
        ("new run", Case(world, place / "run", whole)),
        ("resumption", Case(world, place / "run", whole, place / "stopped")),
    ):
        calls = calls_of(case)
        for fault in FAULTS:
            tally = tallies[what, fault] = Tally()
            plan = calls_of_commands(case, calls) if fault != "SIGKILL" and case.stopped is None else calls
            sweep(case, fault, plan, tally, step)
    lines = [*head(world), *rows(tallies)]
    if os.geteuid() == 0 and shutil.which("strace"):
        ours, theirs = traced(world, place / "run")
        lines += ["", f"Calls of a new run as counted by the shim: {ours}; by strace: {theirs}."]
    if os.geteuid() == 0:
        full = tallies["tmpfs too small", "ENOSPC"] = Tally()
        (place / "disk").mkdir()
        too_small(world, whole, place / "disk", range(4, 257, 4 * step), full)
        lines += ["", *full_lines(full)]
    lines += ["", *(f"Unclear: {text}" for tally in tallies.values() for text in tally.unclear)]
    good = all(t.lost == 0 and not t.unclear for t in tallies.values())
    return lines, good


def calls_of_commands(case: Case, calls: list[str]) -> list[str]:
    """The calls of a run through the command line: those of a run, and its report's."""
    log, said = case.folder.with_name("log"), case.folder.with_name("said")
    disk = FaultyDisk(case.folder, "EIO", 0)
    disk.log = lambda line: log.open("a").write(line + "\n")
    timed(commanded(case.world, case.folder, said, failing(disk)))
    found = log.read_text().splitlines()
    log.unlink()
    shutil.rmtree(case.folder)
    assert found[: len(calls)] == calls
    return found


def head(world: World) -> list[str]:
    """What was run."""
    return [
        f"Digits, 5 clients, perceptron of 8 units, {world.config.run.rounds} rounds, a checkpoint after each. "
        "The K-th call fails, for every K; then the run is resumed on a sound disk.",
        "",
    ]


def rows(tallies: dict[tuple[str, str], Tally]) -> list[str]:
    """The table."""
    lines = [
        "| what | fault | calls that failed | before the run said what it is | after its end | survived "
        "| rounds announced | lost | ended with equal digest | unclear messages | files left |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for (what, fault), t in tallies.items():
        left = ", ".join(f"{n}× {name}" for name, n in t.left.items()) or "none"
        lines.append(
            f"| {what} | {fault} | {t.total} | {t.early} | {t.late} | {t.ignored} | {t.announced} | {t.lost} "
            f"| {t.equal} of {t.total} | {len(t.unclear)} | {left} |"
        )
    kinds = {what: t.calls for (what, _), t in tallies.items()}
    lines += ["", *(f"Calls, {w}: {', '.join(f'{n} {k}' for k, n in c.most_common())}." for w, c in kinds.items())]
    return lines


def full_lines(full: Tally) -> list[str]:
    """What happened on full disks."""
    return [
        f"tmpfs of 4, 8, ... 256 kB: {full.total} were too small, {full.ignored} large enough; {full.announced} rounds "
        f"announced, {full.lost} lost; {full.equal} of {full.total + full.ignored} ended with the equal digest after "
        f"they were given more room ({full.early} had not said yet what they are and began again); "
        f"{len(full.unclear)} unclear messages."
    ]


if __name__ == "__main__":
    main()
