"""From a handful of labelled samples to a model and an honest estimate."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.core.errors import UsageError, unknown_name
from fedmerge.core.randomness import generator
from fedmerge.data import Examples
from fedmerge.data.federated import concatenate
from fedmerge.experiment.simulation import one_thread, remember
from fedmerge.onboarding.choice import best_epochs, choose, is_better
from fedmerge.onboarding.fit import Fit, judge, neighbours
from fedmerge.onboarding.own_head import candidates_with_head
from fedmerge.onboarding.plan import Plan, make_plan
from fedmerge.onboarding.result import Estimate, Onboarded, Tried, estimate_of, row_of
from fedmerge.onboarding.samples import read_samples
from fedmerge.onboarding.server import Server
from fedmerge.onboarding.ways import TUNED, WAYS, Candidate, Fitting, candidates
from fedmerge.onboarding.weights import predictor
from fedmerge.runtime import Sequential
from fedmerge.training import Descent, one_pass

log = logging.getLogger(__name__)


def onboard_server(
    server: Server,
    data: Any,
    *,
    validation: Any = None,
    way: str = "auto",
    label_column: str | None = None,
    seed: int = 0,
) -> Onboarded:
    """A new client's model from the server's models of a run.

    Args:
        server: The run.
        data: The client's labelled samples, as for `read_samples`.
        validation: Further ones, held out; the ways are compared on them.
        way: One of `WAYS`, or ``auto``.
        label_column: Of tables; the run's own by default.
        seed: Of folds and batches.

    Raises:
        UsageError: if the way does not exist or there are no such files.
        DataError: naming what is wrong with the samples.
    """
    if way != "auto" and way not in WAYS:
        raise UsageError(unknown_name("way", way, ("auto", *WAYS)))
    if not _is_seed(seed):
        raise UsageError(f"seed: got {seed!r}; expected a whole number >= 0")
    server, given = read_samples(data, server, label_column=label_column, what="new client")
    own, held = given["train"], given.get("validation")
    if validation is not None:
        held = read_samples(validation, server, label_column=label_column, what="validation", classes=True)[1]["train"]
    if held is not None:
        _warn_of_shared(own, held)
    began = time.perf_counter()
    with one_thread():
        return _onboarded(server, own, held, way, seed, began)


def _is_seed(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 0


def _warn_of_shared(own: Examples, held: Examples) -> None:
    """Samples that are fitted and judged on make every way look good, fine-tuning most."""
    fitted = {row.numpy().tobytes() for row in own.inputs.flatten(1)}
    shared = sum(row.numpy().tobytes() in fitted for row in held.inputs.flatten(1))
    if shared:
        log.warning(
            "%d of %d validation samples are among those that the model is fitted on: the estimate is too good. Give "
            "others, or none: then a part is held out",
            shared,
            len(held.targets),
        )


def _onboarded(server: Server, own: Examples, held: Examples | None, way: str, seed: int, began: float) -> Onboarded:
    fitting = prepared(server, own, held, seed=seed)
    server, plan = fitting.server, fitting.plan
    of_server = candidates_with_head if server.kept else candidates
    found = of_server(fitting, _wanted(way, plan, server), seed=seed)
    offered = [candidate for candidate in found if way in ("auto", candidate.way)]
    chosen = chosen_of(offered, plan, server)
    return Onboarded(
        way=chosen.way,
        epochs=chosen.epochs,
        row=row_of(chosen.rows),
        params=own_buffers(server, chosen.params[None], own)[0],
        estimate=_estimate(offered, plan),
        missing="" if plan.held else plan.how,
        candidates=_table(found, chosen, plan),
        fit=_fit(found, server, plan),
        num_samples=len(own.targets),
        seconds=time.perf_counter() - began,
        server=server,
    )


def prepared(server: Server, own: Examples, held: Examples | None, *, seed: int) -> Fitting:
    """Everything that the ways need.

    Args:
        server: The run.
        own: The client's samples.
        held: Further ones that are only used to compare and to estimate.
        seed: Of the folds.
    """
    server = with_own_buffers(server, own)
    examples = own if held is None else concatenate([own, held])
    remember(server.module, examples.inputs)
    plan = make_plan(examples, 0 if held is None else len(held.targets), generator(seed, "onboarding folds"))
    return Fitting(server, predictor(server, own.inputs), examples, plan)


def _wanted(way: str, plan: Plan, server: Server) -> tuple[Any, ...]:
    if way != "auto":
        return (way,)
    if not plan.held:
        return ()
    return TUNED if len(server.models) > 1 else ("fine-tune",)


def chosen_of(offered: Sequence[Candidate], plan: Plan, server: Server) -> Candidate:
    """The one that is clearly better than the first on held-out samples, or the first."""
    if plan.held:
        return offered[choose(offered, torch.arange(len(plan.held_samples)))]
    usual = server.serving.training.epochs  # without held-out samples: as long as in one round of the run
    return min((c for c in offered if c.way == offered[0].way), key=lambda c: abs(c.epochs - usual))


def _estimate(offered: Sequence[Candidate], plan: Plan) -> Estimate | None:
    """Every held-out sample under the way that is chosen without its part of them."""
    if not plan.held:
        return None
    losses, right = torch.empty(len(plan.parts), dtype=torch.float64), torch.empty(len(plan.parts), dtype=torch.bool)
    for part in sorted(set(plan.parts.tolist())):
        inside = (plan.parts == part).nonzero()[:, 0]
        outside = (plan.parts != part).nonzero()[:, 0]
        best = offered[choose(offered, outside if len(outside) else inside)].held
        losses[inside], right[inside] = best.losses[inside], best.right[inside]
    return estimate_of(losses, right, plan.how)


def _table(found: Sequence[Candidate], chosen: Candidate, plan: Plan) -> tuple[Tried, ...]:
    if not plan.held:
        return tuple(
            Tried(c.way, c.epochs, None, None, c is chosen) for c in found if c.way == chosen.way and c is chosen
        )
    best = [found[place] for place in best_epochs(found, torch.arange(len(plan.held_samples)))]
    return tuple(
        Tried(c.way, c.epochs, float(c.held.right.double().mean()), float(c.held.losses.mean()), c is chosen)
        for c in best
    )


def _fit(found: Sequence[Candidate], server: Server, plan: Plan) -> Fit:
    """Of the preferred merged model, before any fine-tuning."""
    own, known = found[0], next((candidate for candidate in found if candidate.way == "nearest"), None)
    nearest = neighbours(own.rows, server.rows, server.record.client_names)
    clearly = known is not None and bool(plan.held) and is_better(own.held.losses, known.held.losses)
    return judge(own.held.losses if plan.held else own.held.losses[:0], nearest, server.record, clearly_better=clearly)


def with_own_buffers(server: Server, examples: Examples) -> Server:
    """The server's models with BatchNorm statistics of the new client, where the run's clients used their own."""
    return dataclasses.replace(server, models=own_buffers(server, server.models, examples))


def own_buffers(server: Server, models: Tensor, examples: Examples) -> Tensor:
    """[R, P] models with statistics measured on the client's inputs, unless the run merges them."""
    T = server.layout.num_trainable
    if server.serving.options.buffers == "merge" or models.shape[1] == T:
        return models
    batches = one_pass(examples)
    engine = Sequential(server.module_of(server.models[0]), server.layout, Descent())
    measured = engine.measured_buffers([(vector, batches) for vector in models])
    return torch.cat([models[:, :T], torch.stack(measured)], dim=1)
