"""The server of a federation: the round loop over a network, exact, and able to go on after any process has died.

A round is one message to each site. It carries the model of the round before, which the site scores before it trains on
it; so the record of a round is complete when the next one closes, and a checkpoint holds the incomplete one beside the
state. The checkpoint is on the disk before the next message leaves: no site can be ahead of the server.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.files import make_folder
from fedmerge.core.keeping import travelling
from fedmerge.core.memory import keep_freed
from fedmerge.core.protocol import deliver
from fedmerge.core.replies import Expected, check_of, reasons_text
from fedmerge.core.tensor_files import read_tensors
from fedmerge.deploy.deployment import Deployment, new_deployment, read_deployment, write_deployment
from fedmerge.deploy.federation import FederationConfig
from fedmerge.deploy.link import Link
from fedmerge.deploy.messages import Letter, Order, answer_from, text_of
from fedmerge.deploy.outbox import Outbox, Templates
from fedmerge.deploy.post import Asking, Clock, Post, Take, Taken
from fedmerge.deploy.status import Board, Status
from fedmerge.deploy.tray import Tray
from fedmerge.deploy.trees import form_of
from fedmerge.experiment.book import Book, Standing, held, standing
from fedmerge.experiment.checkpoint import restored
from fedmerge.experiment.choice import Choice
from fedmerge.experiment.execute import Journey, close_run, new_record
from fedmerge.experiment.federation import drawer
from fedmerge.experiment.participation import Turnout, turnout
from fedmerge.experiment.privacy_check import privacy_of
from fedmerge.experiment.record import RoundRecord, RunRecord, read_run, read_run_alone, write_run
from fedmerge.experiment.record import Status as RunStatus
from fedmerge.experiment.serving import write_serving
from fedmerge.experiment.simulation import (
    Progress,
    Setup,
    described,
    first_record,
    is_evaluated,
    one_thread,
    setup_without_examples,
)
from fedmerge.experiment.store import versions
from fedmerge.runtime import Fleet
from fedmerge.runtime.rounds import RoundResult, refuse_divergence, unanswered
from fedmerge.runtime.spool import Spool
from fedmerge.training import rate_of_round

log = logging.getLogger(__name__)

STEADY = Clock(time.monotonic, time.sleep)
_NO_TENSORS = torch.empty(0)


@dataclass(frozen=True)
class Plan:
    """All that stays the same during a run.

    Attributes:
        federation: Its folder, read.
        setup: Method, network and options.
        templates: Of updates.
        start: Before the first round.
        digest: Of who takes part with which form of data.
    """

    federation: FederationConfig
    setup: Setup
    templates: Templates
    start: Progress
    digest: str


def plan_of(federation: FederationConfig) -> Plan:
    """Network, method and first state of a federation, without any site.

    Raises:
        UsageError: if the method and the network do not fit each other, or a private run's conditions do not hold.
    """
    terms = federation.terms
    schema, options = terms.schema, terms.options
    data = replace(
        schema.without_examples(federation.names),
        source=f"{federation.deploy.name}, {len(federation.names)} sites",
    )
    choice = Choice("sequential", why="every site computes for itself")
    setup = setup_without_examples(terms.method, terms.model, terms.training, options, data, choice)
    travels = travelling(setup.layout, options.keep)
    setup = replace(setup, privacy=privacy_of(terms.method, setup.played, travels, options, len(data.clients)))
    state = setup.played.init(
        drawer(terms.model, data, options.seed, setup.layout, options.dtype), setup.facts, options.seed
    )
    N = len(data.clients)
    fleet = Fleet(((),) * N, (_NO_TENSORS,) * N, options.buffers, setup.layout.num_trainable)  # sites keep theirs
    identity = json.dumps([federation.names, terms.plain()["data"]], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return Plan(federation, setup, Templates(setup, schema), Progress(state, fleet, 0), digest)


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
        """All clients."""
        return range(len(self.plan.federation.names))

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
    make_folder(folder)
    with held(folder), one_thread():
        plan = plan_of(federation)
        deployment = _deployment(folder, plan)
        try:
            _run(plan, deployment, link, clock)
        except FedmergeError as error:
            deployment = read_deployment(folder) or deployment
            write_deployment(folder, replace(deployment, stopped=str(error)))
            raise


def _deployment(folder: Path, plan: Plan) -> Deployment:
    """The run's own, made for a new one."""
    digest = plan.federation.terms.digest
    found = read_deployment(folder)
    if found is None:
        if any(path.name != ".lock" for path in folder.iterdir()):
            raise UsageError(f"{folder} holds something that is no deployed run; move it away")
        found = new_deployment(digest)
    if found.terms != digest:
        raise UsageError(
            f"{folder} was run under other terms (method, network, training, options or form of the data); put the "
            "old federation.toml back, or move the folder away for a new run"
        )
    write_deployment(folder, replace(found, stopped=""))
    return replace(found, stopped="")


