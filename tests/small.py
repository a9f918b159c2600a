"""A federation small enough that a run takes milliseconds, as configuration words and as a table."""

from __future__ import annotations

from typing import Any

TABLE: dict[str, Any] = {
    "source": {"name": "digits"},
    "partition": {"name": "rotations", "clients": 5, "train": 10, "validation": 4, "test": 6},
    "model": {"name": "mlp", "hidden": [8]},
    "training": {"epochs": 1},
    "rounds": 2,
    "evaluate_every": 1,
}
WORDS = [
    "source=digits",
    "partition=rotations",
    *(f"partition.{key}={value}" for key, value in TABLE["partition"].items() if key != "name"),
    "model.hidden=[8]",
    "training.epochs=1",
    "rounds=2",
]


def small(method: str | dict[str, Any] = "fedavg", **changes: Any) -> dict[str, Any]:
    """The table with a method and other run options."""
    return {**TABLE, "method": method, **changes}
