"""What a private run may show. The proof covers the shared models and what is computed from them, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RUN_FIELDS: dict[str, str] = {
    "client_names": "tells who the clients are",
    "groups": "tells which clients are alike",
    "num_train": "counts of single clients",
    "num_validation": "counts of single clients",
    "num_test": "counts of single clients",
    "class_counts": "counts of single clients",
    "tasks": "tells what single clients do",
    "data_sha256": "lets anybody check a guess of the data",
    "samples": "what single clients' models say on single clients' examples",
    "finetuned": "scores of single clients",
    "finetuned_validation": "scores of single clients",
    "seconds": "grows with the clients that took part and their examples",
    "seed": "gives away noise and cohorts, unless both came from elsewhere",
}
"""Fields of a run's record that must be left out, and why."""
ROUND_FIELDS: dict[str, str] = {
    "cohort": "epsilon counts on nobody knowing who took part",
    "seconds": "grows with the clients that took part and their examples",
    "bytes_down": "counts the clients that took part",
    "bytes_up": "counts the clients that took part",
    "forward": "counts the examples of the clients that took part",
    "backward": "counts the examples of the clients that took part",
    "mixing": "merging weights are computed from single clients' updates without noise",
    "validation": "scores of single clients",
    "test": "scores of single clients",
    "dropped": "epsilon counts on nobody knowing who took part",
    "refused": "tells which clients replied, and what",
    "abandoned": "counts the clients that took part",
    "virtual_seconds": "grows with the clients that took part and their examples",
}
"""Fields of a round's record that must be left out, and why."""
FREE_RUN_FIELDS = (
    "label",
    "method",
    "options",
    "status",
    "class_names",
    "num_params",
    "setting",
    "versions",
    "select",
    "engine",
    "rounds",
)
"""Fields of a run's record that hold what was public before the run, or rounds."""
FREE_ROUND_FIELDS = ("round", "state")
"""Fields of a round's record that do: what dp-fedmerge says of its state is public."""
FREE_TENSORS = ("soup.models", "velocity", "rounds")
"""Tensors of dp-fedmerge's state that are computed from the noisy sums alone; logits and key are not."""
FREE_FILES = ("config.toml",)
"""Files of a run folder that may be shown as they are, apart from the seed in them."""


def what_must_stay() -> str:
    """The fields that a release leaves out with the reasons, one line each."""
    lines = [
        *(f"run.{name}: {reason}" for name, reason in RUN_FIELDS.items()),
        *(f"rounds.{name}: {reason}" for name, reason in ROUND_FIELDS.items()),
        "state.soup.logits: merging weights are computed from single clients' updates without noise",
        "state.key: whoever knows it can take the noise away",
    ]
    return "\n".join(lines)


def releasable_run(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's plain record may be shown: fields known to be public, and rounds reduced likewise.

    Args:
        record: As in ``run.json``; with its rounds or without.
    """
    kept = {name: record[name] for name in FREE_RUN_FIELDS if name in record and name != "rounds"}
    rounds = record.get("rounds")
    return kept if rounds is None else {**kept, "rounds": [releasable_round(line) for line in rounds]}


def releasable_round(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a round's plain record may be shown.

    Args:
        record: As in a line of ``rounds.jsonl``.
    """
    return {name: record[name] for name in FREE_ROUND_FIELDS if name in record}


def releasable_state(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What of dp-fedmerge's saved state may be shown: models, momentum, number of rounds.

    Args:
        tensors: By dotted name, as `fedmerge.core.protocol.state_tensors` gives them.
    """
    return {name: tensors[name] for name in FREE_TENSORS if name in tensors}
