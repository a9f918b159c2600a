"""Spoiled configurations, saved runs and data files: what is refused, how it is told, and that nothing else escapes.

Run from the repository's root::

    python benchmarks/faults/fuzz.py --cases 1000000

Writes ``benchmarks/results/faults/fuzz.md``. Every case is drawn from (seed, kind, block of 500 cases) alone, so that
one can be made again.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutations import Change
from targets import Target, all_targets
from typos import Answers, answered

from fedmerge.core.errors import FedmergeError
from fedmerge.core.randomness import generator
from fedmerge.core.text import printable

BLOCK = 500
SLOW = 1.0  # seconds for one case


@dataclass
class Tally:
    """What became of the cases of one target.

    Attributes:
        cases: How many.
        accepted: Of them.
        refused: Of them.
        escaped: Tracebacks, each once, with how often.
        changes: Single changes of a value or key that were refused.
        named: Of those, how many messages have the dotted name.
        ranged: Of those, how many also say what is accepted or what to do.
        unnamed: Messages that have not, with how often.
        unsafe: Messages with a control character or without end.
        slowest: Seconds.
    """

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    escaped: Counter[str] = field(default_factory=Counter)
    changes: int = 0
    named: int = 0
    ranged: int = 0
    unnamed: Counter[str] = field(default_factory=Counter)
    unsafe: int = 0
    slowest: float = 0.0


def fuzz(target: Target, cases: int, seed: int) -> Tally:
    """Tries a reader on so many spoiled inputs."""
    tally = Tally()
    for block in range(-(-cases // BLOCK)):
        draws = generator(seed, f"fuzz {target.name}", block)
        for _ in range(min(BLOCK, cases - block * BLOCK)):
            made = target.change(draws, target.examples[int(draws.integers(len(target.examples)))])
            case, change = made if target.names_keys else (made, None)
            _try(target, case, change, tally)
    return tally


def _try(target: Target, case: Any, change: Change | None, tally: Tally) -> None:
    began = time.perf_counter()
    tally.cases += 1
    try:
        target.read(case)
        tally.accepted += 1
    except FedmergeError as error:
        tally.refused += 1
        _judge(str(error), change, tally)
    except Exception as error:  # what must not happen
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        place = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
        tally.escaped[f"{type(error).__name__}: {str(error)[:120]!a} at {place}"] += 1
    tally.slowest = max(tally.slowest, time.perf_counter() - began)


_ACCEPTED = ("expected", "Known: ", "known: ", "leave it out", "leave out", "give one", "belongs to", "must be")


def _judge(message: str, change: Change | None, tally: Tally) -> None:
    """Looks at a message: what a terminal would do with it, and whether it names what was changed."""
    if len(message) > 20_000 or printable(message, keep="\n") != message:
        tally.unsafe += 1
    if change is None or change.kind not in ("value", "key") or not change.path:
        return
    tally.changes += 1
    dotted = ".".join(change.path)
    wanted = [dotted, f"run.{dotted}"] if change.kind == "value" else ["unknown", "missing", change.path[0]]
    if any(words in message for words in wanted):
        tally.named += 1
        tally.ranged += any(words in message for words in _ACCEPTED)
    else:
        tally.unnamed[f"{dotted}: {message[:200]}"] += 1


def fuzz_all(targets: Iterable[Target], cases: int, seed: int) -> dict[str, Tally]:
    """Deals the cases out to the targets by weight."""
    chosen = tuple(targets)
    total = sum(target.weight for target in chosen)
    return {target.name: fuzz(target, -(-cases * target.weight // total), seed) for target in chosen}


def report(tallies: dict[str, Tally], typos: dict[str, Answers], seconds: float, command: str) -> str:
    """Everything as Markdown."""
    columns = ["input", "cases", "refused", "accepted", "tracebacks", "unsafe messages", "changed key named"]
    columns += ["and what is accepted", "slowest, ms"]
    rows = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, tally in tallies.items():
        named = f"{tally.named:,} of {tally.changes:,} | {tally.ranged:,}" if tally.changes else " | "
        numbers = (tally.cases, tally.refused, tally.accepted, sum(tally.escaped.values()), tally.unsafe)
        rows.append(f"| {name} | {' | '.join(f'{n:,}' for n in numbers)} | {named} | {1000 * tally.slowest:.0f} |")
    whole = list(tallies.values())
    numbers = tuple(
        sum(values)
        for values in zip(
            *((t.cases, t.refused, t.accepted, sum(t.escaped.values()), t.unsafe) for t in whole), strict=True
        )
    )
    named = f"{sum(t.named for t in whole):,} of {sum(t.changes for t in whole):,} | {sum(t.ranged for t in whole):,}"
    rows.append(f"| **all** | {' | '.join(f'{n:,}' for n in numbers)} | {named} | |")
    lines = [
        f"`{command}`",
        "",
        f"Python {platform.python_version()}, {seconds:.0f} s of processor time, one process.",
        "",
        *rows,
        "",
    ]
    lines += [
        f"- escaped from {name}: {text} ({count})" for name, t in tallies.items() for text, count in t.escaped.items()
    ]
    lines += ["", "Slips of one letter, all of them: is the right name suggested?", ""]
    lines += ["| names | names known | slips | right name | other name | none |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {name} | {a.names} | {a.slips:,} | {' | '.join(f'{n / a.slips:.1%}' for n in (a.right, a.other, a.none))} |"
        for name, a in typos.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs everything and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="targets whose name contains this")
    parser.add_argument("--out", default="benchmarks/results/faults/fuzz.md")
    options = parser.parse_args()
    began = time.process_time()
    targets = [target for target in all_targets() if options.only is None or options.only in target.name]
    tallies = fuzz_all(targets, options.cases, options.seed)
    command = " ".join(["python benchmarks/faults/fuzz.py", *sys.argv[1:]])
    text = report(tallies, answered(), time.process_time() - began, command)
    Path(options.out).write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    for tally in tallies.values():
        sys.stdout.writelines(f"{count}: {line}\n" for line, count in tally.unnamed.most_common(15))
    sys.exit(any(tally.escaped for tally in tallies.values()))


if __name__ == "__main__":
    main()
