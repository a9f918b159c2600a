"""Which runs a suite consists of, in which order, and what makes two runs the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedmerge.bench.result import Result
from fedmerge.bench.suite import Setting, Suite, method_table
from fedmerge.bench.tuning import Trial, Tuning, tune
from fedmerge.experiment.config import Table, build_config, method_options, to_table

Stage = Literal["tuning", "report"]


@dataclass(frozen=True)
class Run:
    """One run of the suite.

    Attributes:
        setting: Key.
        label: Of the method.
        seed: Decides data split, initial model, cohorts and batches.
        stage: Whether it serves to choose or is reported.
        table: Its configuration as asked for.
        request: Hash of that: finds results however defaults change later.
        key: Hash of the resolved configuration: a run with a result of this key need not be made again.
        options: The method's own, resolved, with a ``training`` table, as a result holds them.
    """

    setting: str
    label: str
    seed: int
    stage: Stage
    table: Table
    request: str
    key: str
    options: Mapping[str, Any]


def digest(protocol: int, table: Mapping[str, Any]) -> str:
    """Hash of a configuration without its label; equal configurations of two labels or settings are one run."""
    content = {"protocol": protocol, "config": {key: value for key, value in table.items() if key != "label"}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


Find = Callable[[Run], Result | None]
"""The result of a run, if there is one."""


@dataclass(frozen=True)
class Planner:
    """Makes the runs of a suite, each once.

    Attributes:
        suite: What to run.
        made: Runs made so far, by what they were asked as.
    """

    suite: Suite
    made: dict[tuple[str, str, int, Trial], Run] = field(default_factory=dict)

    def run(self, setting: Setting, label: str, seed: int, trial: Trial) -> Run:
        """The run of a trial on a seed."""
        asked = (setting.key, label, seed, trial)
        if asked not in self.made:
            self.made[asked] = self._new(setting, label, seed, trial)
        return self.made[asked]

    def _new(self, setting: Setting, label: str, seed: int, trial: Trial) -> Run:
        protocol, method = self.suite.protocol, self.suite.methods[label]
        table = method_table(setting.base, method, dict(trial.extra), setting.told) | {"seed": seed}
        table["training"] = {**table["training"], "lr": trial.rate}
        config = build_config(table)
        resolved = to_table(config)
        stage: Stage = "tuning" if seed == protocol.tuning_seed else "report"
        number = protocol.protocol
        request, key = digest(number, table), digest(number, resolved)
        return Run(setting.key, label, seed, stage, table, request, key, method_options(config.method, config.training))

    def tuning(self, setting: Setting, label: str, find: Find) -> Tuning:
        """Where the choice of a method's rate and options on a setting stands."""
        protocol, method = self.suite.protocol, self.suite.methods[label]

        def score(trial: Trial) -> float | None:
            result = find(self.run(setting, label, protocol.tuning_seed, trial))
            return None if result is None else result.tuning_score()

        return tune(
            score,
            first=method.lr,
            ladder=protocol.ladder,
            extensions=protocol.extensions,
            options_grid=method.options_grid,
        )

    def missing(self, find: Find) -> Iterator[Run]:
        """Runs without a result that can be made now, the most useful first.

        By seed: for every setting its tuning, then the first seed; after that every setting's second seed, and so on.
        A method whose tuning waits for a result has no reported run yet.
        """
        seen: set[str] = set()
        for run in self._in_order(find):
            if run.key not in seen and find(run) is None:
                seen.add(run.key)
                yield run

    def _in_order(self, find: Find) -> Iterator[Run]:
        tunings: dict[tuple[str, str], Tuning] = {}
        for setting in self.suite.settings.values():
            for label in setting.labels:
                tuning = tunings[setting.key, label] = self.tuning(setting, label, find)
                for trial in tuning.missing:
                    yield self.run(setting, label, self.suite.protocol.tuning_seed, trial)
            yield from self._reported(setting, self.suite.protocol.seeds[0], tunings)
        for seed in self.suite.protocol.seeds[1:]:
            for setting in self.suite.settings.values():
                yield from self._reported(setting, seed, tunings)

    def _reported(self, setting: Setting, seed: int, tunings: Mapping[tuple[str, str], Tuning]) -> Iterator[Run]:
        for label in setting.labels:
            chosen = tunings[setting.key, label].chosen
            if chosen is not None:
                yield self.run(setting, label, seed, chosen)

    def left(self, find: Find) -> dict[str, int]:
        """Runs still to be made per setting, as far as can be known: grids may grow while they are tuned."""
        counts = {}
        for setting in self.suite.settings.values():
            waiting = 0
            for label in setting.labels:
                tuning = self.tuning(setting, label, find)
                seeds = self.suite.protocol.seeds
                if tuning.chosen is None:
                    waiting += len(tuning.missing) + len(seeds)
                else:
                    chosen = tuning.chosen
                    waiting += sum(find(self.run(setting, label, seed, chosen)) is None for seed in seeds)
            counts[setting.key] = waiting
        return counts
