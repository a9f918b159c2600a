"""FL+HC: hierarchical clustering of the clients' updates, once (Briggs et al., IJCNN 2020, arXiv:2004.11791)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.algorithms import _once, _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Draw, Federation, Update
from fedmerge.core.structure import directions, groups_of, renumbered
from fedmerge.core.sums import inner_products


@algorithm("flhc", citation="Briggs et al., IJCNN 2020, arXiv:2004.11791")
@dataclass(frozen=True)
class Flhc:
    """After `warmup` rounds of FedAvg, a tree over the clients' next updates is cut once: a group shares a model.

    The tree is cut at the distance `threshold`, or into `num_models` groups where that is given. Sends P down and P
    up; until then the server keeps every client's latest update, N·T numbers, and afterwards d·P and the groups' mean
    directions, d·T; clients keep nothing. With num_models = 1, or a threshold above every distance, it is FedAvg.

    The paper's thresholds are tuned for each network. Here ``cosine`` distances 1 − cos lie in 0..2, and
    ``euclidean`` ones are in units of the updates' root mean square norm; ward linkage, which is for the latter, joined
    50 clients with the same distribution at 2.2 and 5 groups that label differently at 3.1 to 5.4 (Fashion-MNIST,
    perceptron), hence the default. All clients
    take part in the paper's clustering round; here those who do not count with their latest update, and clients that
    were not heard by then receive the mean of the models, by members, and join the group with the most similar
    direction with their first reply.
    """

    server_momentum: ClassVar[float] = 0.0
    num_models: int | None = option(None, at_least=1, help="number of groups; none cuts at `threshold`")
    threshold: float = option(2.5, above=0, help="distance at which the tree is cut")
    warmup: int = option(10, at_least=0, help="rounds of FedAvg before the round whose updates are clustered")
    metric: Literal["cosine", "euclidean"] = option("euclidean", help="distance between updates")
    linkage: Literal["ward", "complete", "average", "single"] = option("ward", help="distance between groups")

    def __post_init__(self) -> None:
        check_options(self)
        if self.linkage == "ward" and self.metric != "euclidean":
            raise UsageError(
                f"flhc.linkage: got 'ward' with metric {self.metric!r}; ward needs metric 'euclidean', "
                "or choose linkage 'complete', 'average' or 'single'"
            )

    def init(self, draw: Draw, federation: Federation, seed: int) -> _once.Groups:
        """One model, nobody heard.

        Raises:
            UsageError: if there are fewer clients than models.
        """
        _parts.refuse_more_than_clients("flhc", self.num_models, federation.num_clients, "group")
        return _once.begin(draw, federation, seed)

    def receive(
        self, state: _once.Groups, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> _once.Groups:
        """Averages; in the one round in question makes the groups first."""
        state = _once.with_reply(state, clients, update)
        heard = int((state.heard > 0).sum())
        if not len(state.centres) and int(state.rounds) > self.warmup and heard >= (self.num_models or 1):
            state = _once.grouped(state, self._groups)
        return _once.averaged(state, clients, update, num_examples, momentum=self.server_momentum)

    def _groups(self, updates: Float[Tensor, "n T"]) -> Int[Tensor, " n"]:
        from scipy.cluster.hierarchy import fcluster, linkage  # noqa: PLC0415 - only the server needs scipy, once

        if len(updates) == 1:
            return torch.zeros(1, dtype=torch.int64, device=updates.device)
        tree = linkage(_distances(updates, self.metric), method=self.linkage)
        if self.num_models is None:
            labels = renumbered(fcluster(tree, self.threshold, criterion="distance"))
        else:
            labels = groups_of(tree, self.num_models)
        return torch.from_numpy(labels).to(updates.device)

    start = _parts.nothing_private
    send = _once.send
    train = _parts.plain_training
    personal = _parts.as_received
    cost = _once.cost
    describe = _once.describe
    mixing = _once.mixing


def _distances(updates: Float[Tensor, "n T"], metric: str) -> NDArray[np.float64]:
    """All pairs i < j in scipy's order, [n(n − 1)/2]."""
    points = directions(updates) if metric == "cosine" else updates.double()
    products = inner_products(points, points).cpu().numpy()
    first, second = np.triu_indices(len(products), 1)
    if metric == "cosine":
        return np.asarray(np.maximum(1 - products[first, second], 0))
    squares = products.diagonal()
    apart = np.maximum(squares[first] + squares[second] - 2 * products[first, second], 0)
    scale = squares.mean()
    return np.asarray(np.sqrt(apart / (scale if scale > 0 else 1.0)))
