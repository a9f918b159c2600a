"""What a private run shows: nothing that is not known to be public."""

import dataclasses

import pytest
import torch

from fedmerge.algorithms.dp_fedmerge import DpFedMerge
from fedmerge.core.protocol import state_tensors
from fedmerge.experiment.record import RoundRecord, RunRecord
from fedmerge.privacy import release
from small_federation import small


def names(record):
    return {field.name for field in dataclasses.fields(record)}


def test_every_field_of_a_round_is_public_or_left_out():
    """A new field must be thought about."""
    assert {*release.ROUND_FIELDS, *release.FREE_ROUND_FIELDS} >= names(RoundRecord)
    assert not {*release.ROUND_FIELDS} & {*release.FREE_ROUND_FIELDS}


def test_every_field_of_a_run_is_public_or_left_out():
    assert {*release.RUN_FIELDS, *release.FREE_RUN_FIELDS} >= names(RunRecord)
    assert not {*release.RUN_FIELDS} & {*release.FREE_RUN_FIELDS}


def test_a_release_holds_what_is_known_to_be_public_and_nothing_else():
    line = dict.fromkeys([*names(RoundRecord), "something new"], 1)
    assert release.releasable_round(line) == {"round": 1, "state": 1}
    run = {**dict.fromkeys([*names(RunRecord), "something new"], 1), "rounds": [line, line]}
    found = release.releasable_run(run)
    assert set(found) == set(release.FREE_RUN_FIELDS)
    assert found["rounds"] == [{"round": 1, "state": 1}] * 2
    assert "rounds" not in release.releasable_run({"label": "a"})
    assert release.releasable_run({"label": "a"}) == {"label": "a"}


@pytest.mark.parametrize("name", ["mixing", "validation", "test", "cohort"])
def test_weights_scores_and_cohorts_stay(name):
    assert f"rounds.{name}: " in release.what_must_stay()
    assert name not in release.releasable_round({name: 1})


def test_models_are_released_and_merging_weights_and_key_are_not():
    federation = small()
    tensors = state_tensors(DpFedMerge().init(federation.draw, federation.facts(), 0))
    found = release.releasable_state(tensors)
    assert set(found) == {"soup.models", "velocity", "rounds"}
    assert set(tensors) - set(found) == {"soup.logits", "key"}
    assert torch.equal(found["soup.models"], tensors["soup.models"])


def test_the_list_gives_a_reason_for_everything():
    lines = release.what_must_stay().splitlines()
    assert len(lines) == len(release.RUN_FIELDS) + len(release.ROUND_FIELDS) + 2
    assert all(len(line.split(": ", 1)[1]) > 10 for line in lines)
    assert "state.soup.logits: merging weights are computed from single clients' updates without noise" in lines
    assert "state.key: whoever knows it can take the noise away" in lines
