"""Two processes want one run folder at once: one gets it, and the other is told who has it.

Run from the repository's root::

    OMP_NUM_THREADS=1 python benchmarks/faults/locks.py

Pairs of forked processes that start together, in turn beginning a run (a new folder) and taking up one that is there;
every other folder that is there still has the lock file of a process that was killed. Then pairs that play whole runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from crash import RESULTS, Child, World, forked, is_finished, left_behind, page, timed, warm
from crash import begun as begun_alone
from every_call import stopped_run

from fedmerge.core.errors import UsageError
from fedmerge.experiment.book import held, new_run_folder
from fedmerge.experiment.execute import execute_config
from fedmerge.experiment.lock import NAME
from fedmerge.experiment.resume import resume_run

Work = Callable[[Callable[[str], None], int], None]
"""Given a function that tells the parent a line, and a pipe on which the end is awaited."""


@dataclass
class Tally:
    """What became of the pairs.

    Attributes:
        pairs: Tried.
        one: With exactly one winner.
        told: In which the loser was told the winner's number.
        odd: What was told in the others, by frequency.
        equal: Runs that ended with the right digest.
    """

    pairs: int = 0
    one: int = 0
    told: int = 0
    odd: Counter[str] = field(default_factory=Counter)
    equal: int = 0


def pair(works: tuple[Work, Work], tally: Tally) -> None:
    """Two children that start at the same time, and what they say."""
    (start, go), (release, let_go) = os.pipe(), os.pipe()

    def child(work: Work) -> Child:
        def begin(tell: Callable[[str], None]) -> int:
            os.close(go)
            os.close(let_go)
            os.read(start, 1)
            try:
                work(tell, release)
            except UsageError as error:
                tell(f"lost: {error}")
            return 0

        return forked(begin)

    children = [child(work) for work in works]
    os.close(go)
    for one in children:
        while not one.told and one.read():
            pass
    os.close(let_go)
    codes = [one.end() for one in children]
    os.close(start)
    os.close(release)
    _count(children, codes, tally)


def _count(children: list[Child], codes: list[int], tally: Tally) -> None:
    winners = [child for child in children if child.told == ["won"]]
    losers = [child for child in children if child.told and child.told[0].startswith("lost")]
    fair = codes == [0, 0] and len(winners) == len(losers) == 1
    told = fair and f"in use by process {winners[0].process};" in losers[0].told[0]
    tally.pairs += 1
    tally.one += fair
    tally.told += told
    if not told:
        tally.odd[" / ".join(line for child in children for line in child.told)] += 1


def holding(hold: Callable[[Path], AbstractContextManager[None]], folder: Path) -> Work:
    """Takes a folder, and keeps it until both have been heard."""

    def work(tell: Callable[[str], None], release: int) -> None:
        with hold(folder):
            tell("won")
            os.read(release, 1)

    return work


def dead_process() -> int:
    """Number of a process that has ended."""
    child = forked(lambda _: 0)
    child.end()
    return child.process


def locks(place: Path, pairs: int) -> dict[str, Tally]:
    """All pairs that only take the lock."""
    tallies = {name: Tally() for name in ("new folder", "folder that is there", "lock of a killed process in it")}
    for number in range(pairs):
        folder = place / "run"
        what = [*tallies][0 if number % 2 == 0 else 1 + number // 2 % 2]
        if what != "new folder":
            folder.mkdir()
            (folder / "run.json").touch()
        if what == "lock of a killed process in it":
            (folder / NAME).write_text(f"{dead_process()}\n")
        hold = new_run_folder if what == "new folder" else held
        pair((holding(hold, folder), holding(hold, folder)), tallies[what])
        shutil.rmtree(folder)
    return tallies


def whole_runs(world: World, place: Path, pairs: int) -> dict[str, Tally]:
    """Pairs that play a run each; the winner plays to its end."""
    stopped_run(world, place / "stopped")
    timed(begun_alone(world, place / "whole"))
    tallies = {"whole runs, begun": Tally(), "whole runs, resumed": Tally()}
    for number in range(pairs):
        folder = place / "run"
        what = [*tallies][number % 2]
        if number % 2:
            shutil.copytree(place / "stopped", folder)

        def work(tell: Callable[[str], None], release: int, go_on: bool = bool(number % 2), at: Path = folder) -> None:
            _ = release
            if go_on:
                resume_run(at)
            else:
                execute_config(world.config, data=world.data, folder=at)
            tell("won")

        pair((work, work), tallies[what])
        tallies[what].equal += is_finished(folder) and left_behind(folder) == left_behind(place / "whole")
        shutil.rmtree(folder)
    return tallies


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "locks.md")
    options = parser.parse_args()
    world = warm(3)
    with tempfile.TemporaryDirectory(prefix="fedmerge-") as name:
        tallies = locks(Path(name), options.pairs)
        runs = whole_runs(world, Path(name), options.runs)
    lines = [
        "| | pairs | exactly one winner | loser told the winner's process | equal digest at the end |",
        "|---|--:|--:|--:|--:|",
        *(f"| {name} | {t.pairs} | {t.one} | {t.told} | |" for name, t in tallies.items()),
        *(f"| {name} | {t.pairs} | {t.one} | {t.told} | {t.equal} |" for name, t in runs.items()),
        "",
        *(f"{count}×: {text}" for t in (tallies | runs).values() for text, count in t.odd.most_common(5)),
    ]
    page("One process per run folder", lines, options.out)
    if any(t.one != t.pairs for t in tallies.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
