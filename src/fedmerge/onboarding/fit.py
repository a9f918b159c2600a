"""How well a new client fits a federation: its held-out loss beside those of the known clients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.experiment.record import RunRecord

Verdict = Literal["like known clients", "between groups", "unlike any known client", "not known"]

QUANTILE = 0.95
"""Of the known clients' losses: a new client that is clearly above it is unlike them."""
ERRORS = 2.0
"""Standard errors by which it must be above."""
DISTANCE = 0.25
"""Share of weight (total variation) by which a row may differ from the nearest known one."""
FEWEST_KNOWN = 4
"""Known clients with validation samples below which there is nothing to compare with."""
_NAMED = 3


@dataclass(frozen=True)
class Fit:
    """A judgement in words and numbers.

    Attributes:
        verdict: In a few words.
        reason: One sentence with the numbers.
        loss: Held-out loss in nats of the client's merged model, before any fine-tuning; None if not known.
        error: Its standard error.
        share_below: Share of known clients whose validation loss is lower, 0..1; None if not known.
        median: Of the known clients' losses.
        limit: Their 95 % quantile.
        nearest: Known clients with the nearest rows, the nearest first.
        distance: Total variation between the client's row and the nearest known one, 0..1.
    """

    verdict: Verdict
    reason: str
    loss: float | None = None
    error: float | None = None
    share_below: float | None = None
    median: float | None = None
    limit: float | None = None
    nearest: tuple[str, ...] = ()
    distance: float | None = None


@dataclass(frozen=True)
class Neighbours:
    """Known clients by the distance of their rows.

    Attributes:
        names: The nearest first, three at most.
        distance: Total variation to the nearest.
    """

    names: tuple[str, ...]
    distance: float


def neighbours(
    row: Float[Tensor, "G d"], known: Float[Tensor, "G N d"] | None, names: tuple[str, ...]
) -> Neighbours | None:
    """The known clients with the nearest rows; None where all rows are alike or there are none.

    Args:
        row: The new client's.
        known: Of the known clients.
        names: [N].
    """
    if known is None or known.shape[2] == 1:
        return None
    distances = (known - row[:, None]).abs().sum(dim=2).mean(dim=0) / 2
    order = torch.argsort(distances, stable=True)[:_NAMED].tolist()
    return Neighbours(tuple(names[i] for i in order), float(distances[order[0]]))


def judge(held: Float[Tensor, " m"], nearest: Neighbours | None, record: RunRecord, *, clearly_better: bool) -> Fit:
    """The judgement.

    ``unlike any known client``: the held-out loss is above the 95 % quantile of the known clients' validation losses
    by more than two standard errors. ``between groups``: it is not, but the row differs from every known one by more
    than a quarter of the weight, and the learned row is clearly better than the nearest known client's.

    Args:
        held: Losses of the held-out samples under the client's merged model.
        nearest: Known clients by distance.
        record: Of the run, with the known clients' losses.
        clearly_better: Whether the learned row beats that of the nearest known client.
    """
    known = known_losses(record)
    where = {} if nearest is None else {"nearest": nearest.names, "distance": nearest.distance}
    if len(held) == 0:
        return Fit("not known", "too few samples to hold any out", **where)  # type: ignore[arg-type]
    loss, error = float(held.mean()), _error(held)
    if len(known) < FEWEST_KNOWN:
        reason = f"the run has {len(known)} clients with validation samples to compare with"
        if not record.client_names:
            reason = "how the known clients do is not told"
        return Fit("not known", reason, loss, error, **where)  # type: ignore[arg-type]
    median, limit = float(np.median(known)), float(np.quantile(known, QUANTILE))
    share = float((known < loss).mean())
    text = (
        f"held-out loss {loss:.2f} ± {error:.2f} nats under its merged model; {100 * share:.0f} % of {len(known)} "
        f"known clients have a lower one (median {median:.2f}, 95 % below {limit:.2f})"
    )
    verdict, why = _verdict(loss - ERRORS * error > limit, nearest, clearly_better=clearly_better)
    return Fit(verdict, f"{text}{why}", loss, error, share, median, limit, **where)  # type: ignore[arg-type]


def _verdict(is_above: bool, nearest: Neighbours | None, *, clearly_better: bool) -> tuple[Verdict, str]:
    if is_above:
        return "unlike any known client", "; no merge of the server's models fits its labels as theirs are fitted"
    if nearest is None:
        return "like known clients", ""
    text = f"nearest: {', '.join(nearest.names)} ({100 * nearest.distance:.0f} % of the weight lies elsewhere)"
    if nearest.distance > DISTANCE and clearly_better:
        return "between groups", f"; {text}, whose own weights fit clearly worse"
    return "like known clients", f"; {text}"


def known_losses(record: RunRecord) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Validation losses of the known clients that have any, at the selected round."""
    scores = record.selected().validation
    values = [] if scores is None else [loss for loss in scores.loss if loss is not None]
    return np.array(values, dtype=np.float64)


def _error(losses: Float[Tensor, " m"]) -> float:
    """Standard error of the mean; infinite for one sample, of which nothing is known."""
    return float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf
