"""Everything that would break the proof is refused with its reason, word by word."""

import dataclasses
import math

import pytest

from fedmerge.core.errors import UsageError
from fedmerge.privacy.conditions import Facts, faults, refuse

BROKEN = {
    "cohorts of fixed size": (
        {"sampling": "uniform", "fraction": 0.1, "sampling_rate": 0.1},
        "participation.sampling: got 'uniform'; expected 'poisson': the accountant counts on each client being drawn "
        "independently of all others. Set participation.sampling='poisson', or fraction=1",
    ),
    "another rate than the run's": (
        {"fraction": 0.2, "sampling_rate": 0.1},
        "method.sampling_rate: got 0.1 with fraction=0.2; expected the same: epsilon and the public denominator are "
        "computed from it. Set both alike",
    ),
    "a quorum": (
        {"quorum": 0.3},
        "participation.quorum: got 0.3; expected 0: whether a round is abandoned would tell how many clients answered. "
        "Set participation.quorum=0",
    ),
    "rounds that show that nobody answered": (
        {"silent_rounds": False},
        "participation: got rounds that are left out if nobody answers; expected noise in those as well: a model that "
        "stands still would tell that nobody took part",
    ),
    "selection by validation": (
        {"select": "validation"},
        "select: got 'validation'; expected 'last': the choice of a round looks at the clients' own examples, without "
        "noise. Set select='last'",
    ),
    "averages of products": (
        {"merging": "product"},
        "merging: got 'product'; expected 'factors': averages of products are computed from the clients' updates "
        "beside the noisy sum. Set merging='factors'",
    ),
    "a space chosen from the updates": (
        {"merging": "auto", "adapters": True},
        "merging: got 'auto'; expected 'factors': averages of products are computed from the clients' updates "
        "beside the noisy sum. Set merging='factors'",
    ),
    "BatchNorm": (
        {"buffers": 13},
        "model: got a network with 13 numbers in buffers (BatchNorm statistics); expected none: they would be averaged "
        "without clipping and noise. Use GroupNorm, or no normalisation",
    ),
    "clipping to the median": (
        {"clip_to_median": True},
        "defences.clip: got a limit computed from the clients' updates; expected 0: one client would move the limit "
        "for all others, and method.clip bounds every update already. Set defences.clip=0",
    ),
    "capping to the median": (
        {"cap_to_median": True},
        "defences.max_count: got a limit computed from the clients' numbers of examples; expected 0: one client would "
        "move the limit for all others. Set defences.max_count=0, and method.count_cap to a public number",
    ),
    "the sum of actual shares": (
        {"denominator": "participants"},
        "denominator: got 'participants'; expected 'public': divided by what the clients of a round add up to, one "
        "client changes the result by far more than clip/denominator",
    ),
    "an early stop": (
        {"early_stop": True},
        "early stop: got one; expected a fixed number of rounds: when training ends would tell how the clients do",
    ),
    "a search": (
        {"search": True},
        "method: got a search for structure in the clients' updates; expected a fixed number of models that start from "
        "public draws: the search has no noise. Use method 'dp-fedmerge'",
    ),
    "rows that feel each other": (
        {"coupled_rows": True},
        "method: got merging weights that depend on other clients' updates; expected a step of each row by its own "
        "client's update and the released models only. Use method 'dp-fedmerge'",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_each_condition_is_refused_with_its_reason(name):
    changes, text = BROKEN[name]
    assert faults(Facts(**changes)) == [text]
    with pytest.raises(UsageError) as refused:
        refuse(Facts(**changes))
    assert str(refused.value) == text


def test_all_faults_come_together():
    everything = {key: value for changes, _ in BROKEN.values() for key, value in changes.items()}
    everything |= {"merging": "product", "fraction": 0.2}
    found = faults(Facts(**everything))
    wanted = [text for name, (_, text) in BROKEN.items() if name != "a space chosen from the updates"]
    assert sorted(found) == sorted(wanted)
    with pytest.raises(UsageError) as refused:
        refuse(Facts(**everything))
    assert str(refused.value).splitlines() == found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fraction": 0.1, "sampling_rate": 0.1},
        {"sampling": "uniform"},  # everyone, every round
        {"merging": "auto"},  # nothing travels that has products
        {"merging": "factors", "adapters": True},
        {"finetune": True},  # stays with the client
    ],
)
def test_what_does_not_break_the_proof_is_let_through(changes):
    assert faults(Facts(**changes)) == []
    refuse(Facts(**changes))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Facts) if f.type == "float"])
def test_a_number_that_is_none_is_a_fault(name):
    assert faults(Facts(**{name: math.nan}))
