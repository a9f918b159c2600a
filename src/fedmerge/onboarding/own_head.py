"""New clients of a run whose clients keep their output layer: theirs is fitted along with the merging weights."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fedmerge.core.errors import UsageError
from fedmerge.core.mixing import Moments, adam_step
from fedmerge.onboarding.server import Server
from fedmerge.onboarding.ways import TUNED, Candidate, Fitting, Way, fixed_rows, tuned
from fedmerge.onboarding.weights import RATE, scored
from fedmerge.training import Descent, ModuleTask

STEPS = 30
"""Of Adam on logits and output layer together; they begin where the best known row and its own output layer are."""
_HEAD_RATE = 0.01
_SURE = 5.0
"""Output for the only class that a set of samples has."""


def candidates_with_head(fitting: Fitting, wanted: Collection[Way], *, seed: int) -> list[Candidate]:
    """Every wanted way; in each the output layer is fitted on the samples of the fit.

    Args:
        fitting: Run, samples and plan.
        wanted: Ways beside those without training; ``shrunk-weights`` is not offered here.
        seed: Of all draws.

    Raises:
        UsageError: if a way is wanted that this run does not offer.
    """
    server, plan = fitting.server, fitting.plan
    fixed = {way: _with_best_row(fitting, rows) for way, rows in fixed_rows(server).items()}
    starts: dict[Way, tuple[Tensor, Tensor]] = dict(fixed)
    found: list[Candidate] = []
    if len(server.models) > 1:
        best = min(fixed.values(), key=lambda start: float(_train_losses(fitting, start[1]).mean()))
        starts["weights"] = _learned(fitting, *best)
    for way in ("weights", *fixed):
        if way in starts:
            rows, params = starts[way]
            held = fitting.held_of_fits(scored(fitting.predict, params, fitting.examples))
            found.append(Candidate(way, 0, held, rows[plan.final], params[plan.final]))
    _refuse_missing(wanted, {candidate.way for candidate in found})
    plain = starts["mean"] if "mean" in starts else starts["uniform"]
    tuning = {"fine-tune": plain, "weights-then-fine-tune": starts.get("weights", plain)}
    return found + tuned(fitting, {way: tuning[way] for way in TUNED if way in wanted}, seed)


def _refuse_missing(wanted: Collection[Way], offered: Collection[str]) -> None:
    missing = [way for way in wanted if way not in TUNED and way not in offered]
    if missing:
        raise UsageError(
            f"way {missing[0]!r} is not offered for a run whose clients keep their output layer; take one of auto, "
            f"fine-tune, {', '.join(sorted(offered))}"
        )


def _with_best_row(
    fitting: Fitting, rows: Float[Tensor, "R G d"]
) -> tuple[Float[Tensor, "F G d"], Float[Tensor, "F P"]]:
    """For each fit one of R rows, by the loss of its model with an output layer fitted there."""
    models = fitting.server.merged(rows)
    features = _features(fitting.server, models, fitting.examples.inputs)
    tried = torch.stack([_with_heads(fitting, vector, own) for vector, own in zip(models, features, strict=True)])
    losses = torch.stack([_train_losses(fitting, params) for params in tried])
    best = losses.argmin(dim=0)
    return rows[best], tried[best, torch.arange(len(best))]


@torch.no_grad()
def _features(server: Server, models: Float[Tensor, "R P"], inputs: Tensor) -> list[Float[Tensor, "n F"]]:
    """What the output layer of each model is given."""
    task = ModuleTask(server.module, server.layout, Descent())
    return [task.features(vector, inputs) for vector in models]


def _with_heads(fitting: Fitting, vector: Float[Tensor, " P"], features: Float[Tensor, "n F"]) -> Float[Tensor, "F P"]:
    """The model with an output layer of its own for each fit."""
    server = fitting.server
    start, stop = server.layout.head
    heads = [fitted_head(features[fit], fitting.examples.targets[fit], server.num_classes) for fit in fitting.plan.fits]
    return torch.stack([torch.cat([vector[:start], head.to(vector.dtype), vector[stop:]]) for head in heads])


def fitted_head(features: Float[Tensor, "m F"], targets: Tensor, num_classes: int) -> Float[Tensor, " K"]:
    """Weights and biases of a linear output layer by logistic regression (scikit-learn's, C = 1), as one vector.

    A class without samples gets the bias −5 and is never the answer.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - takes a while to import

    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    bias = torch.full((num_classes,), -_SURE, dtype=torch.float64)
    present = torch.unique(targets)
    if len(present) == 1:
        bias[present] = _SURE
        return torch.cat([weight.flatten(), bias])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a limit of iterations that is reached is good enough
        fit = LogisticRegression(max_iter=300).fit(features.double().numpy(), targets.numpy())
    coefficients, intercept = torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)
    if len(coefficients) == 1:  # two classes: one row stands for their difference
        coefficients, intercept = (torch.cat([-part, part]) / 2 for part in (coefficients, intercept))
    weight[present], bias[present] = coefficients.double(), intercept.double()
    return torch.cat([weight.flatten(), bias])