def _run(plan: Plan, deployment: Deployment, link: Link, clock: Clock) -> None:
    folder = plan.federation.run_folder
    record = read_run_alone(folder) if (folder / "run.json").is_file() else None
    post = _post(plan, deployment, link, clock)
    if record is not None and record.status == "finished":
        hand_over(plan, folder, deployment, post, read_run(folder), _selected(plan, folder))
        return
    with _office(plan, folder, deployment, record, post) as office:
        post.wait_for_reports(plan.federation.deploy.start_with or len(post.names))
        _note_reports(office)
        while office.open is not None:
            _next_round(office)
        office.record = close_run(office.record, "finished", office.journey, office.seconds(), folder)
        office.book.close()
        shutil.rmtree(folder / "replies", ignore_errors=True)
    hand_over(plan, folder, deployment, post, office.record, office.journey.selected)


def _post(plan: Plan, deployment: Deployment, link: Link, clock: Clock) -> Post:
    federation = plan.federation
    status = Status(run=deployment.run, rounds=plan.setup.options.rounds)
    board = Board(federation.run_folder, status)
    terms = federation.terms.plain()

    def hello(name: str) -> Letter:
        return Letter(text_of(Order("hello", deployment.run, 0, 0, name, terms)), {})

    return Post(link, federation.names, federation.deploy, hello, board, clock)


@contextmanager
def _office(plan: Plan, folder: Path, deployment: Deployment, record: RunRecord | None, post: Post) -> Iterator[Office]:
    """The run's office, open; what is reached is written down whatever ends the block."""
    stand = Standing(None, ())
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
    post.board.reached(journey.last.round)
    try:
        yield office
    except BaseException as error:
        status: RunStatus = "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
        with suppress(OSError):  # a full disk, which `error` tells already
            book.stop()
            close_run(office.record, status, office.journey, office.seconds(), folder)
            post.board.close(f"{status}: {error}")
        raise


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


def _note_reports(office: Office) -> None:
    """Writes down how many examples the sites have."""
    reports = office.post.reports
    found = [reports.get(name) for name in office.plan.federation.names]
    counts = {
        name: tuple(0 if report is None else getattr(report, name) for report in found)
        for name in ("num_train", "num_validation", "num_test")
    }
    if any(getattr(office.record, name) != values for name, values in counts.items()):
        office.record = replace(office.record, **counts)  # type: ignore[arg-type]
        write_run(office.folder, office.record)


# ---------------------------------------------------------------- a round


