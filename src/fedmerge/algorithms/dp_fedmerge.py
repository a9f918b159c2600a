"""FedMerge with differential privacy of clients: noise on unnormalised, jointly clipped sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.algorithms import _parts
from fedmerge.algorithms._registry import algorithm
from fedmerge.core import private
from fedmerge.core.errors import UsageError
from fedmerge.core.mixing import mirror_step
from fedmerge.core.options import check_options, option
from fedmerge.core.protocol import Cost, Draw, Federation, Update
from fedmerge.core.soup import Soup, merge, mixing
from fedmerge.core.sums import compared


@dataclass(frozen=True)
class State:
    """Server state.

    Only `soup.models` and what is computed from them may be shown: the logits tell of single clients, and the key takes
    the noise away.

    Attributes:
        soup: Models [d, P] and logits [1, N, d].
        velocity: [d, P] server momentum.
        rounds: [] completed.
        key: [K] words of 32 bits: the run's seed, or a secret.
    """

    soup: Soup
    velocity: Float[Tensor, "d P"]
    rounds: Int[Tensor, ""]
    key: Int[Tensor, " K"]


@algorithm("dp-fedmerge", citation="McMahan et al., ICLR 2018, arXiv:1710.06963 (d = 1)")
@dataclass(frozen=True)
class DpFedMerge:
    """FedMerge whose shared models hide whether any one client took part in training them.

    Each client's contribution to all d models together is clipped to norm `clip`; the models move by the noisy sum
    divided by the fixed q·N/d. A client's merging weights move by its own update and the released models only, so they
    need no noise, and they must stay between the server and that client. With num_models = 1 it is DP-FedAvg with a
    fixed denominator.

    The noise is computed from the run's seed unless `secret_noise` is set: good for simulations, but whoever knows the
    seed can take it away again. docs/differential-privacy.md says what is protected and what is not.

    Sends P numbers down and P up; the server keeps d·P models, their momentum and N·d logits; clients keep nothing.
    """

    num_models: int = option(2, at_least=1, help="d; not found from the data, which would tell of the clients")
    noise_multiplier: float = option(1.0, at_least=0, help="z: noise of z * clip on the sum; 0 gives no privacy")
    clip: float = option(1.0, above=0, help="C: largest length of one client's contribution to all models together")
    sampling_rate: float = option(
        1.0, above=0, at_most=1, help="q: chance of a client to take part, the run's fraction"
    )
    delta: float = option(1e-5, above=0, below=1, help="delta for which the run's epsilon is told")
    force: bool = option(False, help="train although the noise will drown the signal")
    secret_noise: bool = option(False, help="noise from a fresh secret key instead of the seed; no run is repeatable")
    count_cap: int | None = option(
        None, at_least=1, help="public number of examples from which on a client counts 1, below in proportion"
    )
    initial: Literal["noise", "independent"] = option("noise", help="how models come to differ")
    noise: float = option(0.1, above=0, help="share of a fresh draw added to each model where initial is 'noise'")
    mixing_lr: float = option(0.2, above=0, help="largest change of a logit before decay")
    decay: float = option(0.02, at_least=0, below=1, help="pull of the logits towards uniform")
    momentum: float = option(0.0, at_least=0, below=1, help="server momentum of the models")
    server_lr: float = option(1.0, above=0, help="server step on the models")
    proximal: float = option(0.01, at_least=0, help="pull of local training, proximal * |theta - start|^2, no 1/2")

    def __post_init__(self) -> None:
        check_options(self)
        if self.initial != "noise" and self.noise != DpFedMerge.noise:
            raise UsageError(
                f"DpFedMerge.noise: got {self.noise!r}, which has no effect with initial={self.initial!r}; leave it out"
            )

    # ---------------------------------------------------------------- server

    def init(self, draw: Draw, federation: Federation, seed: int) -> State:
        """Models from public draws, uniform merging weights, and the key of the noise.

        Raises:
            UsageError: if there are more models than clients, or the network has buffers.
        """
        _parts.refuse_more_than_clients("dp-fedmerge", self.num_models, federation.num_clients)
        models = self._first_models(draw, federation.num_trainable)
        if models.shape[1] != federation.num_trainable:
            raise UsageError(
                f"dp-fedmerge: got a network with {models.shape[1] - federation.num_trainable} numbers in buffers "
                "(BatchNorm statistics), which would be averaged without protection; use a network without them, for "
                "example with GroupNorm"
            )
        logits = torch.zeros(1, federation.num_clients, self.num_models, dtype=torch.float64)
        key = private.words_of(private.secret_key() if self.secret_noise else seed)
        return State(Soup(models, logits), torch.zeros_like(models), torch.tensor(0), key)

    def _first_models(self, draw: Draw, T: int) -> Float[Tensor, "d P"]:
        if self.num_models == 1:
            return draw(0)[None]
        if self.initial == "independent":
            return torch.stack([draw(j) for j in range(self.num_models)])
        return _parts.noisy_draws(draw, self.num_models, T, self.noise)

    def send(self, state: State, clients: Int[Tensor, " C"]) -> Float[Tensor, "C P"]:
        """θ_i = Σ_j A_ij Θ_j."""
        return merge(state.soup.models, mixing(state.soup.logits[0, clients]))

    def receive(
        self, state: State, clients: Int[Tensor, " C"], update: Update, num_examples: Int[Tensor, " C"]
    ) -> State:
        """Θ_j ← Θ_j − η (S_j + N(0, z²C²I)) / D_pub; each replying client's row moves by its own update alone.

        `clients` may be empty: that nobody took part must not show, so that such a round releases noise, too.
        """
        weights = mixing(state.soup.logits[0, clients])
        step = self._noisy_sum(state, weights, update.delta, num_examples) / self.denominator(state)
        moved = _parts.moved(
            _parts.Models(state.soup.models, state.velocity), step, lr=self.server_lr, momentum=self.momentum
        )
        logits = state.soup.logits.clone()
        logits[0, clients] = self._moved_rows(logits[0, clients], weights, state.soup.models, update.delta)
        return State(Soup(moved.models, logits), moved.velocity, state.rounds + 1, state.key)

    def silence(self, state: State) -> State:
        """The state after a round in which nobody replied: `receive` of no replies."""
        nobody = torch.zeros(0, dtype=torch.int64)
        return self.receive(state, nobody, Update(state.soup.models[:0]), nobody)

    def denominator(self, state: State) -> float:
        """D_pub = q·N/d."""
        return private.public_denominator(self.sampling_rate, state.soup.logits.shape[1], len(state.soup.models))

    def _noisy_sum(
        self,
        state: State,
        weights: Float[Tensor, "C d"],
        delta: Float[Tensor, "C P"],
        num_examples: Int[Tensor, " C"],
    ) -> Float[Tensor, "d P"]:
        """The only place where updates reach the shared models."""
        scale = private.contribution_weights(num_examples, self.count_cap)
        total = private.clipped_sum(weights, delta, scale, clip=self.clip)
        d, P = total.shape
        key, rounds = private.number_of(state.key), int(state.rounds)
        return total + private.noise((d, P), std=self.noise_multiplier * self.clip, key=key, round_number=rounds)

    def _moved_rows(
        self,
        rows: Float[Tensor, "C d"],
        weights: Float[Tensor, "C d"],
        models: Float[Tensor, "d P"],
        delta: Float[Tensor, "C P"],
    ) -> Float[Tensor, "C d"]:
        seen = compared(models, delta)
        return mirror_step(rows, seen.along(weights), seen.reach(), lr=self.mixing_lr, decay=self.decay)

    # ---------------------------------------------------------------- client and facts

    def cost(self, state: State) -> Cost:
        """One vector each way whatever d is."""
        held = (state.soup.models, state.soup.logits, state.velocity)
        return _parts.one_vector_each_way(state.soup.models, server_floats=sum(tensor.numel() for tensor in held))

    def describe(self, state: State) -> dict[str, Any]:
        """Public facts only: nothing here depends on the clients."""
        public = "from the run's seed: a simulation, whoever knows the seed can take it away"
        return {
            "num_models": len(state.soup.models),
            "privacy_noise": "from a secret key" if self.secret_noise else public,
            "noise_std": self.server_lr * self.noise_multiplier * self.clip / self.denominator(state),
        }

    def mixing(self, state: State) -> Float[Tensor, "N d"]:
        """A; tells of single clients and is not to be released."""
        return mixing(state.soup.logits[0])

    train = _parts.pulled_training
    start = _parts.nothing_private
    personal = _parts.as_received
