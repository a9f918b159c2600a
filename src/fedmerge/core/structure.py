"""What the first rounds tell about the federation: is there structure, how many models, who belongs together.

Works on the clients' accumulated updates h_i of the first rounds. Numbers and constants: docs/algorithm.md.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.core.sums import inner_products

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def directions(progress: Float[Tensor, "n P"]) -> Float[Tensor, "n P"]:
    """h_i / ‖h_i‖ in float64; a client that did not move keeps 0."""
    wide = progress.double()
    norms = wide.norm(dim=1, keepdim=True)
    return wide / torch.where(norms > 0, norms, torch.ones_like(norms))


def spread_of_cosines(progress: Float[Tensor, "n P"]) -> float:
    """Standard deviation of the off-diagonal cosines between clients: near 0 when all clients pull alike (IID)."""
    unit = directions(progress)
    cosines = inner_products(unit, unit)
    apart = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return float(cosines[apart].std(correction=0)) if len(unit) > 1 else 0.0


def ward_tree(progress: Float[Tensor, "n P"]) -> Floats:
    """Ward's tree over the centred, renormalised directions, in scipy's linkage format [n − 1, 4].

    Column 2 holds the heights; the growth in within-group sum of squares of a merge is height² / 2.
    """
    from scipy.cluster.hierarchy import linkage  # noqa: PLC0415 - only the server needs scipy, once per run
    from scipy.spatial.distance import squareform  # noqa: PLC0415

    unit = directions(progress)
    points = directions(unit - unit.mean(dim=0, keepdim=True))
    products = inner_products(points, points)
    squares = products.diagonal()
    distance = (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0).sqrt()
    distance.fill_diagonal_(0)
    symmetric = ((distance + distance.T) / 2).cpu().numpy()
    tree: Floats = linkage(squareform(symmetric, checks=False), method="ward")
    return tree


def number_of_groups(costs: Floats, *, most: int, elbow: float, floor: float) -> int:
    """How many groups a merge tree shows.

    F(k) = c_{n−k+1} / mean(c_1 .. c_{n−k}) compares the merge that leaves k − 1 groups with all earlier ones. The
    sharpest drop F(k)/F(k+1) decides if it is at least `elbow`; otherwise the largest k with F(2), ..., F(k) all
    above `floor` does, and 2 at least.

    Args:
        costs: [n − 1] merge costs in ascending order of merging.
        most: Largest number of groups considered; at most n − 2 can be told apart.
        elbow: Smallest drop that counts as sharp.
        floor: Smallest F that counts as a real merge cost.
    """
    n = len(costs) + 1
    most = min(most, n - 2)
    if most < 2:
        return 1

    jumps = {k: _ratio(float(costs[n - k]), float(costs[: n - k].mean())) for k in range(2, most + 2)}
    drops = {k: _ratio(jumps[k], jumps[k + 1]) for k in range(2, most + 1)}
    sharpest = max(drops, key=lambda k: drops[k])
    if drops[sharpest] >= elbow:
        return sharpest
    count = 1
    while count < most and jumps[count + 1] > floor:
        count += 1
    return max(count, 2)


def _ratio(cost: float, before: float) -> float:
    """Cost / before; merges of identical clients cost 0, after which any cost is infinitely larger, but 0 is not."""
    if before > 0:
        return cost / before
    return np.inf if cost > 0 else 0.0


def groups_of(tree: Floats, count: int) -> Labels:
    """Cuts a tree into `count` groups, numbered 0.. in order of first appearance."""
    from scipy.cluster.hierarchy import fcluster  # noqa: PLC0415

    return renumbered(fcluster(tree, count, criterion="maxclust"))


def renumbered(labels: NDArray[np.integer]) -> Labels:
    """Group numbers 0.. in order of first appearance.

    >>> renumbered(np.array([7, 7, 2])).tolist()
    [0, 0, 1]
    """
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first)).astype(np.int64)[inverse]


def kmeans(points: Float[Tensor, "n P"], count: int, rng: np.random.Generator, *, restarts: int = 5) -> Labels:
    """Lloyd's k-means with k-means++ starts, the best of `restarts`; every choice is drawn from `rng`.

    Raises:
        ValueError: if there are fewer points than groups.
    """
    if len(points) < count:
        raise ValueError(f"k-means cannot make {count} groups of {len(points)} points")
    values = points.double().cpu().numpy()
    fits = [_lloyd(values, _spread_out(values, count, rng)) for _ in range(restarts)]
    return min(fits, key=lambda fit: fit[0])[1]


def _distances(values: Floats, centres: Floats) -> Floats:
    products = values @ centres.T
    squares = (values**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)[None, :] - 2 * products
    return np.asarray(np.maximum(squares, 0.0), dtype=np.float64)


def _spread_out(values: Floats, count: int, rng: np.random.Generator) -> Floats:
    """k-means++ (Arthur and Vassilvitskii, SODA 2007)."""
    chosen = [int(rng.integers(len(values)))]
    while len(chosen) < count:
        nearest = _distances(values, values[chosen]).min(axis=1)
        total = nearest.sum()
        weights = nearest / total if total > 0 else np.full(len(values), 1 / len(values))
        chosen.append(int(rng.choice(len(values), p=weights)))
    return values[chosen]


def _lloyd(values: Floats, centres: Floats, most: int = 100) -> tuple[float, Labels]:
    labels = np.full(len(values), -1)
    for _ in range(most):
        distances = _distances(values, centres)
        nearest = distances.argmin(axis=1)
        if (nearest == labels).all():
            break
        labels = nearest
        centres = np.stack(
            [values[labels == j].mean(axis=0) if (labels == j).any() else centres[j] for j in range(len(centres))]
        )
    return float(_distances(values, centres)[np.arange(len(values)), labels].sum()), labels.astype(np.int64)
