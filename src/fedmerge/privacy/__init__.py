"""Differential privacy of a run: how much it tells, what would break the proof, and what the noise will cost."""

from fedmerge.privacy.accounting import epsilon, noise_for
from fedmerge.privacy.conditions import Facts, faults, refuse
from fedmerge.privacy.examples import example_epsilon, example_epsilons
from fedmerge.privacy.forecast import PrivacyForecast, forecast, forecast_text, refuse_hopeless
from fedmerge.privacy.release import releasable_round, releasable_run, releasable_state, what_must_stay

__all__ = [
    "Facts",
    "PrivacyForecast",
    "epsilon",
    "example_epsilon",
    "example_epsilons",
    "faults",
    "forecast",
    "forecast_text",
    "noise_for",
    "refuse",
    "refuse_hopeless",
    "releasable_round",
    "releasable_run",
    "releasable_state",
    "what_must_stay",
]
