"""In which space adapters are averaged, whatever the method: factor by factor, or as products.

Methods average vectors. Where a vector holds LoRA factors, the server's averages are corrected here so that they are
averages of the products B A, always or as long as the two differ by much. How much they differ is measured every round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.core import around
from fedmerge.core.adapters import Pair, averaging_error, pairs_of, product_means
from fedmerge.core.errors import UsageError
from fedmerge.core.protocol import (
    Algorithm,
    Cost,
    Draw,
    Federation,
    Update,
    server_models,
    state_tensors,
    with_server_models,
)
from fedmerge.core.soup import shares
from fedmerge.core.sums import weighted_sum
from fedmerge.core.vector import Layout

Merging = Literal["auto", "factors", "product"]
LIMIT = 0.3
"""Share of the product's norm by which averaged factors may be off before `auto` averages products."""


@dataclass(frozen=True)
class Spaced:
    """Server state.

    Attributes:
        method: The method's own.
        averaging_error: [] of the last round's replies, see `adapters.averaging_error`, mean over the models by use.
        merging_error: [] of what the clients of that round were sent, mean over them; 0 for one model.
        product: [] 1 where the replies of the last round were averaged as products.
    """

    method: Any
    averaging_error: Float[Tensor, ""]
    merging_error: Float[Tensor, ""]
    product: Int[Tensor, ""]


