"""Differential privacy of clients: clipped contributions, a noisy sum, and a denominator that everybody may know.

Client i, with merging weights A_i and update g_i, contributes u_i = w_i·(A_i1 g_i, …, A_id g_i), a vector of d·P
numbers. It is clipped as a whole to norm C, so that the sum over clients moves by at most C when one client comes or
goes, whatever d is. Noise of standard deviation z·C on every number of the sum makes the release private; everything
that is computed from the release alone stays so. docs/differential-privacy.md has the derivation.

Axes: C clients of this round · d global models · P parameters.
"""

from __future__ import annotations

import math
import secrets

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedmerge.core.randomness import generator
from fedmerge.core.sums import squared_norms, weighted_sum

SLACK = 1e-9
"""Contributions are clipped to (1 − SLACK)·C, so that rounding in float64 does not carry them beyond C."""
KEY_BITS = 256
"""Of a secret key. What is needed is 128."""
_WORD = 32


def contribution_weights(num_examples: Int[Tensor, " C"], most: int | None) -> Float[Tensor, " C"]:
    """w_i = min(n_i, most)/most, or 1 for everyone where `most` is None; never above 1.

    Args:
        num_examples: n_i, the client's word.
        most: Public: a number that depends on the clients' counts would tell of them.

    >>> contribution_weights(torch.tensor([5, 20, 80]), 40).tolist()
    [0.125, 0.5, 1.0]
    """
    if most is None:
        return torch.ones(len(num_examples), dtype=torch.float64)
    return num_examples.double().clamp(min=0, max=most) / most


def clip_factors(
    weights: Float[Tensor, "C d"], updates: Float[Tensor, "C P"], scale: Float[Tensor, " C"], *, clip: float
) -> Float[Tensor, " C"]:
    """min(1, C/‖u_i‖) with ‖u_i‖ = w_i ‖A_i‖ ‖g_i‖: u_i need not be written down to know how long it is.

    Args:
        weights: A, rows of this round's clients.
        updates: g_i.
        scale: w_i.
        clip: C > 0.
    """
    bound = (1 - SLACK) * clip
    lengths = scale * (squared_norms(weights) * squared_norms(updates)).sqrt()
    return torch.where(lengths <= bound, 1.0, bound / lengths)


def clipped_sum(
    weights: Float[Tensor, "C d"], updates: Float[Tensor, "C P"], scale: Float[Tensor, " C"], *, clip: float
) -> Float[Tensor, "d P"]:
    """S_j = Σ_i c_i w_i A_ij g_i in float64, with c_i = `clip_factors`; one client changes S by at most `clip`.

    >>> one = torch.tensor([[0.6, 0.8]]), torch.tensor([[30.0, 40.0]]), torch.ones(1, dtype=torch.float64)
    >>> round(float(clipped_sum(*one, clip=2.0).norm()), 6)
    2.0
    """
    factors = clip_factors(weights, updates, scale, clip=clip) * scale
    return weighted_sum(weights.double() * factors[:, None], updates)


def noise(shape: tuple[int, int], *, std: float, key: int, round_number: int) -> Float[Tensor, "d P"]:
    """Gaussian noise in float64 that depends on (key, round) alone.

    Args:
        shape: (d, P).
        std: z·C; 0 gives zeros.
        key: Whoever knows it can take the noise away again.
        round_number: Rounds never share noise.
    """
    drawn = generator(key, "privacy noise", round_number).standard_normal(shape)
    return std * torch.from_numpy(drawn)


def public_denominator(sampling_rate: float, num_clients: int, num_models: int) -> float:
    """D_pub = q·N/d: what a model's contributions would add up to if all models were used alike.

    Public, unlike the number of clients that took part and the sums of their merging weights.

    >>> public_denominator(0.1, 1000, 4)
    25.0
    """
    return sampling_rate * num_clients / num_models


def signal_to_noise(denominator: float, *, noise_multiplier: float, num_params: int) -> float:
    """SNR_j ≈ D_j/(z√P): what contributions of length C that agree add up to, over the length of the noise.

    Args:
        denominator: D_j, how many clients a model can count on in a round.
        noise_multiplier: z; 0 gives infinity.
        num_params: P.

    >>> signal_to_noise(100.0, noise_multiplier=1.0, num_params=10_000)
    1.0
    """
    length = noise_multiplier * math.sqrt(num_params)
    return denominator / length if length > 0 else math.inf


def secret_key() -> int:
    """A fresh number of `KEY_BITS` bits from the system's source of randomness."""
    return secrets.randbits(KEY_BITS)


def words_of(key: int) -> Int[Tensor, " K"]:
    """A whole number >= 0 as words of 32 bits, the lowest first, so that a state can hold it.

    >>> words_of(2**32 + 7).tolist()
    [7, 1]
    """
    count = max(1, math.ceil(key.bit_length() / _WORD))
    return torch.tensor([key >> (_WORD * place) & (2**_WORD - 1) for place in range(count)], dtype=torch.int64)


def number_of(words: Int[Tensor, " K"]) -> int:
    """The inverse of `words_of`."""
    return sum(int(word) << (_WORD * place) for place, word in enumerate(words.tolist()))
