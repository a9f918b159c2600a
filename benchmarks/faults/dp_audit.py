"""Claimed against audited epsilon in adversarial configurations, and one broken scheme that the audit must catch.

``python benchmarks/faults/dp_audit.py [runs]`` writes benchmarks/results/faults/dp_audit.md; exit code 1 if a claim is
exceeded or the broken scheme passes.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from dp_world import World, broken_score, broken_shift, largest_shift, score

from fedmerge.algorithms.dp_fedmerge import DpFedMerge
from fedmerge.privacy import epsilon
from fedmerge.privacy.audit import epsilon_of_shift, lower_bound

DELTA, CONFIDENCE, RUNS = 1e-3, 0.999, 2000
OUT = Path(__file__).parent.parent / "results" / "faults" / "dp_audit.md"
ROUNDING = 1e-6
"""Relative; of the accountant's grid and of reading sums off models."""


def method(d: int = 3, z: float = 1.0, **options: object) -> DpFedMerge:
    return DpFedMerge(num_models=d, noise_multiplier=z, delta=DELTA, **options)  # type: ignore[arg-type]


WORLDS = [
    World("one model", method(1)),
    World("two models, uniform rows", method(2)),
    World("three models, balanced clusters", method(3), rows="clusters", clients=9),
    World("four models, balanced clusters", method(4), rows="clusters", clients=8),
    World("five models, balanced clusters", method(5), rows="clusters", clients=10),
    World("one dominant client: update 10^6 times the others'", method(3), lengths=(1e6, 1.0)),
    World("all others silent", method(3), lengths=(100.0, 1e-9)),
    World("others clipped as well, all alike", method(3), lengths=(100.0, 100.0), aligned=True),
    World("update of exactly the clip", method(3), rows="clusters", lengths=(1.0, 1.0)),
    World("update below the clip", method(3), lengths=(0.5, 0.5)),
    World("target alone in a model", method(3), rows="alone"),
    World("others have e^-30 of the target's model", method(2), rows="tiny"),
    World("random rows", method(4), rows="random"),
    World("more models than clients that take part", method(5, sampling_rate=0.2), clients=6),
    World("as many models as clients", method(6), rows="clusters", clients=6),
    World("two clients", method(2), rows="clusters", clients=2),
    World("counts up to a public cap", method(3, count_cap=10), counts=(10, 1)),
    World("a count of 10^12 over a public cap", method(3, count_cap=10), counts=(10**12, 1)),
    World("momentum", method(2, momentum=0.9), rounds=4),
    World("momentum and sampling", method(2, 0.7, momentum=0.5, sampling_rate=0.3), rounds=4),
    World("sampling 10 %, one model", method(1, 0.6, sampling_rate=0.1), rounds=3),
    World("sampling 50 %, target alone in a model", method(3, 0.7, sampling_rate=0.5), rows="alone", rounds=3),
    World("rows that move fast", method(3, mixing_lr=5.0, decay=0.5), rounds=4),
    World("tiny clip", method(3, clip=1e-6)),
    World("huge clip", method(3, clip=1e6), lengths=(1e12, 1.0)),
    World("little noise", method(2, 0.35), rounds=1),
    World("server step 10", method(2, server_lr=10.0)),
]
BROKEN = [
    World("balanced clusters", method(4), rows="clusters", clients=40, rounds=1),
    World("target alone in a model", method(3), rows="alone", clients=40, rounds=1),
]


def claimed(world: World) -> float:
    chosen = world.method
    return epsilon(chosen.noise_multiplier, chosen.sampling_rate, world.rounds, DELTA)


def attacked(world: World, scorer: object, runs: int) -> float:
    inside, outside = (
        np.array([scorer(world, trial, inside=there) for trial in range(runs)])  # type: ignore[operator]
        for there in (True, False)
    )
    return lower_bound(inside, outside, delta=DELTA, confidence=CONFIDENCE)


def main() -> int:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    torch.set_num_threads(1)
    began = time.perf_counter()
    lines, failures = [], 0
    for world in WORLDS:
        claim, chosen = claimed(world), world.method
        shift = largest_shift(world)
        exact = epsilon_of_shift(shift, chosen.sampling_rate, world.rounds, DELTA)
        seen = attacked(world, score, runs)
        holds = exact <= claim * (1 + ROUNDING) and seen <= claim
        failures += not holds
        lines.append(
            f"| {world.name} | {chosen.num_models} | {chosen.noise_multiplier:g} | {chosen.sampling_rate:g} | "
            f"{world.rounds} | {claim:.3f} | {shift * chosen.noise_multiplier:.4f} | {exact:.3f} | {seen:.3f} | "
            f"{'holds' if holds else 'BROKEN'} |"
        )
    caught = []
    for world in BROKEN:
        claim, shift = claimed(world), broken_shift(world)
        exact, seen = epsilon_of_shift(shift, 1.0, 1, DELTA), attacked(world, broken_score, runs)
        failures += not (exact > claim and seen > claim)
        caught.append(
            f"| {world.name} | {claim:.3f} | {shift:.2f} | {exact:.1f} | {seen:.3f} | "
            f"{'caught' if seen > claim and exact > claim else 'MISSED'} |"
        )
    most = math.log((runs / 2) / 8)
    text = f"""`OMP_NUM_THREADS=1 python benchmarks/faults/dp_audit.py {runs}`

# Claimed against audited epsilon

Delta {DELTA:g}. *Shift*: the most that one client moves the noisy sum, over the clip, measured with and without it;
it must be 1 or less, and *from the shift* is the epsilon that goes with it in every round. *From attacks*: a lower
bound at confidence {CONFIDENCE} from {runs} runs with the client and {runs} without, by an attacker who knows
everything else; the bound cannot exceed about {most:.1f} with so many runs. {time.perf_counter() - began:.0f} seconds.

| configuration | d | z | q | rounds | claimed | shift | from the shift | from attacks | |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

{len(WORLDS)} configurations, {sum("holds" in line for line in lines)} hold.

## A scheme that is known to be broken

Updates clipped one by one, averaged per model with weights that add up to 1, and noise of z·C/(qN) as for one model
(40 clients, z = 1, one release, everybody takes part).

| configuration | claimed | shift in standard deviations | from the shift | from attacks | |
|---|---|---|---|---|---|
{chr(10).join(caught)}
"""
    OUT.write_text(text, encoding="utf-8")
    print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
