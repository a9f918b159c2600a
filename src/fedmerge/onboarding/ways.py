"""The ways to a model for a new client, each fitted on every set of samples that the plan asks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.core.errors import UsageError
from fedmerge.core.randomness import fresh_module_randomness, generator
from fedmerge.data import Examples
from fedmerge.onboarding.plan import Plan
from fedmerge.onboarding.server import Server
from fedmerge.onboarding.weights import Predict, Scored, learned_rows, scored
from fedmerge.runtime import Sequential
from fedmerge.training import draw_batches

Way = Literal[
    "shrunk-weights", "weights", "uniform", "mean", "single", "nearest", "fine-tune", "weights-then-fine-tune"
]
WAYS: tuple[Way, ...] = get_args(Way)
TUNED: tuple[Way, ...] = ("fine-tune", "weights-then-fine-tune")
EPOCHS = (1, 2, 5, 10, 20)
"""Lengths of fine-tuning that are tried."""
MOST_ROWS = 64
"""Rows of known clients that are tried as they are."""
PRIOR = 10
"""Samples that known clients' rows count for beside the learned one; measured on seeds that no result reports."""
_SHARPNESS = 0.5
_LARGE = 100.0
"""Loss of one sample at which infinite ones are cut, in nats."""
_CHUNK = 16


@dataclass(frozen=True)
class Candidate:
    """One way with one number of epochs.

    Attributes:
        way: Its name.
        epochs: Of fine-tuning; 0 for ways without.
        held: Losses and right answers [m] on the held-out samples, each by a model that was fitted without it.
        rows: [G, d] of the final fit; for tuned ways the row that tuning started from.
        params: [P] of the final fit.
    """

    way: Way
    epochs: int
    held: Scored
    rows: Float[Tensor, "G d"]
    params: Float[Tensor, " P"]


@dataclass(frozen=True)
class Fitting:
    """What all ways need.

    Attributes:
        server: The run.
        predict: Outputs of several models.
        examples: All samples.
        plan: Which of them are fitted.
    """

    server: Server
    predict: Predict
    examples: Examples
    plan: Plan

    def scored_rows(self, rows: Float[Tensor, "R G d"]) -> Scored:
        """Of merged models, a few at a time."""
        parts = [
            scored(self.predict, self.server.merged(rows[start : start + _CHUNK]), self.examples)
            for start in range(0, len(rows), _CHUNK)
        ]
        return Scored(torch.cat([part.losses for part in parts]), torch.cat([part.right for part in parts]))

    def held_of_fits(self, fitted: Scored, offset: int = 0) -> Scored:
        """Of each held-out sample under the model of its own fit; row `offset` + f is that of fit f."""
        if not self.plan.held:
            return Scored(fitted.losses[0, :0], fitted.right[0, :0])
        return fitted.at(self.plan.fold_of + offset, self.plan.held_samples)

    def best_of(self, choices: Scored) -> Tensor:
        """[F] which of R models has the lowest loss on the samples of each fit."""
        return torch.stack([choices.losses[:, fit].mean(dim=1).argmin() for fit in self.plan.fits])


def fixed_rows(server: Server) -> dict[Way, Float[Tensor, "R G d"]]:
    """Rows that need no learning, by way; one of several is chosen by its loss."""
    d, groups = len(server.models), len(server.blocks)
    found: dict[Way, Tensor] = {"uniform": server.uniform[None]}
    if d == 1:
        return found
    found["single"] = torch.eye(d, dtype=torch.float64)[:, None].expand(d, groups, d)
    if server.rows is not None:
        found["mean"] = server.rows.mean(dim=1)[None]
        found["nearest"] = spread_out(server.rows.transpose(0, 1))
    elif server.mean_row is not None:
        found["mean"] = server.mean_row[None]
    return found


def spread_out(rows: Float[Tensor, "N G d"]) -> Float[Tensor, "R G d"]:
    """The different ones among known rows (to two decimals), every so-manieth if there are more than 64."""
    _, first = np.unique((100 * rows).round().flatten(1).numpy(), axis=0, return_index=True)
    step = math.ceil(len(first) / MOST_ROWS)
    return rows[torch.from_numpy(first[::step])]


def candidates(fitting: Fitting, wanted: Collection[Way], *, seed: int) -> list[Candidate]:
    """Every wanted way, fitted, the preferred one first; those without training always come along for the judgement.

    Args:
        fitting: Run, samples and plan.
        wanted: Ways beside those without training.
        seed: Of all draws.

    Raises:
        UsageError: if a way is wanted that this run does not offer.
    """
    server, plan = fitting.server, fitting.plan
    rng = generator(seed, "onboarding weights")
    learned = learned_rows(server, fitting.predict, fitting.examples, list(plan.fits), rng)
    fixed = {way: (rows, fitting.scored_rows(rows)) for way, rows in fixed_rows(server).items()}
    fitted: dict[Way, Tensor] = {}
    if "nearest" in fixed:
        fitted["shrunk-weights"] = shrunk(learned, likely_rows(fitting, *fixed["nearest"]), plan)
    if len(server.models) > 1 or "weights" in wanted:
        fitted["weights"] = learned
    found = [_of_fits(fitting, way, rows) for way, rows in fitted.items()]
    found += [_of_choices(fitting, way, rows, tried) for way, (rows, tried) in fixed.items()]
    _refuse_missing(wanted, found, server)
    plain = torch.cat([fixed[way][0] for way in ("uniform", "mean") if way in fixed])
    starts: dict[Way, Tensor] = {
        "weights-then-fine-tune": fitted.get("shrunk-weights", learned),
        "fine-tune": plain[fitting.best_of(fitting.scored_rows(plain))],
    }
    begun = {way: (starts[way], server.merged(starts[way])) for way in TUNED if way in wanted}
    return found + tuned(fitting, begun, seed)


