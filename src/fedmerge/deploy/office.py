"""A deployed run as it goes: opened where it stands, and written down whatever ends it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fedmerge.deploy.deployment import Deployment
from fedmerge.deploy.federation import is_tombstone
from fedmerge.deploy.plan import Plan
from fedmerge.deploy.post import Post
from fedmerge.experiment.book import Book, Standing, standing
from fedmerge.experiment.execute import Journey, close_run, new_record
from fedmerge.experiment.record import RoundRecord, RunRecord, write_run
from fedmerge.experiment.record import Status as RunStatus
from fedmerge.experiment.serving import write_serving
from fedmerge.experiment.simulation import Setup, first_record
from fedmerge.experiment.store import versions

REPLIES = "replies"
"""Folder of the answers of the round that is under way."""


def bases(rounds: Sequence[RoundRecord], num_clients: int) -> list[int]:
    """[N] the latest of these rounds in which each client's reply was admitted; 0 for none.

    Args:
        rounds: From the first on.
        num_clients: N.
    """
    found = [0] * num_clients
    for line in rounds:
        if line.abandoned:
            continue
        lost = {*line.dropped, *(refusal["client"] for refusal in line.refused)}
        for client in line.cohort:
            if client not in lost:
                found[client] = line.round
    return found


@dataclass
class Office:
    """A run as it goes: the one thing here that changes.

    Attributes:
        plan: What stays.
        folder: Of the run; held by this process.
        deployment: Identity, and who has a model.
        record: What is known of the run.
        journey: The complete rounds, where they ended and where validation was best.
        open: The latest state, and the record of its round without scores; None when all rounds are complete.
        book: Writes it down.
        post: To the sites.
        began: When the run would have begun, had it never stopped, on the wall clock.
    """

    plan: Plan
    folder: Path
    deployment: Deployment
    record: RunRecord
    journey: Journey
    open: RoundRecord | None
    book: Book
    post: Post
    began: float

    @property
    def setup(self) -> Setup:
        """Method, network and options."""
        return self.plan.setup

    @property
    def everyone(self) -> range:
        """All clients, those of forgotten sites included."""
        return range(len(self.plan.federation.names))

    @property
    def living(self) -> tuple[int, ...]:
        """Clients that can be asked."""
        return tuple(i for i, name in enumerate(self.plan.federation.names) if not is_tombstone(name))

    @property
    def is_new(self) -> bool:
        """Whether no round has been finished yet."""
        return self.journey.last.round == 0

    def seconds(self) -> float:
        """Of the run so far."""
        return time.perf_counter() - self.began

    def since(self) -> list[int]:
        """[N] the round in which each site made the private state that it goes on from."""
        return bases([*self.journey.lines, *([self.open] if self.open else [])], len(self.everyone))

    def since_selected(self) -> list[int]:
        """The same at the round that is selected so far."""
        number = self.journey.choice[0]
        return bases([line for line in self.journey.lines if line.round <= number], len(self.everyone))


@contextmanager
def open_office(plan: Plan, deployment: Deployment, record: RunRecord | None, post: Post) -> Iterator[Office]:
    """The run's office, open; what is reached is written down whatever ends the block."""
    folder, stand = plan.federation.run_folder, Standing(None, ())
    if record is None:
        _write_first(plan, folder)
        record = _first_run_record(plan)
    else:
        stand = standing(folder, plan.setup, plan.start, plan.digest)
        record = replace(record, status="running", versions=versions())
    write_run(folder, record)
    book = Book(folder, plan.setup, plan.digest, stand.found)
    journey, line = _where(plan, stand)
    began = time.perf_counter() - journey.seconds
    office = Office(plan, folder, deployment, record, journey, line, book, post, began)
    post.roll.board.reached(journey.last.round)
    try:
        yield office
    except BaseException as error:
        status: RunStatus = "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
        with suppress(OSError):  # a full disk, which `error` tells already
            book.stop()
            close_run(office.record, status, office.journey, office.seconds(), folder)
            post.roll.board.close(f"{status}: {error}")
        raise
    finally:
        shutil.rmtree(folder / REPLIES, ignore_errors=True)


def _write_first(plan: Plan, folder: Path) -> None:
    setup, terms = plan.setup, plan.federation.terms
    write_serving(folder, terms.model, terms.training, terms.options, setup.data, setup.module)


def _first_run_record(plan: Plan) -> RunRecord:
    record = new_record(plan.setup, plan.setup.data, plan.federation.terms.model, plan.federation.deploy.name)
    return replace(record, data_sha256=plan.digest, class_counts=None)


def _where(plan: Plan, stand: Standing) -> tuple[Journey, RoundRecord | None]:
    """Where the run stands, and the record of its latest round if that has no scores yet."""
    if stand.found is None:
        return Journey(plan.start, plan.start), first_record(plan.setup, plan.start)
    found = stand.found
    best = next((line for line in stand.lines if line.round == found.manifest.selected), None)
    return Journey(found.last, found.selected, list(stand.lines), best, found.manifest.seconds), stand.pending


def note_reports(office: Office) -> None:
    """Writes down how many examples the sites have; what was known of one that has not reported stays."""
    reports, record = office.post.roll.reports, office.record
    found = {
        name: tuple(
            getattr(reports[site], name) if site in reports else known
            for site, known in zip(record.client_names, getattr(record, name), strict=True)
        )
        for name in ("num_train", "num_validation", "num_test")
    }
    if any(getattr(record, name) != values for name, values in found.items()):
        office.record = replace(record, **found)  # type: ignore[arg-type]
        write_run(office.folder, office.record)
