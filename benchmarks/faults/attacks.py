"""What a fifth of lying clients costs the honest ones, and what defences cost when nobody lies.

Run from the repository's root on one core::

    OMP_NUM_THREADS=1 python benchmarks/faults/attacks.py

50 clients in 5 groups with 64 training images of Fashion-MNIST (14 x 14) each, 10 of them attackers. Writes
``benchmarks/results/faults/attacks.md`` and ``attacks.svg``. Attacks are described in
``fedmerge.experiment.attacks.Attack``; scores are means over the 40 clients that are honest under every attack.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch

from fedmerge.algorithms import ALGORITHMS
from fedmerge.bench.figures import WIDTH, picture
from fedmerge.core.defences import Defences
from fedmerge.core.errors import FedmergeError
from fedmerge.data import PARTITIONS, SOURCES, FederatedData, deal
from fedmerge.experiment.attacks import Attack, Kind, attackers
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.simulation import prepare, rounds
from fedmerge.models import NETWORKS
from fedmerge.report.markup import Markup, join
from fedmerge.report.statistics import Interval, mean_interval
from fedmerge.report.svg import Scale, legend, line, marker, text, x_axis
from fedmerge.report.text import percent_tick
from fedmerge.training import LocalTraining

GROUPS, CLIENTS, SHARE, ROUNDS = 5, 50, 0.2, 60
SPARE = GROUPS + 3
RATES = {"class-clusters": 0.1, "permuted": 0.3, "rotations": 0.3, "dirichlet": 0.1, "iid": 0.3}
"""Of the full benchmark, where they were tuned for FedMerge without attackers."""
LIARS = round(SHARE * CLIENTS)
OFF = Defences(clip=0, max_count=0)
KINDS: tuple[Kind, ...] = get_args(Kind)
GOAL_ATTACK, GOAL_PEACE = 2.0, 0.3


@dataclass(frozen=True)
class Played:
    """One way to run a federation.

    Attributes:
        label: In tables.
        method: Table of the method.
        guarded: Whether defences are as they come, or off.
    """

    label: str
    method: Mapping[str, Any]
    guarded: bool


EIGHT = Played(f"FedMerge, d = {SPARE}", {"name": "fedmerge", "num_models": SPARE}, guarded=True)
FOUND = Played("FedMerge, d found", {"name": "fedmerge"}, guarded=True)
FEDAVG = Played("FedAvg", {"name": "fedavg"}, guarded=True)


def off(played: Played) -> Played:
    """The same with every defence off."""
    more = {"max_gap": 0} if played.method["name"] == "fedmerge" else {}
    return Played(f"{played.label}, undefended", {**played.method, **more}, guarded=False)


SETTINGS: Mapping[str, tuple[Played, ...]] = {
    "class-clusters": (EIGHT, off(EIGHT), FOUND, FEDAVG, off(FEDAVG)),
    "permuted": (EIGHT, FOUND),
    "rotations": (EIGHT, FOUND),
}


@dataclass(frozen=True)
class Score:
    """Mean test accuracy of the honest clients; NaN after a run whose models became useless numbers.

    Attributes:
        last: At the last round.
        selected: At the round with the best mean validation accuracy of honest clients.
    """

    last: float
    selected: float


LOST = Score(math.nan, math.nan)


def federation(kind: str, seed: int) -> FederatedData:
    """The clients."""
    faults: list[str] = []
    source = SOURCES.build({"name": "fashion-mnist", "size": 14}, "source", faults)
    table = {"name": kind, "clients": CLIENTS, "train": 64, "validation": 40, "test": 200}
    partition = PARTITIONS.build(table | ({"alpha": 0.1} if kind == "dirichlet" else {}), "partition", faults)
    if source is None or partition is None:
        raise FedmergeError("\n".join(faults))
    pool = source.load()
    return deal(pool, partition.split(pool, seed))


def score(played: Played, data: FederatedData, attack: Attack, *, rate: float, seed: int) -> Score:
    """One run."""
    faults: list[str] = []
    method: Any = ALGORITHMS.build(dict(played.method), "method", faults)
    model = NETWORKS.build({"name": "mlp", "hidden": [32]}, "model", faults)
    options = RunOptions(
        rounds=ROUNDS, evaluate_every=20, seed=seed, attack=attack, defences=Defences() if played.guarded else OFF
    )
    training = LocalTraining(lr=rate, epochs=2, batch_size=32)
    liars = set(attackers(Attack("push", share=SHARE), CLIENTS, seed))
    honest = [i for i in range(CLIENTS) if i not in liars]
    found: list[tuple[float, float]] = []
    try:
        setup, progress = prepare(method, data, model, training, options)
        for _, record in rounds(setup, progress):
            if record.validation is not None and record.test is not None:
                both = (record.validation.accuracy, record.test.accuracy)
                validation, test = (float(np.mean([accuracy[i] for i in honest])) for accuracy in both)
                found.append((validation, test))
    except FedmergeError:
        return LOST
    return Score(found[-1][1], max(found, key=lambda pair: pair[0])[1])


Scores = Mapping[tuple[str, str, Kind], Sequence[Score]]
"""(setting, label, attack) -> a score for every seed."""


def attacked(setting: str, seed: int) -> list[tuple[tuple[str, str, Kind], Score]]:
    """Every way to run, under every attack, on one federation."""
    data, found = federation(setting, seed), []
    for kind in KINDS:
        attack = Attack() if kind == "none" else Attack(kind, share=SHARE)
        for played in SETTINGS[setting]:
            result = score(played, data, attack, rate=RATES[setting], seed=seed)
            found.append(((setting, played.label, kind), result))
        sys.stderr.write(f"{setting}, seed {seed}, {kind}\n")
    return found


def paired(setting: str, seed: int) -> list[tuple[tuple[str, str], tuple[Score, Score]]]:
    """Defences on and off without attackers, on one federation."""
    data, found = federation(setting, seed), []
    for played in (FOUND, FEDAVG):
        on, no = (score(way, data, Attack(), rate=RATES[setting], seed=seed) for way in (played, off(played)))
        found.append(((setting, played.label), (on, no)))
    sys.stderr.write(f"price, {setting}, seed {seed}\n")
    return found


Key = TypeVar("Key")
Value = TypeVar("Value")


def gathered(pieces: Iterable[Sequence[tuple[Key, Value]]]) -> dict[Key, list[Value]]:
    """All values of a key, in order."""
    found: dict[Key, list[Value]] = {}
    for key, value in chain.from_iterable(pieces):
        found.setdefault(key, []).append(value)
    return found


def everything(seeds: int, pairs: int, jobs: int) -> tuple[Scores, list[str]]:
    """All runs: under attack, and the rows of the table of prices."""
    under = [(setting, seed) for setting in SETTINGS for seed in range(seeds)]
    peace = [(setting, seed) for setting in RATES for seed in range(pairs)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=quiet) as pool:
        found = gathered(pool.map(attacked, *zip(*under, strict=True)))
        both = gathered(pool.map(paired, *zip(*peace, strict=True)))
    return found, [f"| {setting} | {label} | {_price(scores)} |" for (setting, label), scores in both.items()]


def quiet() -> None:
    """One thread, and no warnings: refused replies are what this is about."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def _price(pairs: Sequence[tuple[Score, Score]]) -> str:
    last = mean_interval(np.array([100 * (on.last - no.last) for on, no in pairs]))
    selected = mean_interval(np.array([100 * (on.selected - no.selected) for on, no in pairs]))
    verdict = "met" if min(last.mean, selected.mean) >= -GOAL_PEACE else "**missed**"
    return f"{_points(last)} | {_points(selected)} | {verdict}"


