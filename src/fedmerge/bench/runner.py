"""Works a suite off: hands out runs, records what comes back, says how far it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedmerge.bench.known import Known
from fedmerge.bench.plan import Planner, Run
from fedmerge.bench.result import Result
from fedmerge.bench.store import Store, open_store
from fedmerge.bench.suite import Suite
from fedmerge.bench.workers import Crew, Failure, crew

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Standing:
    """How far a benchmark is.

    Attributes:
        done: Runs of this suite that have a result.
        left: Runs still to be made, as far as can be known.
        running: Runs in flight.
        minutes_left: Estimate; None before anything is known of a run's time.
    """

    done: int
    left: int
    running: tuple[Run, ...]
    minutes_left: float | None


@dataclass(frozen=True)
class Outcome:
    """What is left when the runner stops.

    Attributes:
        left: Runs still to be made.
        failures: Runs that could not be made.
        diverged: Reported runs that diverged.
    """

    left: int
    failures: tuple[Failure, ...]
    diverged: int


Tell = Callable[[Standing], None]
"""Called after every run."""


def run_suite(
    suite: Suite,
    folder: Path,
    *,
    jobs: int,
    minutes: float | None = None,
    tell: Tell | None = None,
    begin: Callable[[], None] | None = None,
) -> Outcome:
    """Makes every missing run of a suite.

    Args:
        suite: What to run.
        folder: Holds the results; continued if there are any.
        jobs: Runs at the same time; the numbers do not depend on it.
        minutes: After that no new run is begun.
        tell: Called after every run.
        begin: Called once, when the folder is ours.

    Raises:
        UsageError: if another benchmark writes the folder.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with open_store(folder) as store:
        if begin is not None:
            begin()
        work = _Work(Planner(suite), store, jobs, deadline, tell, Known(store.by_key.values()))
        if next(work.planner.missing(work.find), None) is not None:
            with crew(jobs) as members:
                work.work(members)
        reported = [result for result in store.by_key.values() if result.stage == "report"]
        return Outcome(
            sum(work.planner.left(work.find).values()),
            tuple(work.failures.values()),
            sum(result.status == "diverged" for result in reported),
        )


@dataclass
class _Work:
    """One session of a benchmark; what changes while it goes on."""

    planner: Planner
    store: Store
    jobs: int
    deadline: float | None
    tell: Tell | None
    known: Known
    failures: dict[str, Failure] = field(default_factory=dict)

    def find(self, run: Run) -> Result | None:
        return self.known.find(run)

    def work(self, members: Crew) -> None:
        """Until nothing is missing and nothing is in flight."""
        self._hand_out(members)
        while members.running():
            ended = members.ended(POLL_SECONDS)
            for answer in ended:
                if isinstance(answer, Failure):
                    self.failures[answer.run.key] = answer
                else:
                    self.store.append(answer)
                    self.known.add(answer)
            if ended:
                self._hand_out(members)
                self._report(members)

    def _hand_out(self, members: Crew) -> None:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return
        taken = {run.key for run in members.running()} | {*self.failures}
        for run in self.planner.missing(self.find):
            if not members.idle():
                return
            if run.key not in taken:
                members.start(run)

    def _report(self, members: Crew) -> None:
        if self.tell is None:
            return
        left = self.planner.left(self.find)
        self.tell(Standing(self._done(), sum(left.values()), members.running(), self._minutes(left)))

    def _done(self) -> int:
        return sum(result.setting in self.planner.suite.settings for result in self.store.by_key.values())

    def _minutes(self, left: dict[str, int]) -> float | None:
        """The mean time of a setting's runs, or of all, times the runs that are left."""
        times: dict[str, list[float]] = {}
        for result in self.store.by_key.values():
            if result.seconds is not None:
                times.setdefault(result.setting, []).append(result.seconds)
        if not times:
            return None
        overall = statistics.fmean(value for found in times.values() for value in found)
        means = {key: statistics.fmean(times[key]) if key in times else overall for key in left}
        return sum(count * means[key] for key, count in left.items()) / self.jobs / 60
