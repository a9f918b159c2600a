"""What happens to a federation on real processes of Flower when parts of it die, lie, hang or are cut off.

Run from the repository's root, as root (network namespaces, a small file system)::

    OMP_NUM_THREADS=1 python benchmarks/deploy/faults.py

SuperLink, SuperNodes, ServerApp and client processes are Flower's own, with certificates and node keys, on one
machine. Every case builds a federation of five sites in a fresh folder, disturbs it and compares how it ends with the
same run in one process. A case that takes longer than its bound has failed. Results are added to those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import flwr
import partition  # noqa: F401 - adds its cases
import torch
from cases import CASES, Case, Found, Room

from fedmerge import __version__

RESULTS = Path("benchmarks/results/deploy")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        case: Its name.
        done: What was done.
        must: What must be true.
        ended: How it ended.
        equal: Whether all compared bits were those of the in-process run; None where none were compared.
        said: The message that was seen.
        faults: What was not as it must be.
        seconds: It took.
        bound: It may take.
        load: Processes that waited for a processor while it began (`uptime`).
    """

    case: str
    done: str
    must: str
    ended: str
    equal: bool | None
    said: str
    faults: list[str]
    seconds: float
    bound: float
    load: float

    @property
    def passed(self) -> bool:
        """Whether all was as it must be."""
        return not self.faults and self.equal is not False


def played(case: Case, room: Room) -> Row:
    """Plays a case; what goes wrong is a row too."""
    began, load = time.monotonic(), os.getloadavg()[0]
    try:
        found = case.play(room)
    except Exception as error:
        traceback.print_exc()
        found = Found("did not end as it must", None, faults=[f"{type(error).__name__}: {error}"])
    seconds = time.monotonic() - began
    faults = [*found.faults, *(found.unequal or [])]
    if seconds > case.bound:
        faults.append(f"took {seconds:.0f} s")
    equal = None if found.unequal is None else not found.unequal
    return Row(case.name, case.done, case.must, found.ended, equal, found.said, faults, seconds, case.bound, load)


def page(rows: Mapping[str, Row]) -> str:
    """The table as Markdown."""
    words = {True: "yes", False: "**no**", None: "–"}
    lines = [
        "`OMP_NUM_THREADS=1 python benchmarks/deploy/faults.py`",
        "",
        "# A federation that is disturbed",
        "",
        "Five sites with 60 to 220 training images of digits, a perceptron of 16 units, 2 or 3 rounds; fedmerge "
        f"{__version__}, flwr {flwr.__version__}, torch {torch.__version__}, Python {platform.python_version()}.",
        "SuperLink, SuperNodes, ServerApp and client processes are Flower's own, on the loopback address (or in",
        "network namespaces), with certificates and node keys. *Equal*: last and selected state of the server and",
        "every site's model have the bits of the same run in one process, without Flower, in which the same sites",
        "were silent in the same rounds (where a site hangs, both states only; for NaN, the last state only; for a",
        "full disk, the last state and the models: which round is selected may hang on scores that others did not",
        "get). Rounds are slow on purpose: sites wait some seconds while they read, to be",
        "met at work.",
        f"Two cores, shared with other work (load {_range([row.load for row in rows.values()])}): seconds say that it",
        "ends, not how fast.",
        "",
        "| case | what is done | what must be true | how it ended | seconds (bound) | equal | verdict |",
        "|---|---|---|---|--:|---|---|",
    ]
    for row in rows.values():
        verdict = "as it must" if row.passed else f"**not as it must**: {_cell('; '.join(row.faults))}"
        lines.append(
            f"| {row.case} | {_cell(row.done)} | {_cell(row.must)} | {_cell(row.ended)} | {row.seconds:.0f} "
            f"({row.bound:.0f}) | {words[row.equal]} | {verdict} |"
        )
    lines += ["", "## What was said", ""]
    lines += [f"- *{row.case}*: `{_cell(row.said)}`" for row in rows.values() if row.said]
    passed = sum(row.passed for row in rows.values())
    return "\n".join([*lines, "", f"{passed} of {len(rows)} cases ended as they must."]) + "\n"


def _range(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}" if values else "unknown"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("`", "'").split())[:400]


def read(path: Path) -> dict[str, Row]:
    """Rows of earlier runs."""
    if not path.is_file():
        return {}
    return {row["case"]: Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))}


def main() -> None:
    """Plays the cases and writes what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="NAME", default=list(CASES), choices=list(CASES))
    parser.add_argument("--deadline", type=float, default=30.0, help="seconds, where a site is lost (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, help="folder for all files, kept (default: a temporary one)")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    place = asked.keep or Path(tempfile.mkdtemp(prefix="fedmerge-"))
    room, wrong = Room(place.absolute(), asked.deadline), 0
    try:
        for name in asked.only:
            row = played(CASES[name], room)
            wrong += not row.passed
            sys.stderr.write(
                f"{'ok' if row.passed else 'NOT'} {row.seconds:4.0f} s  {name}: {row.ended}; {row.faults}\n"
            )
            rows = {**read(asked.out / "faults.json"), name: row}
            rows = {known: rows[known] for known in CASES if known in rows}
            text = json.dumps([asdict(each) for each in rows.values()], indent=1)
            (asked.out / "faults.json").write_text(text + "\n", encoding="utf-8")
            (asked.out / "faults.md").write_text(page(rows), encoding="utf-8")
    finally:
        if asked.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