def _points(found: Interval) -> str:
    return f"{found.mean:+.2f} ± {found.half_width:.2f}"


# ---------------------------------------------------------------- the page


def table(found: Scores, setting: str) -> Iterator[str]:
    """Accuracy in percent, last / selected round, a row per attack."""
    labels = [played.label for played in SETTINGS[setting]]
    yield f"| attack | {' | '.join(labels)} |"
    yield f"|---|{'---|' * len(labels)}"
    for kind in KINDS:
        yield f"| {kind} | {' | '.join(_cell(found[setting, label, kind]) for label in labels)} |"


def _cell(scores: Sequence[Score]) -> str:
    known = [result for result in scores if not math.isnan(result.last)]
    lost = len(scores) - len(known)
    note = f" ({lost} of {len(scores)} lost)" if lost else ""
    return f"{_mean(known, 'last'):.1f} / {_mean(known, 'selected'):.1f}{note}" if known else "lost"


def _mean(scores: Sequence[Score], name: str) -> float:
    return 100 * float(np.mean([getattr(result, name) for result in scores]))


def worst(found: Scores) -> Iterator[str]:
    """A row per setting and way: the attack that costs most at the last round, against none on the same clients."""
    for setting, ways in SETTINGS.items():
        for played in ways:
            peace = found[setting, played.label, "none"]
            costs = {kind: _cost(peace, found[setting, played.label, kind]) for kind in KINDS if kind != "none"}
            kind = max(costs, key=lambda name: costs[name])
            verdict = "met" if costs[kind] <= GOAL_ATTACK else "**missed**"
            missed = [name for name, cost in costs.items() if cost > GOAL_ATTACK]
            yield (
                f"| {setting} | {played.label} | {kind} | {costs[kind]:.1f} "
                f"| {verdict if len(missed) < 2 else f'**missed** by {len(missed)} of {len(costs)} attacks'} |"
            )


