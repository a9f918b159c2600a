"""What each rule brings with it, and contradictions that are refused instead of being ignored."""

import pytest

from fedmerge.algorithms.fedmerge import FedMerge
from fedmerge.core.errors import UsageError

REFUSED = [
    ({"rule": "official", "num_models": 1}, "num_models: got 1 with rule='official'"),
    ({"rule": "official", "initial": "noise"}, "initial: got 'noise' with rule='official'; expected 'independent'"),
    ({"rule": "official", "momentum": 0.5}, "momentum: got 0.5 with rule='official', which has none; leave it out"),
    ({"rule": "official", "shrinkage": 0.3}, "shrinkage: got 0.3 with rule='official', which has none"),
    ({"rule": "official", "rows": "layer"}, "rows: got 'layer' with rule='official'; expected 'model'"),
    ({"rule": "adam", "decay": 0.1}, "decay: got 0.1 with rule='adam'; only rule='mirror' has it"),
    ({"noise": 0.2}, "noise: got 0.2, which has no effect with initial='split'; leave it out"),
    ({"initial": "noise", "search_rounds": 5}, "search_rounds: got 5, which has no effect with initial='noise'"),
    ({"rule": "official", "lean": 2.0}, "lean: got 2.0, which has no effect with initial='independent'"),
    ({"num_models": 3, "gate": 0.5}, "gate: got 0.5, which has no effect where d is given by hand"),
    ({"num_models": 3, "max_models": 4}, "max_models: got 4, which has no effect where d is given by hand"),
    ({"rule": "official", "max_gap": 2.0}, "max_gap: got 2.0 with rule='official', which has none; leave it out"),
    ({"rule": "official", "max_logit": 5.0}, "max_logit: got 5.0 with rule='official', which has none; leave it out"),
    ({"max_gap": 0.5}, "max_gap: got 0.5, which every model exceeds; expected 0 or a number > 1"),
    ({"rows": "layer", "scope": "head"}, "scope: got 'head' with rows='layer'; expected 'all' or nothing"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_contradictions_are_refused(options, message):
    with pytest.raises(UsageError) as refusal:
        FedMerge(**options)
    assert f"FedMerge.{message}" in str(refusal.value)


def test_all_contradictions_are_told_at_once():
    with pytest.raises(UsageError) as refusal:
        FedMerge(rule="official", num_models=1, momentum=0.5, shrinkage=0.1, decay=0.1)
    assert len(str(refusal.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mirror", (None, "split", "all", 0.2, 0.02, 0.5, 0.3)),
        ("official", (5, "independent", "head", 0.01, 0.0, 0.0, 0.0)),
        ("gradient", (5, "noise", "all", 1.0, 0.0, 0.5, 0.3)),
        ("adam", (5, "noise", "all", 0.1, 0.0, 0.5, 0.3)),
    ],
)
def test_a_rule_fills_in_what_the_user_left_out(rule, expected):
    made = FedMerge(rule=rule)
    found = (made.num_models, made.initial, made.scope, made.mixing_lr, made.decay, made.momentum, made.shrinkage)
    assert found == expected
    assert made.max_gap == (0.0 if rule == "official" else 2.0)


def test_a_rule_overrides_nothing_that_the_user_said():
    made = FedMerge(rule="gradient", mixing_lr=3.0, momentum=0.0, initial="split", num_models=4)
    assert (made.mixing_lr, made.momentum, made.initial, made.num_models) == (3.0, 0.0, "split", 4)


def test_zero_is_not_a_contradiction():
    assert FedMerge(rule="official", momentum=0.0, decay=0.0).momentum == 0.0
