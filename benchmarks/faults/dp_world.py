"""Small federations in which one client does its worst, and an attacker who knows everything but whether it is there.

The attacker knows the method, all other clients, who of them took part, and every released model. It follows the
target's row as if the target had taken part in every round, and scores a run by the likelihood ratio of its releases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedmerge.algorithms.dp_fedmerge import DpFedMerge, State
from fedmerge.core.private import words_of
from fedmerge.core.protocol import Federation, Update, deliver
from fedmerge.core.randomness import generator
from fedmerge.core.soup import Soup, mixing

LOGIT = 30.0
"""Of a row that is one-hot to 13 digits."""


@dataclass(frozen=True)
class World:
    """One adversarial configuration; client 0 is the target.

    Attributes:
        name: What is adversarial about it.
        method: With its noise.
        rows: How the weights begin: ``uniform``, ``clusters`` (client i has model i mod d alone), ``alone`` (the
            target has model 0 for itself), ``tiny`` (the others have e^-30 of the target's model), ``random``.
        clients: N.
        params: P.
        rounds: Releases.
        lengths: Of the target's update and of the others'.
        aligned: Whether all updates point the same way.
        counts: Numbers of examples of the target and of the others.
    """

    name: str
    method: DpFedMerge
    rows: str = "uniform"
    clients: int = 8
    params: int = 5
    rounds: int = 2
    lengths: tuple[float, float] = (100.0, 1.0)
    aligned: bool = False
    counts: tuple[int, int] = (10, 10)

    def logits(self) -> Tensor:
        """[N, d] where the rows begin."""
        N, d = self.clients, self.method.num_models
        rows = torch.zeros(N, d, dtype=torch.float64)
        if self.rows == "clusters":
            rows[torch.arange(N), torch.arange(N) % d] = LOGIT
        elif self.rows in ("alone", "tiny"):
            rows[0, 0] = LOGIT
            rows[1:, 0] = -LOGIT if self.rows == "tiny" else -10 * LOGIT
        elif self.rows == "random":
            rows += torch.from_numpy(generator(0, "rows of the audit").normal(size=(N, d)))
        return rows

    def updates(self, round_number: int) -> Tensor:
        """[N, P] what the clients send in a round, whatever they were sent."""
        drawn = torch.from_numpy(
            generator(0, "updates of the audit", round_number).normal(size=(self.clients, self.params))
        )
        if self.aligned:
            drawn[:] = drawn[0]
        lengths = torch.full((self.clients, 1), self.lengths[1], dtype=torch.float64)
        lengths[0] = self.lengths[0]
        sent: Tensor = lengths * drawn / drawn.norm(dim=1, keepdim=True)
        return sent

    def num_examples(self) -> Tensor:
        """[N]."""
        counts = torch.full((self.clients,), self.counts[1])
        counts[0] = self.counts[0]
        return counts

    def begin(self, key: int) -> State:
        """The state before the first round, with rows of the configuration and noise of a key."""
        facts = Federation(self.clients, self.params, (0, self.params), ((0, self.params),))
        draw = generator(0, "models of the audit").normal(size=(self.method.num_models + 1, self.params))
        state = self.method.init(lambda j: torch.from_numpy(draw[j]), facts, 0)
        return replace(state, soup=Soup(state.soup.models, self.logits()[None]), key=words_of(key))

    def received(self, method: DpFedMerge, state: State, cohort: list[int], round_number: int) -> State:
        """One round with these clients."""
        if not cohort:
            return method.silence(state)
        chosen = torch.tensor(cohort)
        update = Update(self.updates(round_number)[chosen])
        return deliver(method, state, chosen, update, self.num_examples()[chosen])


def released(world: World, before: State, after: State) -> Tensor:
    """The noisy sum [d, P] that moved the models, as anybody can read it off them."""
    method = world.method
    velocity = after.velocity.double() - method.momentum * before.velocity.double()
    return velocity * method.denominator(before)


def clean_sums(world: World, state: State, others: list[int], round_number: int) -> tuple[Tensor, Tensor, State]:
    """What would be added without noise, without and with the target; and the state with the target's row moved."""
    silent = replace(world.method, noise_multiplier=0.0)
    sums = [world.received(silent, state, cohort, round_number) for cohort in (others, [0, *others])]
    return released(world, state, sums[0]), released(world, state, sums[1]), sums[1]


def largest_shift(world: World) -> float:
    """The most that the target moves a release, in standard deviations of its noise, along a run without noise."""
    state, largest = world.begin(1), 0.0
    for r in range(1, world.rounds + 1):
        without, with_target, state = clean_sums(world, state, list(range(1, world.clients)), r)
        largest = max(largest, float((with_target - without).norm()))
    return largest / (world.method.noise_multiplier * world.method.clip)


def score(world: World, trial: int, *, inside: bool) -> float:
    """Log likelihood ratio of one run's releases, with the target as a member or without."""
    rng = generator(trial, "runs of the audit", int(inside))
    q, sigma = world.method.sampling_rate, world.method.noise_multiplier * world.method.clip
    state, total = world.begin(2 * trial + int(inside) + 10), 0.0
    row = state.soup.logits[:, 0]
    for r in range(1, world.rounds + 1):
        taking_part = rng.random(world.clients) < q
        others = [i for i in range(1, world.clients) if taking_part[i]]
        logits = state.soup.logits.clone()
        logits[:, 0] = row
        seen = replace(state, soup=Soup(state.soup.models, logits))
        without, with_target, shadow = clean_sums(world, seen, others, r)
        row = shadow.soup.logits[:, 0]
        after = world.received(world.method, state, [0, *others] if inside and taking_part[0] else others, r)
        moved, residual = with_target - without, released(world, state, after) - without
        exponent = float((residual * moved).sum() - moved.square().sum() / 2) / sigma**2
        total += float(np.logaddexp(np.log1p(-q), np.log(q) + exponent)) if q < 1 else exponent
        state = after
    return total


def broken_average(world: World, cohort: list[int], round_number: int) -> Tensor:
    """Each model's normalised average of clipped updates: what DP-FedAvg does with one model."""
    weights = mixing(world.logits())[cohort]
    updates, clip = world.updates(round_number)[cohort], world.method.clip
    clipped = updates * (clip / updates.norm(dim=1, keepdim=True)).clamp(max=1)
    total = weights.sum(dim=0, keepdim=True)
    average: Tensor = (weights / torch.where(total > 0, total, torch.ones_like(total))).T @ clipped
    return average


def broken_std(world: World) -> float:
    """The noise that it adds: z·C/(qN), as if every client had an N-th of every model."""
    return world.method.noise_multiplier * world.method.clip / (world.method.sampling_rate * world.clients)


def broken_shift(world: World) -> float:
    """What the target moves it by, in standard deviations of its noise."""
    others = list(range(1, world.clients))
    moved = broken_average(world, [0, *others], 1) - broken_average(world, others, 1)
    return float(moved.norm()) / broken_std(world)


def broken_score(world: World, trial: int, *, inside: bool) -> float:
    """Log likelihood ratio of one release of the broken scheme in which everybody takes part."""
    others = list(range(1, world.clients))
    without, with_target = broken_average(world, others, 1), broken_average(world, [0, *others], 1)
    std = broken_std(world)
    drawn = generator(trial, "noise of the broken scheme", int(inside)).normal(size=tuple(without.shape))
    release = (with_target if inside else without) + std * torch.from_numpy(drawn)
    moved = with_target - without
    return float(((release - without) * moved).sum() - moved.square().sum() / 2) / std**2
