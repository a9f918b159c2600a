"""What FedMerge's options mean together: what a rule brings with it, and which combinations are refused."""

from __future__ import annotations

from typing import Any

from fedmerge.core.errors import UsageError

_OURS: dict[str, Any] = {"scope": "all", "momentum": 0.5, "shrinkage": 0.3, "max_gap": 2.0}
# What a rule brings with it where the user says nothing. `official` is the authors' published procedure.
BY_RULE: dict[str, dict[str, Any]] = {
    "mirror": {"initial": "split", "mixing_lr": 0.2, "decay": 0.02, **_OURS},
    "gradient": {"initial": "noise", "mixing_lr": 1.0, "decay": 0.0, **_OURS},
    "adam": {"initial": "noise", "mixing_lr": 0.1, "decay": 0.0, **_OURS},
    "official": {
        "initial": "independent",
        "scope": "head",
        "mixing_lr": 0.01,
        "decay": 0.0,
        "momentum": 0.0,
        "shrinkage": 0.0,
        "max_gap": 0.0,
    },
}


def refuse_contradictions(given: Any) -> None:
    """Checks a FedMerge whose rule has not filled in its own values yet.

    Raises:
        UsageError: with one line per option that contradicts another or that nothing would read.
    """
    faults = _faults_of_official(given) if given.rule == "official" else []
    if given.decay and given.rule != "mirror":
        faults.append(f"decay: got {given.decay!r} with rule={given.rule!r}; only rule='mirror' has it")
    if given.rows != "model" and given.scope == "head":
        faults.append(f"scope: got 'head' with rows={given.rows!r}; expected 'all' or nothing")
    if given.max_gap is not None and 0 < given.max_gap <= 1:
        faults.append(f"max_gap: got {given.max_gap!r}, which every model exceeds; expected 0 or a number > 1")
    faults += _faults_of_idle_options(given)
    if faults:
        raise UsageError("\n".join(f"FedMerge.{fault}" for fault in faults))


def _faults_of_official(given: Any) -> list[str]:
    faults = []
    if given.num_models == 1:
        faults.append("num_models: got 1 with rule='official', which divides by zero there; expected >= 2")
    if given.initial not in (None, "independent"):
        faults.append(f"initial: got {given.initial!r} with rule='official'; expected 'independent' or nothing")
    if given.rows != "model":
        faults.append(f"rows: got {given.rows!r} with rule='official'; expected 'model'")
    return faults + [
        f"{name}: got {getattr(given, name)!r} with rule='official', which has none; leave it out"
        for name in ("momentum", "shrinkage", "max_gap", "max_logit")
        if getattr(given, name)
    ]


def _faults_of_idle_options(given: Any) -> list[str]:
    """Options that were set although nothing reads them."""
    initial = given.initial or BY_RULE[given.rule]["initial"]
    splits, here = initial == "split" and given.num_models != 1, f"with initial={initial!r}"
    groups = (
        (("noise",), initial == "noise", here),
        (("search_rounds", "lean"), splits, "with one model" if initial == "split" else here),
        (("gate", "elbow", "floor", "max_models"), splits and given.num_models is None, "where d is given by hand"),
    )
    return [
        f"{name}: got {getattr(given, name)!r}, which has no effect {why}; leave it out"
        for names, used, why in groups
        for name in names
        if not used and getattr(given, name) != getattr(type(given), name)
    ]
