"""Which result answers which run, also when the package has learned new options since it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedmerge.bench.plan import Run
from fedmerge.bench.result import Result


class Known:
    """Results by the run that they answer; of several that do the last counts.

    A result answers a run of the same resolved configuration. It also answers one that was asked for in the same words
    if every option of method and training that it was made with has the same value today: an option that did not exist
    then changes nothing as long as nobody gives it, and one whose default has changed since makes another run. Options
    without a value are not recorded, nor are those of data, network and rounds: where such a default changes, the
    suite's `protocol` number must be raised. A tuning run answers no report: it has no test scores.

    Args:
        results: In the order in which they were made.
    """

    def __init__(self, results: Iterable[Result] = ()) -> None:
        self._by_key: dict[str, Result] = {}
        self._by_request: dict[str, Result] = {}
        for result in results:
            self.add(result)

    def add(self, result: Result) -> None:
        """Takes in one more."""
        self._by_key[result.key] = self._by_request[result.request] = result

    def find(self, run: Run) -> Result | None:
        """The result of a run, if there is one."""
        asked = self._by_request.get(run.request)
        same = asked if asked is not None and is_part_of(asked.options, run.options) else None
        return next((found for found in (self._by_key.get(run.key), same) if found and answers(found, run)), None)


def answers(result: Result, run: Run) -> bool:
    """Whether a result has what its run is for."""
    return run.stage in (result.stage, "tuning")


def is_part_of(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether every option of `then` is in `now` with the same value; tables are compared in the same way.

    >>> is_part_of({"d": 5, "training": {"lr": 0.1}}, {"d": 5, "new": 0, "training": {"lr": 0.1, "epochs": 2}})
    True
    >>> is_part_of({"d": 5}, {"d": 4})
    False
    """
    return all(name in now and _same(value, now[name]) for name, value in then.items())


def _same(then: Any, now: Any) -> bool:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return is_part_of(then, now)
    return bool(then == now)