def _train_losses(fitting: Fitting, params: Float[Tensor, "F P"]) -> Float[Tensor, " F"]:
    """Mean loss of each fit's model on the samples of the fit."""
    losses = scored(fitting.predict, params, fitting.examples).losses
    return torch.stack([losses[fit, samples].mean() for fit, samples in enumerate(fitting.plan.fits)])


def _learned(
    fitting: Fitting, rows: Float[Tensor, "F G d"], params: Float[Tensor, "F P"]
) -> tuple[Float[Tensor, "F G d"], Float[Tensor, "F P"]]:
    """Rows and output layers after 30 steps of Adam on the loss of each fit."""
    server, examples, F = fitting.server, fitting.examples, len(rows)
    start, stop = server.layout.head
    shares = torch.zeros(F, len(examples.targets), dtype=server.dtype)
    for fit, samples in enumerate(fitting.plan.fits):
        shares[fit, samples] = 1 / len(samples)
    logits, heads = (0.5 * rows + 0.5 * server.uniform).log(), params[:, start:stop].double()
    values = torch.cat([logits.flatten(1), heads], dim=1)
    rates = torch.cat([torch.full_like(logits.flatten(1), RATE), torch.full_like(heads, _HEAD_RATE)], dim=1)
    moments = Moments(torch.zeros_like(values), torch.zeros_like(values), torch.zeros(F, dtype=torch.int64))
    for _ in range(STEPS):
        values = values.detach().requires_grad_()
        loss = (_losses(fitting, values, logits.shape) * shares).sum()
        (slope,) = torch.autograd.grad(loss, values)
        moved, moments = adam_step(torch.zeros_like(values), torch.nan_to_num(slope), moments, lr=1.0, beta2=0.999)
        values = values.detach() + rates * moved
    learned = torch.softmax(values[:, : logits[0].numel()].reshape(logits.shape), dim=-1)
    return learned, _whole(server, learned, values[:, logits[0].numel() :])


def _losses(fitting: Fitting, values: Float[Tensor, "F V"], shape: torch.Size) -> Float[Tensor, "F n"]:
    """Of each fit's model on all samples."""
    size, examples = shape[1] * shape[2], fitting.examples
    rows = torch.softmax(values[:, :size].reshape(shape), dim=-1)
    outputs = fitting.predict(_whole(fitting.server, rows, values[:, size:]), examples.inputs)
    targets = examples.targets.expand(len(values), -1).reshape(-1)
    return functional.cross_entropy(outputs.flatten(0, 1), targets, reduction="none").reshape(len(values), -1)


def _whole(server: Server, rows: Float[Tensor, "F G d"], heads: Float[Tensor, "F K"]) -> Float[Tensor, "F P"]:
    """Merged models with these output layers."""
    merged = server.merged(rows)
    start, stop = server.layout.head
    return torch.cat([merged[:, :start], heads.to(merged.dtype), merged[:, stop:]], dim=1)