def _next_round(office: Office) -> None:
    """One message to each site: the round before is completed, and the next one made if there is one."""
    setup, progress = office.setup, office.journey.last
    began, number = time.perf_counter(), progress.round + 1
    evaluate = is_evaluated(setup.options, progress.round)
    turned_out = _turnout(office, number) if number <= setup.options.rounds else None
    cohort = () if turned_out is None else turned_out.cohort
    tray = _tray(office, number, cohort)
    asked = office.everyone if evaluate else cohort
    bytes_down = _ask(office, number, cohort, asked, tray, 0 if turned_out is None else turned_out.quorum)
    refuse_divergence(tray.refusals, len(cohort))
    _note_reports(office)
    line = _complete(office, tray, evaluate=evaluate)
    office.journey.follow(progress, line, setup.options.select)
    if turned_out is None:
        office.open = None
        office.book.note(line, progress, office.journey.choice, office.seconds())
        office.book.written(wait=True)
        return
    result = _closed(office, progress, tray, turned_out.quorum)
    office.journey.last = Progress(result.state, progress.fleet, number)
    office.open = RoundRecord(
        round=number,
        cohort=cohort,
        seconds=time.perf_counter() - began,
        bytes_down=bytes_down,
        bytes_up=tray.bytes_up,
        forward=_passes(setup, progress, tray.passed, "extra_forward"),
        backward=_passes(setup, progress, tray.passed, "extra_backward"),
        state=described(setup.played, result.state),
        dropped=tuple(sorted({*cohort} - tray.admitted - {r.client for r in tray.refusals if r.client is not None})),
        refused=tuple({"client": refusal.client, "reason": refusal.reason} for refusal in tray.refusals),
        abandoned=result.abandoned,
    )
    office.book.keep([line], office.open, office.journey.last, office.journey.choice, office.seconds())
    _tell(office, tray)


def _passes(setup: Setup, progress: Progress, passed: int, extra: str) -> int:
    return round(passed * (1 + getattr(setup.played.cost(progress.state), extra)))


def _turnout(office: Office, number: int) -> Turnout:
    options = office.setup.options
    return turnout(
        options.participation,
        fraction=options.fraction,
        seed=options.seed,
        round_number=number,
        num_examples=office.record.num_train,
        passes=(),
    )


def _tray(office: Office, number: int, cohort: Sequence[int]) -> Tray:
    names, replies = office.plan.federation.names, office.folder / "replies"
    example = Outbox(office.setup, office.journey.last.state, cohort[:1] or [0]).of(cohort[0] if cohort else 0)
    template = office.plan.templates.answering(example)
    asked = frozenset(cohort)
    expected = Expected(office.deployment.run, number, asked, template, further=check_of(office.setup.played))
    if cohort:
        make_folder(replies)
    spool = Spool(replies, template, cohort) if cohort else None
    return Tray(expected, {name: i for i, name in enumerate(names)}, office.post.board, spool, office.post.reports)


def _ask(office: Office, number: int, cohort: Sequence[int], asked: Collection[int], tray: Tray, quorum: int) -> int:
    """Sends the messages of a round and waits for what comes back; bytes sent to the cohort."""
    setup, names, state = office.setup, office.plan.federation.names, office.journey.last.state
    others = [i for i in asked if i not in set(cohort)]
    boxes = {i: box for some in (cohort, others) if some for box in [Outbox(setup, state, some)] for i in some}
    since, selected = office.since(), office.since_selected()
    evaluate = len(asked) > len(cohort) or is_evaluated(setup.options, number - 1)
    rate = rate_of_round(setup.training, min(number, setup.options.rounds), setup.options.rounds)
    terms, sent = office.plan.federation.terms.plain(), dict.fromkeys(cohort, 0)

    def letter(i: int) -> Letter:
        tree = boxes[i].of(i)
        if i in sent:
            sent[i] = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))
        order = Order(
            "round",
            office.deployment.run,
            number,
            i,
            names[i],
            terms,
            train=i in sent,
            evaluate=evaluate,
            rate=rate,
            base=since[i],
            keep=(since[i], selected[i]),
            form=tuple(form_of(tree)),
        )
        return lettered(order, tree)

    letters: dict[str, Callable[[], Letter]] = {names[i]: partial(letter, i) for i in asked}
    counts = _counter(tray, cohort)
    office.post.ask(Asking("round", f"round {number}", letters, counts, quorum if cohort else 0))
    return sum(sent.values())


def lettered(order: Order, tree: Any) -> Letter:
    """An order with the tensors of the tree that goes with it."""
    return Letter(text_of(order), {str(k): leaf for k, leaf in enumerate(tree_leaves(tree))})


