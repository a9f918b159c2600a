"""FedMerge: every client gets its own merge of d global models (arXiv:2504.06768, AAAI 2026)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from fedmerge.algorithms import _fedmerge_options, _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core import mixing as rules
from fedmerge.core import structure
from fedmerge.core.bounds import kept_together
from fedmerge.core.errors import UsageError
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Cost, Draw, Federation, Update
from fedmerge.core.shrinkage import shrunk_updates
from fedmerge.core.soup import Soup, logit_gradient, merge, mixing, shares
from fedmerge.core.sums import (
    Compared,
    along,
    blocks,
    centred,
    compared,
    shares_of_examples,
    squared_norms,
    weighted_sum,
)

log = logging.getLogger(__name__)

ADAPTER_LEAN = 6.0
"""Adapters start almost apart: few rounds follow, and different tasks share little. See docs/algorithm.md."""
Rule = Literal["mirror", "official", "gradient", "adam"]
Squares = list[Float[Tensor, " C"]]
ROWS = 1 << 10
"""How many clients' rows move at a time."""


@dataclass(frozen=True)
class State:
    """Server state.

    Attributes:
        soup: Models [d, P] and logits [G, N, d].
        velocity: [d, T] server momentum of the trainable part.
        progress: [N, T] accumulated updates h_i while the structure is being looked for; [0, T] otherwise.
        seen: [N] how often each client has replied since the start or the split; −1 for a client that had not
            replied by the split and has no row of its own yet.
        rounds: [] completed.
        searching: [] whether the structure is still being looked for.
        gate: [] evidence for groups when it was decided, see `structure.evidence`; NaN before.
        moments: [2, G, N, d] Adam's memory (G = 0 for other rules).
        blocks: [G, 2] range of the vector that shares a row of merging weights.
        scope: [G, 2] range inside each block whose inner products move its rows.
        adapters: [] whether the models are adapters, whose structure shows in another way.
    """

    soup: Soup
    velocity: Float[Tensor, "d T"]
    progress: Float[Tensor, "n T"]
    seen: Int[Tensor, " N"]
    rounds: Int[Tensor, ""]
    searching: Tensor
    gate: Float[Tensor, ""]
    moments: Float[Tensor, "2 g N d"]
    blocks: Int[Tensor, "G 2"]
    scope: Int[Tensor, "G 2"]
    adapters: Tensor


