"""Whether a run that claims privacy can keep the claim: asked before its first round."""

from __future__ import annotations

from typing import Any

from fedmerge.algorithms.dp_fedmerge import DpFedMerge
from fedmerge.core.vector import Layout
from fedmerge.experiment.config import RunOptions
from fedmerge.privacy import Facts, PrivacyForecast, forecast, refuse, refuse_hopeless


def privacy_of(
    algorithm: Any, played: Any, layout: Layout, options: RunOptions, num_clients: int
) -> PrivacyForecast | None:
    """What a private run will claim and what its noise will do; None for a run that claims nothing.

    Args:
        algorithm: The method.
        played: The same as it is played.
        layout: Of what travels.
        options: Of the run.
        num_clients: N.

    Raises:
        UsageError: with every condition of the proof that does not hold, or if the noise would drown the signal.
    """
    if not isinstance(algorithm, DpFedMerge) or algorithm.noise_multiplier == 0:  # without noise nothing is claimed
        return None
    refuse(_facts(algorithm, played, layout, options))
    found = forecast(
        noise_multiplier=algorithm.noise_multiplier,
        clip=algorithm.clip,
        sampling_rate=algorithm.sampling_rate,
        rounds=options.rounds,
        delta=algorithm.delta,
        num_clients=num_clients,
        num_models=algorithm.num_models,
        num_params=layout.num_params,
    )
    refuse_hopeless(found, force=algorithm.force)
    return found


def _facts(algorithm: DpFedMerge, played: Any, layout: Layout, options: RunOptions) -> Facts:
    return Facts(
        sampling=options.participation.sampling,
        fraction=options.fraction,
        sampling_rate=algorithm.sampling_rate,
        quorum=options.participation.quorum,
        select=options.select,
        merging=options.merging,
        adapters=layout.has_adapters,
        buffers=layout.num_params - layout.num_trainable,
        clip_to_median=options.defences.clip > 0,
        cap_to_median=options.defences.max_count > 0,
        silent_rounds=getattr(played, "silence", None) is not None,
        finetune=options.finetune_epochs > 0,
    )