def _counter(tray: Tray, cohort: Sequence[int]) -> Take:
    """Takes answers in; those count that a quorum is made of."""
    members = frozenset(cohort)

    def take(name: str, letter: Letter) -> Taken:
        refusal = tray.take(name, letter)
        counts = refusal is None and (not members or tray.index[name] in members)
        return Taken(counts, "" if refusal is None else f"{refusal.reason}: {refusal.detail}")

    return take


def _complete(office: Office, tray: Tray, *, evaluate: bool) -> RoundRecord:
    """The record of the round before, with the scores that the sites gave its model."""
    line, progress = office.open, office.journey.last
    assert line is not None  # noqa: S101 - there is a round to complete
    if not evaluate:
        return line
    weights = office.setup.played.mixing(progress.state)
    return replace(
        line,
        validation=tray.scores_of(0, office.everyone),
        test=tray.scores_of(1, office.everyone),
        mixing=None if weights is None else tuple(tuple(round(a, 6) for a in row) for row in weights.tolist()),
    )


def _closed(office: Office, progress: Progress, tray: Tray, quorum: int) -> RoundResult:
    """The state after a round, with what was admitted taken in."""
    result = RoundResult(progress.state, progress.fleet, 0, tray.bytes_up)
    if not tray.admitted or tray.spool is None:
        return unanswered(office.setup.played, result, quorum)
    clients, update, counts = tray.spool.gathered()
    return replace(result, state=deliver(office.setup.played, progress.state, clients, update, counts))


def _tell(office: Office, tray: Tray) -> None:
    line, number = office.journey.lines[-1], office.journey.last.round
    office.post.board.reached(number)
    scored = "" if line.validation is None else f"; round {line.round} scored {line.validation.mean_accuracy():.4f}"
    log.info("round %d of %d: %d replies%s", number, office.setup.options.rounds, len(tray.admitted), scored)
    if tray.refusals:
        log.warning("round %d: replies refused: %s; %s", number, reasons_text(tray.refusals), tray.refusals[0].detail)


# ---------------------------------------------------------------- the end


def _selected(plan: Plan, folder: Path) -> Progress:
    """The selected state of a finished run."""
    return restored(plan.start, read_tensors(folder / "models.safetensors"), read_run(folder).selected().round)


def hand_over(
    plan: Plan, folder: Path, deployment: Deployment, post: Post, record: RunRecord, selected: Progress
) -> None:
    """Gives every site its model of the selected round; those that are not there get it when the run is started again.

    Args:
        plan: Of the run.
        folder: Of the run.
        deployment: Who has a model already.
        post: To the sites.
        record: With all rounds.
        selected: The state at the selected round.
    """
    names = plan.federation.names
    left = [i for i, name in enumerate(names) if name not in deployment.delivered]
    number = selected.round
    since = bases([line for line in record.rounds if line.round <= number], len(names))
    box, terms = Outbox(plan.setup, selected.state, range(len(names))), plan.federation.terms.plain()
    done = list(deployment.delivered)

    def letter(i: int) -> Letter:
        tree, base = box.of(i), since[i]
        form = tuple(form_of(tree))
        order = Order("final", deployment.run, number, i, names[i], terms, base=base, keep=(base,), form=form)
        return lettered(order, tree)

    def take(name: str, letter: Letter) -> Taken:
        answer = answer_from(letter.text)
        if (answer.site, answer.run) != (name, deployment.run):
            return Taken(False, f"it answered for {answer.site!r}")
        done.append(name)
        write_deployment(folder, replace(deployment, delivered=tuple(done)))
        return Taken(True)

    missing = post.ask(Asking("final", "models", {names[i]: partial(letter, i) for i in left}, take, 0))
    for name, why in sorted(missing.items()):
        log.warning("site %s has not got its model: %s; run the federation again to give it one", name, why)
    post.board.close("finished" if not missing else f"finished; without their models: {', '.join(sorted(missing))}")
    log.info("finished: %d of %d sites have their models", len(done), len(names))
