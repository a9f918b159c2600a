"""Random kill -9: no announced round is lost, and the run ends with the bits of one that nobody killed.

Run from the repository's root::

    OMP_NUM_THREADS=1 python benchmarks/faults/durability.py

A child runs a small federation and says which rounds it announces. It is killed after a random time, resumed in
another child that is killed too, and so on until a run ends; then the next run begins. An announced round is lost if a
later child makes it again.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from crash import (
    RESULTS,
    Child,
    World,
    begun,
    can_go_on,
    is_finished,
    left_behind,
    leftovers,
    lost,
    page,
    resumed,
    timed,
    warm,
)

from fedmerge.core.randomness import generator


@dataclass
class Count:
    """What happened.

    Attributes:
        kills: Children that were killed, the others had ended before.
        early: Of these, before the run had said what it is.
        finished: Runs that came to their end.
        equal: Of these, with the digest of an uninterrupted run.
        announced: Rounds.
        lost: Of these.
        left: Finished runs with files that they do not need.
    """

    kills: int = 0
    early: int = 0
    finished: int = 0
    equal: int = 0
    announced: int = 0
    lost: int = 0
    left: int = 0


def killed(child: Child, after: float) -> tuple[bool, list[int]]:
    """Whether it was killed before its end, and what it had announced until then."""
    time.sleep(after)
    child.kill()
    code = child.end()
    if code not in (0, -9):
        raise RuntimeError(f"a child ended with {code}")
    return code != 0, child.announced


def one_run(world: World, folder: Path, draws: object, longest: float, count: Count, most: int) -> None:
    """From the first child to the end of the run; after `most` kills undisturbed."""
    announced: list[int] = []
    while not (can_go_on(folder) and is_finished(folder)):
        if not can_go_on(folder):
            shutil.rmtree(folder, ignore_errors=True)
        child = resumed(folder) if can_go_on(folder) else begun(world, folder)
        wait = longest * 1.1 * float(draws.random()) if count.kills < most else 60.0  # type: ignore[attr-defined]
        if count.kills < most:
            was_killed, now = killed(child, wait)
            count.kills += was_killed
            count.early += was_killed and not can_go_on(folder)
        else:
            timed(child)
            now = child.announced
        count.lost += lost(announced, now)
        count.announced += len(now)
        announced += now
    count.finished += 1
    assert resumed(folder).end() == 2  # it says that it is finished, and tidies up
    count.equal += left_behind(folder) == WHOLE[0]
    count.left += bool(leftovers(folder))


WHOLE: list[str] = []


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS / "durability.md")
    options = parser.parse_args()
    world = warm(options.rounds)
    with tempfile.TemporaryDirectory(prefix="fedmerge-") as name:
        folder = Path(name)
        longest = timed(begun(world, folder / "whole"))
        WHOLE.append(left_behind(folder / "whole"))
        count, draws = Count(), generator(0, "durability")
        while count.kills < options.kills:
            one_run(world, folder / "run", draws, longest, count, options.kills)
            shutil.rmtree(folder / "run")
    page("Killed at random", lines_of(count, options.rounds, longest), options.out)
    if count.lost or count.equal != count.finished:
        raise SystemExit(1)


def lines_of(count: Count, rounds: int, longest: float) -> list[str]:
    """The table."""
    return [
        f"Digits, 5 clients, perceptron of 8 units, {rounds} rounds, a checkpoint after each; a whole run takes "
        f"{longest:.2f} s, every child is killed after up to 1.1 times that.",
        "",
        "| | |",
        "|---|--:|",
        f"| kills (SIGKILL) | {count.kills} |",
        f"| of these before the run had written what it is (it begins again, nothing was announced) | {count.early} |",
        f"| rounds announced | {count.announced} |",
        f"| announced rounds lost | {count.lost} |",
        f"| runs that ended | {count.finished} |",
        f"| with the digest of a run that nobody killed | {count.equal} |",
        f"| with files left that a finished run does not need | {count.left} |",
    ]


if __name__ == "__main__":
    main()
