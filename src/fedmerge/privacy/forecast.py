"""What privacy will cost, told before training: epsilon, noise, and whether a signal can be seen behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmerge.core.errors import UsageError
from fedmerge.core.private import public_denominator, signal_to_noise
from fedmerge.privacy.accounting import epsilon

HOPELESS = 0.1
"""Signal-to-noise ratio of a round below which training is refused."""


@dataclass(frozen=True)
class PrivacyForecast:
    """What a run will claim and what its noise will do.

    Attributes:
        epsilon: With `delta`, of the whole run, for one client.
        delta: As asked for.
        sum_std: Standard deviation of the noise on each number of the sum, z·C.
        model_std: The same on each number of a model after one server step at rate 1, z·C/D_pub.
        denominator: D_pub, how many clients a model can count on in a round.
        snr: D_pub/(z√P), for contributions of full length that all agree; what real ones reach is less.
        noise_multiplier: z.
        num_params: P.
    """

    epsilon: float
    delta: float
    sum_std: float
    model_std: float
    denominator: float
    snr: float
    noise_multiplier: float
    num_params: int


def forecast(
    *,
    noise_multiplier: float,
    clip: float,
    sampling_rate: float,
    rounds: int,
    delta: float,
    num_clients: int,
    num_models: int,
    num_params: int,
) -> PrivacyForecast:
    """The forecast of a run.

    Args:
        noise_multiplier: z.
        clip: C.
        sampling_rate: q.
        rounds: All of the run.
        delta: For which epsilon is told.
        num_clients: N.
        num_models: d.
        num_params: P of the vector that travels.
    """
    denominator = public_denominator(sampling_rate, num_clients, num_models)
    return PrivacyForecast(
        epsilon=epsilon(noise_multiplier, sampling_rate, rounds, delta),
        delta=delta,
        sum_std=noise_multiplier * clip,
        model_std=noise_multiplier * clip / denominator,
        denominator=denominator,
        snr=signal_to_noise(denominator, noise_multiplier=noise_multiplier, num_params=num_params),
        noise_multiplier=noise_multiplier,
        num_params=num_params,
    )


def forecast_text(found: PrivacyForecast) -> str:
    """The forecast in one sentence each: what is claimed, how much noise, what is left of the signal."""
    if found.noise_multiplier == 0:
        return "No privacy: the noise multiplier is 0, epsilon is infinite"
    return (
        f"One client's part in the run is protected with epsilon {_short(found.epsilon)} at delta {found.delta:g}. "
        f"Noise of standard deviation {_short(found.sum_std)} on every number of the sum, {_short(found.model_std)} on "
        f"every number of a model per round. Signal-to-noise ratio of a round: {_short(found.snr)} at best "
        f"({found.denominator:.4g} clients per model over {found.noise_multiplier:.4g} times the root of "
        f"{found.num_params:,} parameters)"
    )


def refuse_hopeless(found: PrivacyForecast, *, force: bool = False) -> None:
    """Refuses a run whose noise drowns its signal.

    Args:
        found: The forecast.
        force: Lets it pass.

    Raises:
        UsageError: with the numbers.
    """
    if force or found.snr >= HOPELESS:
        return
    clients = math.ceil(found.denominator * HOPELESS / found.snr)
    params = round(found.num_params * (found.snr / HOPELESS) ** 2)
    raise UsageError(
        f"method: got a signal-to-noise ratio of {_short(found.snr)}; expected {HOPELESS} or more. "
        f"{forecast_text(found)}. That needs {clients:,} clients per model and round, or a network of {params:,} "
        "parameters. Take more clients, fewer models, a smaller network or less noise, or set method.force=true"
    )


def _short(number: float) -> str:
    return f"{number:.3g}"
