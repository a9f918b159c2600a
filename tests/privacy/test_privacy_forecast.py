"""What a private run will cost is told before it begins."""

import math

import pytest

from fedmerge.core.errors import UsageError
from fedmerge.privacy.accounting import epsilon
from fedmerge.privacy.forecast import forecast, forecast_text, refuse_hopeless

RUN = {
    "noise_multiplier": 2.0,
    "clip": 0.5,
    "sampling_rate": 0.1,
    "rounds": 10,
    "delta": 1e-5,
    "num_clients": 400,
    "num_models": 2,
    "num_params": 2500,
}


def test_the_numbers_by_hand():
    """D = .1·400/2 = 20 clients per model; noise 2·.5 on the sum; 20/(2·√2500) = .2."""
    found = forecast(**RUN)
    assert found.denominator == 20
    assert (found.sum_std, found.model_std) == (1.0, 1 / 20)
    assert found.snr == 0.2
    assert found.epsilon == epsilon(2.0, 0.1, 10, 1e-5)
    assert (found.delta, found.noise_multiplier, found.num_params) == (1e-5, 2.0, 2500)


def test_the_text_tells_epsilon_delta_noise_and_signal():
    found = forecast(**RUN)
    assert forecast_text(found) == (
        f"One client's part in the run is protected with epsilon {found.epsilon:.3g} at delta 1e-05. Noise of standard "
        "deviation 1 on every number of the sum, 0.05 on every number of a model per round. Signal-to-noise ratio of a "
        "round: 0.2 at best (20 clients per model over 2 times the root of 2,500 parameters)"
    )


def test_no_noise_is_called_no_privacy():
    found = forecast(**{**RUN, "noise_multiplier": 0.0})
    assert (found.epsilon, found.snr) == (math.inf, math.inf)
    assert forecast_text(found) == "No privacy: the noise multiplier is 0, epsilon is infinite"
    refuse_hopeless(found)


def test_a_signal_behind_its_noise_is_refused_with_the_numbers():
    """25 times the parameters: a ratio of .04, which 50 clients per model or .16 times the parameters would mend."""
    found = forecast(**{**RUN, "num_params": 62_500})
    with pytest.raises(UsageError) as refused:
        refuse_hopeless(found)
    assert str(refused.value) == (
        f"method: got a signal-to-noise ratio of 0.04; expected 0.1 or more. {forecast_text(found)}. That needs 50 "
        "clients per model and round, or a network of 10,000 parameters. Take more clients, fewer models, a smaller "
        "network or less noise, or set method.force=true"
    )
    refuse_hopeless(found, force=True)


def test_the_ratio_of_a_tenth_passes():
    refuse_hopeless(forecast(**{**RUN, "num_params": 10_000}))
