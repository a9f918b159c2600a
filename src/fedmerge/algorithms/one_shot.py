"""One-shot clustering: k-means on the clients' updates, once (Ghosh et al., arXiv:1906.06629)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _once, _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Draw, Federation, Update
from fedmerge.core.randomness import generator
from fedmerge.core.structure import kmeans, renumbered


@algorithm("one-shot", citation="Ghosh et al., arXiv:1906.06629")
@dataclass(frozen=True)
class OneShot:
    """After `warmup` rounds of FedAvg, k-means on the clients' next updates decides once who shares a model.

    Sends P down and P up; until then the server keeps every client's latest update, N·T numbers, and afterwards d·P and
    the groups' mean directions, d·T; clients keep nothing. With num_models = 1 it is FedAvg.

    In the paper clients train to the end before k-means on their models; from a common start that is k-means on
    their updates, here of one round. Clients that were not heard by then receive the mean of the models, by members,
    and join the group with the most similar direction with their first reply. Should fewer clients than models be
    heard by then, the decision waits until there are enough. Its paper has no `server_momentum`.
    """

    num_models: int = option(5, at_least=1, help="number of groups; this method must be told")
    warmup: int = option(0, at_least=0, help="rounds of FedAvg before the round whose updates are clustered")
    server_momentum: float = option(0.0, at_least=0, below=1, help="momentum of the server step")

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, draw: Draw, federation: Federation, seed: int) -> _once.Groups:
        """One model, nobody heard.

        Raises:
            UsageError: if there are fewer clients than models.
        """
        _parts.refuse_more_than_clients("one-shot", self.num_models, federation.num_clients, "group")
        return _once.begin(draw, federation, seed)

    def receive(
        self, state: _once.Groups, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> _once.Groups:
        """Averages; in the one round in question makes the groups first."""
        state = _once.with_reply(state, clients, update)
        heard = int((state.heard > 0).sum())
        if not len(state.centres) and int(state.rounds) > self.warmup and heard >= self.num_models:
            state = _once.grouped(state, lambda updates: self._groups(updates, int(state.seed)))
        return _once.averaged(state, clients, update, num_examples, momentum=self.server_momentum)

    def _groups(self, updates: Float[Tensor, "n T"], seed: int) -> Int[Tensor, " n"]:
        labels = renumbered(kmeans(updates, self.num_models, generator(seed, "one-shot")))
        return torch.from_numpy(labels).to(updates.device)

    start = _parts.nothing_private
    send = _once.send
    train = _parts.plain_training
    personal = _parts.as_received
    cost = _once.cost
    describe = _once.describe
    mixing = _once.mixing
