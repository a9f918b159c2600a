"""What the first rounds tell about the federation: is there structure, how many models, who belongs together.

Works on the clients' accumulated updates h_i of the first rounds. Numbers and constants: docs/algorithm.md.
"""

from __future__ import annotations

import math

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


def cosines(progress: Float[Tensor, "n P"]) -> Float[Tensor, "n n"]:
    """⟨h_i, h_k⟩ / (‖h_i‖ ‖h_k‖) in float64; 0 for a client that did not move. All else here is made from them."""
    return _scaled(inner_products(progress, progress), least=0.0)


def centred_cosines(cosines: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Cosines between the directions less their mean: how clients differ from what all share.

    0 for a client that differs by no more than rounding.
    """
    return _scaled(_centred(cosines), least=1e-12)


def _scaled(products: Float[Tensor, "n n"], *, least: float) -> Float[Tensor, "n n"]:
    """Inner products of the vectors at length 1; those whose squared length is not above `least` become 0."""
    squares = products.diagonal()
    scale = torch.where(squares > least, squares, torch.inf).rsqrt()
    return products * scale[:, None] * scale[None, :]


def _centred(products: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Inner products of the vectors less their mean."""
    means = products.mean(dim=0)
    return products - means[:, None] - means[None, :] + means.mean()


NOISE = 5.0
"""Disagreement after the first rounds that may be chance, times the square root of a client's number of examples.

Clients that are all alike reach 0.8 of it at most (perceptrons of one and three hidden layers, convolutions with and
without normalisation, 4 to 200 examples, rates 0.03 to 0.3, 2 and 5 epochs): docs/algorithm.md.
"""


def evidence(
    cosines: Float[Tensor, "n n"], costs: Floats, *, most: int, elbow: float, examples: float | None = None
) -> float:
    """Evidence for groups of clients, 1 where it begins to convince; at least 0 and at most 1,000.

    It takes size and shape. Size: the clients' disagreement is half as long as what they share. Shape: either the
    merge costs drop sharply (clean groups; the disagreement then has one axis less than groups), or the differences
    are skewed by three standard errors (groups that overlap or shade into each other; the main axis alone counts).
    Few clients show no shape; where size is beyond what so few examples explain, size alone will do.
    The largest of min(size / 0.5, drop / `elbow`), min(size / 0.5, skewness / 3) and size · √examples / `NOISE`.

    Args:
        cosines: Between the clients' h_i.
        costs: [n − 1] merge costs of their `ward_tree`.
        most: Largest number of groups considered.
        elbow: Smallest drop that counts as sharp.
        examples: Harmonic mean of the clients' numbers of training examples, if all replied in the same few first
            rounds; None leaves that part out, because size grows without structure as training uses up what clients
            share, and with the way of the model between replies.
    """
    drops = drops_of(costs, most)
    if not drops:
        return 0.0
    size, sharpest = disagreement(cosines), max(drops, key=lambda k: drops[k])
    clean = min(disagreement(cosines, axes=sharpest - 1) / 0.5, drops[sharpest] / elbow)
    shaded = min(size / 0.5, skewness(cosines) / 3)
    large = 0.0 if examples is None else size * math.sqrt(examples) / NOISE
    return min(max(clean, shaded, large), 1000.0)


def disagreement(cosines: Float[Tensor, "n n"], axes: int = 1) -> float:
    """How long the clients' differences along their main axes are, as a multiple of what they share.

    sqrt(Σ_k (λ_k − λ̄) / (n ρ)) over the largest `axes` of the n − 1 eigenvalues λ of the centred Gram matrix of
    h_i / ‖h_i‖; λ̄ is their mean, which noise alike in all directions would give, and ρ the mean cosine between two
    clients. At most 1,000.
    """
    spectrum = torch.linalg.eigvalsh(_centred(cosines))[1:]
    common = float((cosines.sum() - cosines.trace()) / (len(cosines) - 1))
    main = float((spectrum[-axes:] - spectrum.mean()).sum().clamp_min(0))
    return float(np.sqrt(main / max(common, 1e-6 * main))) if main > 0 else 0.0


def skewness(cosines: Float[Tensor, "n n"]) -> float:
    """Σ_{i≠j} c_ij³ in standard errors, with c_ij the centred cosines.

    Members of a group are much alike and a little unlike everybody else, so c³ has a positive mean. Differences by
    chance are as likely to point one way as the other: flipping a client's sign turns c_ij into −c_ij, the sum has
    mean 0 whatever the network, the layer sizes and the number of examples, and its variance over all flips is
    2 Σ_{i≠j} c_ij⁶. Two equal groups are not skewed.
    """
    cubes = centred_cosines(cosines).fill_diagonal_(0) ** 3
    error = float((2 * cubes.square().sum()).sqrt())
    return float(cubes.sum()) / error if error > 0 else 0.0


SILHOUETTE = 0.075
"""Mean silhouette from which adapters' updates show groups.

MiniLM, rank 8, 64 texts a client, after 3 rounds: at most .05 for 6 to 20 clients of one task (four tasks), at least
.10 for 8 to 20 clients of two to five tasks: docs/algorithm.md.
"""


def silhouettes(cosines: Float[Tensor, "n n"], tree: Floats, most: int) -> dict[int, float]:
    """Mean silhouette (Rousseeuw 1987) of the clients for every number of groups 2 .. min(most, n − 2).

    Of client i it is (b − a) / max(a, b): a is its mean distance to the others of its group, b the smallest mean
    distance to another group; 0 for a group of one. Distances are those of the tree.

    Args:
        cosines: Between the clients' h_i.
        tree: Their `ward_tree`.
        most: Largest number of groups considered.
    """
    distance = _distances_of(cosines).cpu().numpy()
    return {k: _silhouette(distance, groups_of(tree, k)) for k in range(2, min(most, len(cosines) - 2) + 1)}


def groups_of_adapters(cosines: Float[Tensor, "n n"], tree: Floats, most: int) -> tuple[float, int]:
    """Evidence for groups among clients that train adapters, 1 where it begins to convince, and how many there are.

    Updates of adapters after a few rounds of AdamW on few examples are mostly noise: merge costs drop gently even
    between clear groups. The silhouette tells them: its best number of groups counts, and how good it is.
    """
    found = silhouettes(cosines, tree, most)
    if not found:
        return 0.0, 1
    count = max(found, key=lambda k: found[k])
    return max(0.0, found[count] / SILHOUETTE), count


def _silhouette(distance: Floats, labels: Labels) -> float:
    if not labels.any():  # clients in one place: their tree falls into fewer groups than it was asked for
        return 0.0
    member = np.eye(int(labels.max()) + 1)[labels]
    sizes, own = member.sum(axis=0), np.arange(len(labels))
    sums = distance @ member
    within = sums[own, labels] / np.maximum(sizes[labels] - 1, 1)
    others = np.where(member > 0, np.inf, sums / sizes).min(axis=1)
    largest = np.maximum(within, others)
    values = np.divide(others - within, largest, out=np.zeros_like(within), where=(largest > 0) & (sizes[labels] > 1))
    return float(values.mean())


def ward_tree(cosines: Float[Tensor, "n n"]) -> Floats:
    """Ward's tree over the centred, renormalised directions, in scipy's linkage format [n − 1, 4].

    Column 2 holds the heights; the growth in within-group sum of squares of a merge is height² / 2.
    """
    from scipy.cluster.hierarchy import linkage  # noqa: PLC0415 - only the server needs scipy, once per run
    from scipy.spatial.distance import squareform  # noqa: PLC0415

    if len(cosines) < 2:
        return np.zeros((0, 4))
    tree: Floats = linkage(squareform(_distances_of(cosines).cpu().numpy(), checks=False), method="ward")
    return tree


def _distances_of(cosines: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Euclidean, between the centred, renormalised directions."""
    products = centred_cosines(cosines)
    squares = products.diagonal()
    distance = (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0).sqrt()
    distance.fill_diagonal_(0)
    return (distance + distance.T) / 2


def number_of_groups(costs: Floats, *, most: int, elbow: float, floor: float) -> int:
    """How many groups a merge tree shows.

    F(k) = c_{n−k+1} / mean(c_1 .. c_{n−k}) compares the merge that leaves k − 1 groups with all earlier ones. The
    sharpest drop F(k)/F(k+1) decides if it is at least `elbow`; otherwise the largest k with F(2), ..., F(k) all
    above `floor` does, and at least 4 or half of the clients: without clean groups too few models cost more than too
    many, whose updates shrink towards the common one.

    Args:
        costs: [n − 1] merge costs in ascending order of merging.
        most: Largest number of groups considered; at most n − 2 can be told apart.
        elbow: Smallest drop that counts as sharp.
        floor: Smallest F that counts as a real merge cost.
    """
    drops, jumps = drops_of(costs, most), jumps_of(costs, most)
    if not drops:
        return 1
    sharpest = max(drops, key=lambda k: drops[k])
    if drops[sharpest] >= elbow:
        return sharpest
    count = 1
    while count + 1 in drops and jumps[count + 1] > floor:
        count += 1
    return max(count, min(4, (len(costs) + 1) // 2, max(drops)))


def jumps_of(costs: Floats, most: int) -> dict[int, float]:
    """F(2) .. F(most + 1), where n allows; at most n − 2 groups can be told apart."""
    n = len(costs) + 1
    return {k: _ratio(float(costs[n - k]), float(costs[: n - k].mean())) for k in range(2, min(most, n - 2) + 2)}


def drops_of(costs: Floats, most: int) -> dict[int, float]:
    """F(k) / F(k + 1) for every number of groups k considered."""
    jumps = jumps_of(costs, most)
    return {k: _ratio(jumps[k], jumps[k + 1]) for k in jumps if k + 1 in jumps}


def _ratio(cost: float, before: float) -> float:
    """Cost / before; merges of identical clients cost 0, after which any cost is infinitely larger, but 0 is not."""
    if before > 0:
        return cost / before
    return np.inf if cost > 0 else 0.0


def groups_of(tree: Floats, count: int) -> Labels:
    """Cuts a tree into `count` groups, numbered 0.. in order of first appearance."""
    from scipy.cluster.hierarchy import fcluster  # noqa: PLC0415

    if count == 1:
        return np.zeros(len(tree) + 1, dtype=np.int64)
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