def likely_rows(fitting: Fitting, rows: Float[Tensor, "R G d"], tried: Scored) -> Float[Tensor, "F G d"]:
    """Average of known rows, each weighing exp(−½ its summed loss on the samples of the fit).

    With the factor 1 this would be Bayes' average over "which known client is this one like?"; ½ makes it less sure,
    because a known client's model is never exactly the new one's.
    """
    sums = torch.stack([tried.losses[:, fit].clamp_max(_LARGE).sum(dim=1) for fit in fitting.plan.fits])
    return torch.einsum("fr,rgd->fgd", torch.softmax(-_SHARPNESS * sums, dim=1), rows)


def shrunk(learned: Float[Tensor, "F G d"], likely: Float[Tensor, "F G d"], plan: Plan) -> Float[Tensor, "F G d"]:
    """(n · learned + 10 · likely) / (n + 10) for each fit of n samples."""
    counts = torch.tensor([len(fit) for fit in plan.fits], dtype=torch.float64)[:, None, None]
    return (counts * learned + PRIOR * likely) / (counts + PRIOR)


def _refuse_missing(wanted: Collection[Way], found: Sequence[Candidate], server: Server) -> None:
    offered = {candidate.way for candidate in found}
    missing = [way for way in wanted if way not in TUNED and way not in offered]
    if missing:
        raise UsageError(
            f"way {missing[0]!r} needs several server models and merging weights of known clients; method "
            f"{server.record.method!r} has {len(server.models)} model(s) here. Take one of auto, fine-tune, "
            f"{', '.join(sorted(offered))}"
        )


def _of_fits(fitting: Fitting, way: Way, rows: Float[Tensor, "F G d"]) -> Candidate:
    """A row of its own for each fit."""
    return _candidate(fitting, way, fitting.held_of_fits(fitting.scored_rows(rows)), rows[fitting.plan.final])


def _of_choices(fitting: Fitting, way: Way, rows: Float[Tensor, "R G d"], tried: Scored) -> Candidate:
    """One of R rows for each fit, by its loss there."""
    plan, best = fitting.plan, fitting.best_of(tried)
    held = tried.at(best[plan.fold_of], plan.held_samples) if plan.held else fitting.held_of_fits(tried)
    return _candidate(fitting, way, held, rows[best[plan.final]])


def _candidate(fitting: Fitting, way: Way, held: Scored, rows: Tensor) -> Candidate:
    return Candidate(way, 0, held, rows, fitting.server.merged(rows[None])[0])


def tuned(fitting: Fitting, starts: dict[Way, tuple[Tensor, Tensor]], seed: int) -> list[Candidate]:
    """Local training with the run's options from each start, kept after 1, 2, 5, 10 and 20 epochs.

    Longer is not tried where it is worse on held-out samples for every way.
    Momentum starts anew at each of these, as it does in every round of a run.

    Args:
        fitting: Run, samples and plan.
        starts: Of each way, for every fit the row [F, G, d] and the model [F, P] that training begins from.
        seed: Of batches and dropout.
    """
    if not starts:
        return []
    server, plan, F = fitting.server, fitting.plan, len(fitting.plan.fits)
    training = dataclasses.replace(server.serving.training, epochs=EPOCHS[-1], steps=None)
    sets = [Examples(fitting.examples.inputs[fit], fitting.examples.targets[fit]) for fit in plan.fits]
    steps = [
        draw_batches(own, training, lr=training.lr, seed=seed, round_number=1, client=fit)
        for fit, own in enumerate(sets)
    ]
    per_epoch = [len(batches) // EPOCHS[-1] for batches in steps]
    descent = training.descent()
    # as quick as vectorised here, without the three seconds that torch.func.grad takes to import
    engine = Sequential(server.module_of(server.models[0]), server.layout, descent)
    params = list(torch.cat([models for _, models in starts.values()]))
    found: list[Candidate] = []
    for before, after in zip((0, *EPOCHS), EPOCHS, strict=False):
        pieces = [steps[fit][per_epoch[fit] * before : per_epoch[fit] * after] for fit in range(F)]
        with fresh_module_randomness(seed, "dropout", after):
            params = engine.map(
                lambda task, vector, batches: task.train(vector, batches),
                [(vector, pieces[place % F]) for place, vector in enumerate(params)],
            )
        tried = scored(fitting.predict, torch.stack(params), fitting.examples)
        for place, (way, (rows, _)) in enumerate(starts.items()):
            held = fitting.held_of_fits(tried, place * F)
            found.append(Candidate(way, after, held, rows[plan.final], params[place * F + plan.final]))
        if plan.held and _is_past_best(found, len(starts)):
            break
    return found


def _is_past_best(found: Sequence[Candidate], ways: int) -> bool:
    """Whether the last length was no better than the one before on the held-out samples, for every way."""
    last, before = found[-ways:], found[-2 * ways : -ways]
    return bool(before) and all(
        float(now.held.losses.mean()) >= float(then.held.losses.mean()) for now, then in zip(last, before, strict=True)
    )
