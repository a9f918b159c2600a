"""The scale of inputs over all sites, from sums: no row leaves a site, but its sums do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.core.errors import DataError
from fedmerge.data.federated import ClientData
from fedmerge.deploy.messages import Answer
from fedmerge.deploy.schema import DataSchema

Scale = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, one of each per feature or channel."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over a site's train rows, per feature (of images: per channel).

    They leave the site: whoever gets them knows the site's mean and spread of every feature. Of a single row they are
    that row.

    Attributes:
        count: Numbers that each sum runs over: rows, of images pixels.
        total: [k] their sum, float64.
        squares: [k] sum of squared differences from the site's own mean, float64. The plain sum of squares would be
            ``squares + total² / count``; it loses all digits where the mean is large beside the spread.
    """

    count: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]

    def plain(self) -> dict[str, Any]:
        """As what JSON knows; the inverse of `moments_from_plain`."""
        return {"count": self.count, "total": self.total.tolist(), "squares": self.squares.tolist()}


def moments(client_raw: ClientData) -> Moments:
    """The sums of a client's train rows, before they are scaled.

    Args:
        client_raw: See `fedmerge.deploy.site_data.raw_client`.

    Raises:
        DataError: if it has no train rows, or texts.
    """
    inputs = client_raw.train.inputs
    if inputs.dtype.is_floating_point is False and inputs.dim() != 4:
        raise DataError(f"client {client_raw.name!r} has texts, which have no scale; leave it out")
    if not len(inputs):
        raise DataError(f"client {client_raw.name!r} has no train rows; expected one at least")
    rows = inputs.numpy()
    axes = (0, 2, 3) if rows.ndim == 4 else (0,)
    total = rows.sum(axis=axes, dtype=np.float64)
    spread = rows.var(axis=axes, dtype=np.float64)
    count = rows.size // total.size
    return Moments(count, total.ravel(), spread.ravel() * count)


def pooled(sites: Sequence[Moments]) -> Scale:
    """Mean and standard deviation over the train rows of all sites, as `standard_scale` finds them in one place.

    Mean Σ total / n and variance (Σ squares + Σ count (total / count − mean)²) / n with n = Σ count, in float64; both
    rounded to float32, which inputs are scaled in. A feature that is the same everywhere has standard deviation 1.

    Args:
        sites: The moments of every site, in the order of clients.

    Raises:
        DataError: if there are none, or those of one site are no moments of this federation.
    """
    if not sites:
        raise DataError("no moments at all; expected those of one site at least")
    for place, site in enumerate(sites):
        _check(site, len(sites[0].total), place)
    counts = np.array([site.count for site in sites], dtype=np.float64)[:, None]
    totals = np.stack([site.total for site in sites])
    mean = totals.sum(axis=0) / counts.sum()
    between = (counts * (totals / counts - mean) ** 2).sum(axis=0)
    std = np.sqrt((np.stack([site.squares for site in sites]).sum(axis=0) + between) / counts.sum())
    mean32, std32 = mean.astype(np.float32), std.astype(np.float32)
    return tuple(mean32.tolist()), tuple(np.where(std32 > 0, std32, np.float32(1)).tolist())


def moments_from_plain(plain: Any) -> Moments:
    """The moments that plain values describe, for example those in a message.

    Raises:
        DataError: if they do not describe any.
    """
    try:
        total, squares = (np.array(plain[key], dtype=np.float64) for key in ("total", "squares"))
        made = Moments(plain["count"], total, squares)
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise DataError("a site's moments are damaged; expected count, total and squares") from error
    _check(made, len(total) if total.ndim == 1 else 0, None)
    return made


def moments_of_answer(answer: Answer, schema: DataSchema) -> Moments:
    """The moments that a site told of, held against the form that all sites share and its own number of rows.

    Args:
        answer: The site's to a hello.
        schema: Of the federation.

    Raises:
        DataError: naming the site, if they cannot be those of its train rows.
    """
    is_image = len(schema.shape) == 3
    features = schema.shape[0] if is_image else math.prod(schema.shape)
    count = answer.num_train * (math.prod(schema.shape) // features)
    who = f"site {answer.site!r}"
    try:
        found = moments_from_plain(answer.moments)
    except DataError as error:
        raise DataError(f"{who}: {error}") from error
    if len(found.total) != features:
        raise DataError(
            f"{who}: got sums of {len(found.total)} {'channels' if is_image else 'features'}; the federation has "
            f"{features}"
        )
    if found.count != count:
        raise DataError(f"{who}: got sums over {found.count} numbers each; its {answer.num_train} rows have {count}")
    return found


def fault_of_moments(answer: Answer, schema: DataSchema) -> str:
    """Why a site's moments cannot be used; empty if they can, or none are needed.

    Args:
        answer: The site's to a hello.
        schema: Of the federation, as the hello had it.
    """
    if not schema.needs_moments:
        return ""
    try:
        moments_of_answer(answer, schema)
    except DataError as error:
        return str(error).removeprefix(f"site {answer.site!r}: ")
    return ""


_LARGEST = 2.0**63
"""Of a mean or a standard deviation that float32 holds with room for a network's sums."""


def _check(site: Moments, features: int, place: int | None) -> None:
    """Refuses what cannot be the sums of finite rows; comparisons are such that NaN fails them."""
    where = "a site's moments are damaged" if place is None else f"the moments of site {place} from 0 are damaged"
    if type(site.count) is not int or not 1 <= site.count < 2**53:
        raise DataError(f"{where}: got count {site.count!r:.40}; expected a whole number >= 1")
    for name, values in (("total", site.total), ("squares", site.squares)):
        if values.shape != (features,) or not features:
            raise DataError(f"{where}: {name} has shape {list(values.shape)}; expected [{features}], one per feature")
    with np.errstate(over="ignore", invalid="ignore"):
        fits = (np.abs(site.total) / site.count < _LARGEST) & (site.squares >= 0)
        fits &= np.sqrt(site.squares / site.count) < _LARGEST
    if not fits.all():
        feature = int(np.flatnonzero(~fits)[0])
        raise DataError(f"{where}: those of feature {feature} are no sums of numbers that networks could be given")