def _cost(peace: Sequence[Score], war: Sequence[Score]) -> float:
    """Points lost at the last round, paired by seed; everything for a run that was lost."""
    return 100 * float(
        np.mean([a.last - (0.0 if math.isnan(b.last) else b.last) for a, b in zip(peace, war, strict=True)])
    )


LEFT, ROW, HEAD = 92.0, 20.0, 46.0


def figure(found: Scores) -> Markup:
    """A panel per setting, a row per attack, a mark per way to run at the last round; lost runs have none."""
    labels = list(dict.fromkeys(played.label for ways in SETTINGS.values() for played in ways))
    index = {label: place for place, label in enumerate(labels)}
    key, height = legend([(label, index[label]) for label in labels], 10)
    panels, top = [key], height + 8
    for setting in SETTINGS:
        drawn, top = _panel(found, setting, index, top)
        panels.append(drawn)
    return picture(top, "Test accuracy of honest clients under attack; the table has the numbers", *panels)


def _panel(found: Scores, setting: str, index: Mapping[str, int], top: float) -> tuple[Markup, float]:
    x, first = Scale(0, 1, LEFT, WIDTH - 12), top + HEAD - 16
    bottom = first + ROW * len(KINDS)
    parts: list[Markup] = [text(0, top + 16, setting, class_="axis")]
    for row, kind in enumerate(KINDS):
        y = first + ROW * (row + 0.5)
        parts += [text(0, y + 4.5, kind), line(x(0), y, x(1), y, "grid")]
        for played in reversed(SETTINGS[setting]):
            known = [result.last for result in found[setting, played.label, kind] if not math.isnan(result.last)]
            if known:
                at = float(np.mean(known))
                parts.append(marker(x(at), y, index[played.label], 4, f"{played.label}, {kind}: {100 * at:.1f} %"))
    title = "Mean test accuracy of honest clients at the last round (%)"
    axis = x_axis(x, first, bottom, title, percent_tick)
    return join(axis, *parts), bottom + HEAD + 8


def page(found: Scores, paid: Sequence[str], seeds: int, paid_seeds: int, jobs: int, seconds: float) -> str:
    """The whole page."""
    parts = [
        f"`OMP_NUM_THREADS=1 python benchmarks/faults/attacks.py --jobs {jobs}`",
        "",
        "# A fifth of lying clients",
        "",
        f"{CLIENTS} clients in {GROUPS} groups with 64 training images of Fashion-MNIST (14 x 14) each, a perceptron",
        f"with 32 hidden units, {ROUNDS} rounds of two local epochs, {LIARS} attackers drawn anew for "
        f"each of {seeds} seeds.",
        f"Accuracies are means over the {CLIENTS - LIARS} clients that are honest under every attack, in "
        "percent, at the",
        "last round / at the round that their own validation selects. *Undefended* is without limits on lengths and",
        "counts and without `max_gap`; replies that are no finite numbers are refused either way. A run is lost when a",
        "model gives NaN. *edge*, *turncoat* and *mimic* know the defences.",
        f"Took {seconds:.0f} seconds beside other work on two cores.",
        "",
        "![Accuracy of honest clients under attack](attacks.svg)",
        "",
        "## The attack that costs most",
        "",
        f"Points lost at the last round against the same run without attackers; the goal is at most {GOAL_ATTACK:g}.",
        "",
        "| setting | | worst attack | points lost | |",
        "|---|---|---|---|---|",
        *worst(found),
    ]
    for setting in SETTINGS:
        parts += ["", f"## {setting}", "", *table(found, setting)]
    parts += [
        "",
        "## The price when nobody attacks",
        "",
        f"Defences on minus off, in points, paired over {paid_seeds} seeds, with 95 % intervals; the goal is at least",
        f"−{GOAL_PEACE:g}.",
        "",
        "| setting | | last round | selected round | |",
        "|---|---|---|---|---|",
        *paid,
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Measures and writes the page and its figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="under attack (3)")
    parser.add_argument("--paired", type=int, default=5, help="without attackers (5)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/faults"))
    given = parser.parse_args()
    began = time.perf_counter()
    found, paid = everything(given.seeds, given.paired, given.jobs)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "attacks.svg").write_text(str(figure(found)), encoding="utf-8")
    seconds = time.perf_counter() - began
    (given.out / "attacks.md").write_text(
        page(found, paid, given.seeds, given.paired, given.jobs, seconds), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