@algorithm("fedmerge", citation="Chen et al., AAAI 2026, arXiv:2504.06768")
@dataclass(frozen=True)
class FedMerge:
    """Every client gets its own merge of d shared models, at the traffic of one; d is found from the data.

    The default needs no setting: three rounds of FedAvg with server momentum, a look at the clients' accumulated
    updates (is there structure, how many groups), a one-time split of the model, and from then on mirror descent on
    each client's merging weights with shrinkage of the models' updates towards the common one. Where no structure is
    found it stays one model. ``rule="official"`` is the authors' published procedure.

    Sends P numbers down and P up whatever d is; the server keeps d·P models, their momentum and N·d logits (and N·T
    accumulated updates while it searches); clients keep nothing. docs/algorithm.md has the mathematics.

    Options left at None take the rule's own value. An option that would have no effect is refused.
    """

    num_models: int | None = option(None, at_least=1, help="d; found from the data where initial is 'split'")
    rule: Rule = option("mirror", help="how the merging weights move")
    initial: Literal["split", "noise", "independent"] | None = option(
        None, help="how models come to differ (mirror split, official independent, else noise)"
    )
    scope: Literal["all", "head"] | None = option(None, help="layers that move the weights (all, official head)")
    rows: Literal["model", "body-head", "layer"] = option("model", help="parts of the network with rows of their own")
    order: Literal["weights-first", "together"] = option("weights-first", help="whether models see the new weights")
    mixing_lr: float | None = option(
        None, above=0, help="step size of the rule (mirror 0.2, gradient 1, adam 0.1, official 0.01)"
    )
    decay: float | None = option(
        None, at_least=0, below=1, help="pull of the logits towards uniform (mirror 0.02, others none)"
    )
    momentum: float | None = option(None, at_least=0, below=1, help="server momentum of the models (0.5, official 0)")
    shrinkage: float | None = option(None, at_least=0, help="of the updates towards the common one (0.3, official 0)")
    proximal: float = option(0.01, at_least=0, help="pull of local training, proximal * |theta - start|^2, no 1/2")
    server_lr: float = option(1.0, above=0, help="server step on the models")
    search_rounds: int = option(3, at_least=1, help="rounds of FedAvg before the look for groups")
    gate: float = option(1.0, at_least=0, help="evidence for groups below which one model is kept")
    elbow: float = option(2.5, above=1, help="drop of the merge costs that counts as sharp")
    floor: float = option(3.0, above=1, help="relative merge cost that counts as a real group")
    max_models: int = option(15, at_least=2, help="largest d that the search considers")
    max_gap: float | None = option(
        None,
        at_least=0,
        help="distance of a model from the others that holds it back, times the models' median; 0: any (2, official 0)",
    )
    max_share: float = option(1.0, above=0, at_most=1, help="largest share of one client in one model's step")
    max_logit: float | None = option(None, above=0, help="largest size of a logit (mirror: mixing_lr / decay anyway)")
    noise: float = option(0.1, above=0, help="share of a fresh draw added to each model where initial is 'noise'")
    lean: float = option(1.0, above=0, help="first logit of a client's own group after the split; adapters: 6 times it")

    def __post_init__(self) -> None:
        check_options(self)
        _fedmerge_options.refuse_contradictions(self)
        for name, value in _fedmerge_options.BY_RULE[self.rule].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.initial != "split" and self.num_models is None:
            object.__setattr__(self, "num_models", 5)

    # ---------------------------------------------------------------- server

    def init(self, draw: Draw, federation: Federation, seed: int) -> State:
        """One model where the structure is searched for, else d models that differ.

        Raises:
            UsageError: if there are more models than clients.
        """
        num_clients, T = federation.num_clients, federation.num_trainable
        _parts.refuse_more_than_clients("fedmerge", self.num_models, num_clients)
        searching = self.initial == "split" and self.num_models != 1
        models = self._first_models(draw, T)
        blocks, scope = self._blocks(federation, models.shape[1])
        rows = (len(blocks), num_clients, len(models))
        return State(
            soup=Soup(models, torch.zeros(rows, dtype=torch.float64)),
            velocity=torch.zeros_like(models[:, :T]),
            progress=models.new_zeros(num_clients if searching else 0, T),
            seen=torch.zeros(num_clients, dtype=torch.int32),
            rounds=torch.tensor(0),
            searching=torch.tensor(searching),
            gate=torch.tensor(float("nan"), dtype=torch.float64),
            moments=self._no_moments(rows),
            blocks=blocks,
            scope=scope,
            adapters=torch.tensor(federation.adapters),
        )

    def _first_models(self, draw: Draw, T: int) -> Float[Tensor, "d P"]:
        if self.initial == "split" or self.num_models == 1:
            return draw(0)[None]
        assert self.num_models is not None  # noqa: S101 - set in __post_init__ for these starts
        if self.initial == "independent":
            return torch.stack([draw(j) for j in range(self.num_models)])
        return _parts.noisy_draws(draw, self.num_models, T, self.noise)

    def _blocks(self, federation: Federation, P: int) -> tuple[Int[Tensor, "G 2"], Int[Tensor, "G 2"]]:
        """Ranges that share a row, and the trainable part of each; buffers follow the last block."""
        T, (head_start, head_stop) = federation.num_trainable, federation.head
        if head_start == head_stop and (self.scope == "head" or self.rows == "body-head"):
            raise UsageError(
                "fedmerge: the clients keep the output layer (run option `keep`), which scope='head' and "
                "rows='body-head' need; expected scope='all' and another `rows`"
            )
        if self.rows == "model":
            scope = [(head_start, head_stop) if self.scope == "head" else (0, T)]
        elif self.rows == "body-head":
            scope = [(0, head_start), (head_start, T)] if head_start else [(0, T)]
        else:
            scope = list(federation.layers)
        blocks = [*scope[:-1], (scope[-1][0], P)] if self.rows != "model" else [(0, P)]
        return torch.tensor(blocks), torch.tensor(scope)

    def _no_moments(self, rows: tuple[int, int, int]) -> Float[Tensor, "2 g N d"]:
        return torch.zeros(2, rows[0] if self.rule == "adam" else 0, *rows[1:], dtype=torch.float64)

    def send(self, state: State, clients: Int[Tensor, " C"]) -> Float[Tensor, "C P"]:
        """θ_i = Σ_j A_ij Θ_j, block by block."""
        weights, models = mixing(state.soup.logits[:, clients]), state.soup.models
        if len(state.blocks) == 1:
            return merge(models, weights[0])
        parts = [merge(models[:, a:b], row) for (a, b), row in zip(state.blocks.tolist(), weights, strict=True)]
        return torch.cat(parts, dim=1)

    def receive(
        self, state: State, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> State:
        """Places clients that reply for the first time, moves W and Θ, and in the search looks for structure."""
        state = self._placed(state, clients, update.delta)
        logits, moments = state.soup.logits, state.moments
        squares: Squares = []
        if len(state.soup.models) > 1:
            logits, moments, squares = self._moved_weights(state, clients, update.delta, num_examples)
        rows = logits if self.order == "weights-first" else state.soup.logits
        share = [shares(mixing(each[clients]), num_examples).clamp_max_(self.max_share) for each in rows]
        step = self._model_step(state, share, update.delta, num_examples, squares)
        moved = _parts.moved(
            _parts.Models(state.soup.models, state.velocity), step, lr=self.server_lr, momentum=self.momentum or 0.0
        )
        after = replace(
            state,
            soup=Soup(*kept_together(moved.models, logits, state.velocity.shape[1], factor=self.max_gap or 0.0)),
            velocity=moved.velocity,
            moments=moments,
            seen=state.seen.index_add(0, clients, torch.ones_like(clients, dtype=state.seen.dtype)),
            rounds=state.rounds + 1,
        )
        return self._searched(after, clients, update.delta, num_examples) if bool(state.searching) else after

    def _model_step(
        self,
        state: State,
        share: list[Float[Tensor, "C d"]],
        delta: Float[Tensor, "C P"],
        num_examples: Int[Tensor, " C"],
        squares: Squares,
    ) -> Float[Tensor, "d P"]:
        proportions = shares_of_examples(num_examples)
        if len(state.soup.models) == 1:
            return weighted_sum(proportions.clamp_max(self.max_share), delta)
        T = state.velocity.shape[1]
        strength, steps = self.shrinkage or 0.0, []
        for (a, b), own, looked, known in zip(state.blocks.tolist(), share, state.scope.tolist(), squares, strict=True):
            squared = known if looked == [a, min(b, T)] else None
            part = delta[:, a : min(b, T)]
            steps.append(shrunk_updates(part, own, proportions[:, 0], strength=strength, squares=squared))
        if delta.shape[1] > T:
            steps.append(weighted_sum(share[-1], delta[:, T:]))  # buffers are averaged as they are
        return torch.cat(steps, dim=1) if len(steps) > 1 else steps[0]

    def _moved_weights(
        self, state: State, clients: Int[Tensor, " C"], delta: Float[Tensor, "C P"], num_examples: Int[Tensor, " C"]
    ) -> tuple[Float[Tensor, "G N d"], Float[Tensor, "2 g N d"], Squares]:
        """New W and Adam's memory, and ‖g_i‖² over the ranges that moved them."""
        logits, moments, squares = state.soup.logits.clone(), state.moments.clone(), []
        proportions = shares_of_examples(num_examples)[:, 0]
        at_once = max(1, len(clients)) if self.rule == "official" else ROWS  # its step depends on all rows
        for block, (a, b) in enumerate(state.scope.tolist()):
            seen = compared(state.soup.models[:, a:b], delta[:, a:b])
            for some in blocks(len(clients), at_once):
                own = clients[some]
                memory = self._memory(moments, block, own, state)
                rows, memory = self._moved_rows(logits[block, own], seen.rows(some), proportions[some], memory)
                logits[block, own] = rows if self.max_logit is None else rows.clamp(-self.max_logit, self.max_logit)
                if memory is not None:
                    moments[:, block, own] = torch.stack([memory.first, memory.second])
            squares.append(seen.squares)
        return logits, moments, squares

    def _memory(
        self, moments: Float[Tensor, "2 g N d"], block: int, clients: Int[Tensor, " c"], state: State
    ) -> rules.Moments | None:
        """Adam's memory of these clients; None for other rules."""
        if self.rule != "adam":
            return None
        return rules.Moments(moments[0, block, clients], moments[1, block, clients], state.seen[clients])

    def _moved_rows(
        self,
        rows: Float[Tensor, "c d"],
        seen: Compared,
        proportions: Float[Tensor, " c"],
        memory: rules.Moments | None,
    ) -> tuple[Float[Tensor, "c d"], rules.Moments | None]:
        """The rule's step for some of the replies, and Adam's memory after it."""
        lr, weights = self.mixing_lr or 0.0, mixing(rows)
        pull = seen.along(weights)
        if self.rule == "mirror":
            return rules.mirror_step(rows, pull, seen.reach(), lr=lr, decay=self.decay or 0.0), None
        if self.rule == "official":
            return rules.official_step(rows, weights * pull, proportions, lr=lr), None
        gradient = logit_gradient(weights, pull, proportions)
        if memory is None:
            return rules.gradient_step(rows, gradient, lr=lr), None
        return rules.adam_step(rows, gradient, memory, lr=lr)

    # ---------------------------------------------------------------- the search for structure

    def _searched(
        self, state: State, clients: Int[Tensor, " C"], delta: Float[Tensor, "C P"], num_examples: Int[Tensor, " C"]
    ) -> State:
        """Accumulates h_i; looks once `search_rounds` have passed and two thirds of the clients (4 at least) replied.

        Where clients have replied equally often, size alone may be evidence; elsewhere it also holds how far the model
        moved between their replies.
        """
        T = state.progress.shape[1]
        state = replace(state, progress=state.progress.index_add(0, clients, delta[:, :T]))
        seen = state.seen > 0
        enough = min(max(4, self.num_models or 0, -(-2 * len(seen) // 3)), len(seen))
        if int(state.rounds) < self.search_rounds or int(seen.sum()) < enough:
            return state
        cosines = structure.cosines(state.progress[seen])
        tree = structure.ward_tree(cosines)
        costs = tree[:, 2] ** 2 / 2
        alike = len(clients) == len(seen) and bool((state.seen == state.seen[0]).all())
        examples = len(clients) / float((1 / num_examples.double()).sum()) if alike else None
        if bool(state.adapters):
            gate, count = structure.groups_of_adapters(cosines, tree, self.max_models)
        else:
            gate = structure.evidence(cosines, costs, most=self.max_models, elbow=self.elbow, examples=examples)
            count = structure.number_of_groups(costs, most=self.max_models, elbow=self.elbow, floor=self.floor)
        state = replace(state, gate=torch.tensor(gate, dtype=torch.float64))
        if self.num_models is None and gate < self.gate:
            return self._without_search(state)
        return self._split(state, seen, self._groups(tree, self.num_models or count))

    def _without_search(self, state: State) -> State:
        return replace(state, searching=torch.tensor(False), progress=state.progress[:0])

    def _groups(self, tree: structure.Floats, count: int) -> structure.Labels:
        labels = structure.groups_of(tree, count)
        found = int(labels.max()) + 1
        if found < (self.num_models or 0):
            log.warning("asked for %d models, but the clients' updates fall into %d group(s)", self.num_models, found)
        return labels

    def _split(self, state: State, seen: Tensor, labels: structure.Labels) -> State:
        """Θ_j = Θ − (mean of h over group j − mean of h); W_ij = `lean` for the own group, else 0.

        Clients not seen get W_ij = log of group j's share of the clients: the common model.
        """
        count, progress = int(labels.max()) + 1, state.progress[seen]
        if count == 1:
            return self._without_search(state)
        member = one_hot(torch.from_numpy(labels).to(progress.device), count).double()
        means = weighted_sum(member / member.sum(dim=0), progress)
        everyone = weighted_sum(torch.full((len(progress), 1), 1 / len(progress), dtype=torch.float64), progress)
        models = state.soup.models.double().repeat(count, 1)
        models[:, : progress.shape[1]] -= means - everyone
        rows = state.soup.logits.shape[:2]
        logits = member.mean(dim=0).log().repeat(*rows, 1)
        logits[:, seen] = self.lean * (ADAPTER_LEAN if bool(state.adapters) else 1.0) * member
        return replace(
            self._without_search(state),
            soup=Soup(models.to(state.soup.models.dtype), logits),
            velocity=state.velocity.repeat(count, 1),
            seen=torch.where(seen, 0, -1).to(state.seen.dtype),
            moments=self._no_moments((*rows, count)),
        )

    def _placed(self, state: State, clients: Int[Tensor, " C"], delta: Float[Tensor, "C P"]) -> State:
        """Gives clients without a row of their own the mean row of those who favour the model they move towards.

        That is the model with the smallest ⟨Θ_j − θ_i, g_i⟩ / ‖Θ_j − θ_i‖ among those that are somebody's favourite.
        """
        new, known = state.seen[clients] < 0, state.seen >= 0
        if not bool(new.any()):
            return state
        logits, T = state.soup.logits.clone(), state.velocity.shape[1]
        models, prior = centred(state.soup.models[:, :T]), mixing(logits[:1, clients[new]])[0]
        member = one_hot(mixing(logits[:, known]).mean(dim=0).argmax(dim=1), len(models)).double()
        distance = squared_norms(models - prior[:1] @ models).sqrt()
        along_unit = along(models, delta[new, :T], prior) / distance.clamp_min(torch.finfo(torch.float64).tiny)
        nearest = along_unit.masked_fill(member.sum(dim=0) == 0, float("inf")).argmin(dim=1)
        typical = (member / member.sum(dim=0).clamp_min(1)).T @ logits[:, known]
        logits[:, clients[new]] = typical[:, nearest]
        seen = state.seen.index_fill(0, clients[new], 0)
        return replace(state, soup=Soup(state.soup.models, logits), seen=seen)

    # ---------------------------------------------------------------- client and facts

    def cost(self, state: State) -> Cost:
        """One vector each way whatever d is."""
        held = (state.soup.models, state.soup.logits, state.velocity, state.progress, state.moments)
        return _parts.one_vector_each_way(state.soup.models, server_floats=sum(tensor.numel() for tensor in held))

    def describe(self, state: State) -> dict[str, Any]:
        """What the search found and how decided the clients are."""
        facts: dict[str, Any] = {"num_models": len(state.soup.models)}
        if self.initial == "split" and self.num_models != 1:
            facts |= {"searching": bool(state.searching), "gate": float(state.gate)}
        if len(state.soup.models) > 1:
            weights = mixing(state.soup.logits).mean(dim=0)
            facts["models_in_use"] = len(torch.unique(weights.argmax(dim=1)))
        return facts

    def mixing(self, state: State) -> Float[Tensor, "N d"] | None:
        """A, averaged over blocks in proportion to their size."""
        size = (state.scope[:, 1] - state.scope[:, 0]).double()
        return (mixing(state.soup.logits) * (size / size.sum())[:, None, None]).sum(dim=0)

    train = _parts.pulled_training
    start = _parts.nothing_private
    personal = _parts.as_received