@dataclass(frozen=True)
class InSpace:
    """A method whose server averages adapters in a chosen space.

    Attributes:
        algorithm: Any whose server keeps whole models.
        pairs: Of factors, in the vector that travels.
        space: Which.
    """

    algorithm: Algorithm[Any]
    pairs: tuple[Pair, ...]
    space: Merging

    # ---------------------------------------------------------------- server

    def init(self, draw: Draw, federation: Federation, seed: int) -> Spaced:
        """The method's state, nothing measured yet.

        Raises:
            UsageError: if products are asked for and the method keeps no whole models on the server.
        """
        state = self.algorithm.init(draw, federation, seed)
        models = server_models(state)
        if self.space == "product" and (models is None or models.shape[1:] != draw(0).shape):
            raise UsageError(
                f"merging: got 'product' for {type(self.algorithm).__name__}, whose server keeps no whole models to "
                "average; leave it out"
            )
        if self.space == "product" and not _is_one_block(state):
            raise UsageError(
                "merging: got 'product' for rows of merging weights that differ between layers; take rows='model', "
                "or leave merging out"
            )
        return Spaced(state, _unknown(), _unknown(), torch.tensor(0))

    def send(self, state: Spaced, clients: Int[Tensor, " C"]) -> Any:
        """The method's merges, as products where the space asks for it."""
        return self._merged(state, clients)[0]

    def _merged(self, state: Spaced, clients: Int[Tensor, " C"]) -> tuple[Any, Tensor]:
        """What is sent, and the error of merging factors, mean over the clients."""
        down = self.algorithm.send(state.method, clients)
        models = server_models(state.method)
        if models is None or not isinstance(down, Tensor) or down.shape[1:] != models.shape[1:]:
            return down, _unknown()
        if len(models) == 1:
            return down, torch.zeros((), dtype=torch.float64)
        weights = self._rows(state.method)
        if weights is None:
            return down, _unknown()
        errors = averaging_error(self.pairs, models, weights)  # of all: who else is asked must not change what one gets
        if self._as_product(errors.mean()):
            down = product_means(self.pairs, models, weights[clients], down)
        return down, errors[clients].mean()

    def _rows(self, state: Any) -> Float[Tensor, "N d"] | None:
        """The method's merging weights, if a client has one row of them for its whole model."""
        return self.algorithm.mixing(state) if _is_one_block(state) else None

    def _as_product(self, error: Tensor) -> bool:
        return self.space == "product" or (self.space == "auto" and float(error) > LIMIT)

    def receive(
        self, state: Spaced, clients: Int[Tensor, " C"], update: Any, num_examples: Int[Tensor, " C"]
    ) -> Spaced:
        """The method's step; where it is taken in products, each model then gets what averaging factors missed.

        Raises:
            UsageError: if products are asked for and the method does not say how much each reply counts.
        """
        after = self.algorithm.receive(state.method, clients, update, num_examples)
        share = self._shares(state.method, after, clients, num_examples)
        models = server_models(state.method)
        if (
            share is None
            or models is None
            or not isinstance(update, Update)
            or update.delta.shape[1] != models.shape[1]
        ):
            if self.space == "product":
                raise UsageError(
                    f"merging: got 'product' for {type(self.algorithm).__name__}, which does not average its clients' "
                    "models by weights that it tells; leave it out"
                )
            return Spaced(after, _unknown(), _unknown(), torch.tensor(0))
        error = self._error(models, update.delta, share, num_examples)
        as_product = self._as_product(error)
        if as_product:
            missed = self._missed(models, update.delta, share)[self._origins(state.method, after, len(models))]
            moved = server_models(after)
            after = after if moved is None else with_server_models(after, moved + missed)
        return Spaced(after, error, self._merged(state, clients)[1], torch.tensor(int(as_product)))

    def _error(
        self,
        models: Float[Tensor, "d P"],
        delta: Float[Tensor, "C P"],
        share: Float[Tensor, "C d"],
        num_examples: Int[Tensor, " C"],
    ) -> Float[Tensor, ""]:
        """Of averaging the factors of this round's replies, mean over the models by the examples behind them."""
        errors = torch.zeros(len(models), dtype=torch.float64)
        for j in _used(share):
            errors[j] = averaging_error(self.pairs, models[j] - delta, share[:, j][None])[0]
        use = (share * num_examples.double()[:, None]).sum(dim=0)
        return (errors * use / use.sum()).sum()

    def _missed(
        self, models: Float[Tensor, "d P"], delta: Float[Tensor, "C P"], share: Float[Tensor, "C d"]
    ) -> Float[Tensor, "d P"]:
        """What each model lacks to the average of the products, after the average of the factors."""
        missed = torch.zeros_like(models)
        for j in _used(share):
            trained, weights = models[j] - delta, share[:, j][None]
            mean = weighted_sum(weights.T, trained).to(models.dtype)
            missed[j] = product_means(self.pairs, trained, weights, mean)[0] - mean[0]
        return missed

    def _shares(
        self, before: Any, after: Any, clients: Int[Tensor, " C"], num_examples: Int[Tensor, " C"]
    ) -> Float[Tensor, "C d"] | None:
        """How much each reply counted in each model of `before`; None where the method does not say."""
        models = server_models(before)
        if models is None:
            return None
        if len(models) == 1:
            return shares(torch.ones(len(clients), 1), num_examples)
        known = (self._rows(after), self._rows(before))
        rows = next((row for row in known if row is not None and row.shape[1] == len(models)), None)
        return None if rows is None else shares(rows[clients], num_examples)

    def _origins(self, before: Any, after: Any, count: int) -> Int[Tensor, " e"]:
        """The one of `count` models before from which each model after comes: that of the clients it now serves."""
        models, old, new = server_models(after), self.algorithm.mixing(before), self.algorithm.mixing(after)
        now = count if models is None else len(models)
        if now == count:
            return torch.arange(count)
        if count == 1 or old is None or new is None:
            return torch.zeros(now, dtype=torch.int64)
        return (new.T @ old).argmax(dim=1)

    def cost(self, state: Spaced) -> Cost:
        """The method's."""
        return self.algorithm.cost(state.method)

    def describe(self, state: Spaced) -> Mapping[str, Any]:
        """The method's facts, what averaging factors missed in the last round, and how it was averaged."""
        return {
            **self.algorithm.describe(state.method),
            "averaging_error": float(state.averaging_error),
            "merging_error": float(state.merging_error),
            "space": "product" if int(state.product) else "factors",
        }

    trains_several = around.trains_several
    check_reply = around.check_reply
    silence = around.silence
    mixing = around.mixing
    start = around.start
    train = around.train
    personal = around.personal


def _is_one_block(state: Any) -> bool:
    """Whether the whole vector shares a row of merging weights; some methods have rows for each layer."""
    return len(state_tensors(state).get("blocks", ())) <= 1


def _used(share: Float[Tensor, "C d"]) -> list[int]:
    """The models that a reply counts in."""
    return [j for j, total in enumerate(share.sum(dim=0).tolist()) if total > 0]


def _unknown() -> Tensor:
    return torch.tensor(float("nan"), dtype=torch.float64)


def in_space(algorithm: Algorithm[Any], layout: Layout, merging: Merging) -> Algorithm[Any]:
    """The method with adapters averaged in a space; the method itself for vectors without pairs of factors.

    Args:
        algorithm: Any.
        layout: Of the vector that the method sees.
        merging: ``factors``, ``product``, or ``auto``: products while averaging factors is off by more than .3.

    Raises:
        UsageError: if a space is asked for and there are no adapters.
    """
    pairs = pairs_of(layout)
    if pairs:
        return InSpace(algorithm, pairs, merging)
    if merging != "auto":
        raise UsageError(
            f"merging: got {merging!r}, but what travels has no LoRA factors A and B to merge; leave it out "
            "(a frozen A, model.train_a=false, makes every merge exact)"
        )
    return algorithm
