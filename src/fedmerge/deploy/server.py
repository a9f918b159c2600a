"""The server of a federation: the round loop over a network, exact, and able to go on after any process has died.

A round is one message to each site. It carries the model of the round before, which the site scores before it trains on
it; so the record of a round is complete when the next one closes, and a checkpoint holds the incomplete one beside the
state. The checkpoint is on the disk before the next message leaves: no site can be ahead of the server.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedmerge.core.errors import DivergedError, FedmergeError, UsageError
from fedmerge.core.files import make_folder
from fedmerge.core.memory import keep_freed
from fedmerge.core.text import shortened
from fedmerge.deploy.deployment import FILE as DEPLOYMENT
from fedmerge.deploy.deployment import (
    Deployment,
    new_deployment,
    read_deployment,
    refuse_other_terms,
    scaled,
    write_deployment,
)
from fedmerge.deploy.federation import FederationConfig
from fedmerge.deploy.handing_over import hand_over, selected_of
from fedmerge.deploy.link import Link
from fedmerge.deploy.messages import Letter, Order, text_of
from fedmerge.deploy.moments import fault_of_moments, moments_of_answer, pooled
from fedmerge.deploy.office import REPLIES, note_reports, open_office
from fedmerge.deploy.plan import Plan, plan_of
from fedmerge.deploy.post import Post
from fedmerge.deploy.replacing import put_back
from fedmerge.deploy.roll import Clock, Doubt, Roll
from fedmerge.deploy.rounds import next_round
from fedmerge.deploy.status import Board, Status
from fedmerge.experiment.book import held
from fedmerge.experiment.checkpoint import remove_all
from fedmerge.experiment.execute import close_run
from fedmerge.experiment.lock import NAME as LOCK
from fedmerge.experiment.record import RunRecord, read_run, read_run_alone
from fedmerge.experiment.simulation import one_thread

_FIRST_SECONDS = 6 * 3600.0
"""That a site has at least to say what it has: the first time it may have to fetch or convert its examples."""
STEADY = Clock(time.monotonic, time.sleep)


def serve(federation: FederationConfig, link: Link, *, clock: Clock = STEADY) -> None:
    """Runs a federation until its rounds are done and every site that is there has its model.

    Args:
        federation: Its folder, read.
        link: To the sites.
        clock: Time.

    Raises:
        UsageError: if the folder is in use, or holds a run of another configuration.
        FedmergeError: if too few sites answer within the patience, or the training diverges; what was reached is kept.
    """
    keep_freed()
    folder = federation.run_folder
    put_back(folder)
    make_folder(folder)
    with held(folder), one_thread():
        deployment = _deployment(folder, federation)
        federation = scaled(federation, deployment)
        post = _post(federation, deployment, link, clock)
        try:
            federation, deployment = _with_scale(federation, deployment, post)
            _run(plan_of(federation), deployment, post)
        except FedmergeError as error:
            post.roll.board.close(f"stopped: {error}")
            mend = isinstance(error, (UsageError, DivergedError))
            write_deployment(folder, replace(read_deployment(folder) or deployment, stopped=str(error), mend=mend))
            raise


def _deployment(folder: Path, federation: FederationConfig) -> Deployment:
    """The run's own, made for a new one."""
    digest = federation.terms.digest
    found = read_deployment(folder)
    if found is None:
        if any(path.name not in (LOCK, f"{DEPLOYMENT}.part") for path in folder.iterdir()):
            raise UsageError(f"{folder} holds something that is no deployed run; move it away")
        found = new_deployment(digest)
    refuse_other_terms(found, federation)
    found = replace(found, stopped="", mend=False)
    write_deployment(folder, found)
    return found


def _with_scale(
    federation: FederationConfig, deployment: Deployment, post: Post
) -> tuple[FederationConfig, Deployment]:
    """The federation with the scale of its inputs, found from the sums of all sites before the first round."""
    if not federation.terms.schema.needs_moments:
        return federation, deployment
    names = post.roll.names
    post.wait_for_reports(len(names))
    schema = federation.terms.schema
    mean, std = pooled([moments_of_answer(post.roll.reports[name], schema) for name in names])
    deployment = replace(deployment, mean=mean, std=std)
    write_deployment(federation.run_folder, deployment)
    federation = scaled(federation, deployment)
    post.roll.hello, post.roll.doubt = _hello(federation, deployment), _doubt(federation)
    return federation, deployment


def _run(plan: Plan, deployment: Deployment, post: Post) -> None:
    folder = plan.federation.run_folder
    record = read_run_alone(folder) if (folder / "run.json").is_file() else None
    if record is not None:
        _refuse_others(plan, record)
    if record is not None and record.status == "finished":
        post.roll.familiar = _counted(record)
        remove_all(folder)
        shutil.rmtree(folder / REPLIES, ignore_errors=True)
        hand_over(plan, deployment, post, read_run(folder), selected_of(plan))
        return
    with open_office(plan, deployment, record, post) as office:
        if office.is_new:
            post.wait_for_reports(min(plan.federation.deploy.start_with or len(post.roll.names), len(post.roll.names)))
        else:
            post.roll.familiar = _counted(office.record)
        note_reports(office)
        while office.open is not None:
            next_round(office)
        office.record = close_run(office.record, "finished", office.journey, office.seconds(), folder)
        office.book.close()
    hand_over(plan, deployment, post, office.record, office.journey.selected)


def _counted(record: RunRecord) -> frozenset[str]:
    """Sites that have reported how many examples they have."""
    return frozenset(name for name, n in zip(record.client_names, record.num_train, strict=True) if n)


def _refuse_others(plan: Plan, record: RunRecord) -> None:
    """Refuses to go on with a run of other sites: every row, seed and state belongs to a site's place among them."""
    folder, names = plan.federation.run_folder, plan.federation.names
    if record.client_names != names:
        before = shortened(", ".join(record.client_names))
        raise UsageError(
            f"{folder} was begun with the sites {before}; the federation has others now. A site joins a finished run "
            "with `fedmerge deploy offer` and `join`, and leaves one with `forget`; for a new run of the sites that "
            "are there now move the folder away"
        )
    if record.data_sha256 != plan.digest:
        raise UsageError(
            f"{folder} was begun on data of another form ([data] of federation.toml); put the old form back, or move "
            "the folder away for a new run"
        )


def _post(federation: FederationConfig, deployment: Deployment, link: Link, clock: Clock) -> Post:
    status = Status(run=deployment.run, rounds=federation.terms.options.rounds)
    board = Board(federation.run_folder, status)
    hello, doubt = _hello(federation, deployment), _doubt(federation)
    return Post(Roll(link, federation.living, federation.deploy, hello, doubt, board, clock))


def _hello(federation: FederationConfig, deployment: Deployment) -> Callable[[str], Letter]:
    """Makes the letter that asks a site who it is."""
    terms, limit = federation.terms.plain(), max(federation.deploy.limit(), _FIRST_SECONDS)
    return lambda name: Letter(text_of(Order("hello", deployment.run, 0, 0, name, terms, seconds=limit)), {})


def _doubt(federation: FederationConfig) -> Doubt:
    """Looks at the sums that a site sends, while the scale of the inputs is still to be found."""
    schema = federation.terms.schema
    return lambda answer: fault_of_moments(answer, schema)
