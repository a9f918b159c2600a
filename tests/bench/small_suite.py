"""A suite whose runs take milliseconds, and results made up for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from fedmerge.bench.plan import Planner, Run
from fedmerge.bench.result import Result
from fedmerge.bench.suite import Suite
from fedmerge.bench.suite_file import suite_of

PARTITION = {"name": "rotations", "clients": 4, "groups": 2, "train": 10, "validation": 4, "test": 6}
TABLE: dict[str, Any] = {
    "title": "Small",
    "seeds": [0, 1, 2],
    "lr": [0.1, 0.3],
    "extensions": 1,
    "reference": "fedavg",
    "defaults": {
        "source": {"name": "digits"},
        "model": {"name": "mlp", "hidden": [8]},
        "rounds": 2,
        "evaluate_every": 1,
        "training": {"epochs": 1, "batch_size": 8},
    },
    "settings": {
        "turned": {"title": "Turned", "partition": PARTITION, "groups": 2},
        "alike": {"partition": {**PARTITION, "name": "iid"} | {"groups": None}, "told": 3},
    },
    "methods": {
        "fedavg": {"name": "fedavg"},
        "local": {"name": "local", "control": True},
        "oracle": {"name": "oracle", "needs": "groups", "control": True},
        "ifca": {"name": "ifca", "told": "d"},
    },
    "goals": [{"key": "g", "setting": "turned", "left": "ifca", "right": ["fedavg", "local"], "demand": 1.0}],
}
del TABLE["settings"]["alike"]["partition"]["groups"]


def table(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(TABLE), **changes}


def suite(**changes: Any) -> Suite:
    return suite_of(table(**changes))


def made_up(run: Run, accuracy: list[float], **changes: Any) -> Result:
    """A finished result whose validation and test accuracies are the given ones."""
    values = tuple(accuracy)
    facts: dict[str, Any] = {
        "method": run.table["method"]["name"],
        "options": {},
        "status": "finished",
        "message": "",
        "versions": {"fedmerge": "0", "machine": "a machine"},
        "selected_round": 1,
        "last_round": 2,
        "validation": values,
        "test": values,
        "last_test": values,
        "num_test": (6,) * len(values),
        "bytes_down": 100.0,
        "bytes_up": 100.0,
        "seconds": 60.0,
        "data_sha256": f"{run.setting}-{run.seed}",
    }
    return Result(run.key, run.request, run.setting, run.label, run.seed, run.stage, **{**facts, **changes})


Make = Callable[[Run], Result]


def filled(suite: Suite, make: Make, limit: int = 1000) -> list[Result]:
    """Made-up results of the suite's runs in the order in which they would be made, `limit` at most."""
    planner, results = Planner(suite), {}
    while len(results) < limit:
        run = next(planner.missing(lambda run: results.get(run.key)), None)
        if run is None:
            break
        results[run.key] = make(run)
    return list(results.values())
