"""One round of a federation: one message to each site, and what comes back."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from fedmerge.core.files import make_folder
from fedmerge.core.protocol import deliver, tree_bytes
from fedmerge.core.replies import Expected, check_of
from fedmerge.core.text import shortened
from fedmerge.deploy.messages import Letter, Order
from fedmerge.deploy.office import REPLIES, Office, note_reports
from fedmerge.deploy.outbox import NO_UPDATE, Outbox, lettered
from fedmerge.deploy.post import Asking, Take, Taken
from fedmerge.deploy.tray import Tray
from fedmerge.deploy.trees import form_of
from fedmerge.experiment.participation import Presence, Turnout, turnout
from fedmerge.experiment.record import RoundRecord
from fedmerge.experiment.simulation import Progress, Setup, described, is_evaluated
from fedmerge.runtime.rounds import RoundResult, refuse_divergence, unanswered
from fedmerge.runtime.spool import Spool
from fedmerge.training import rate_of_round

log = logging.getLogger(__name__)


def next_round(office: Office) -> None:
    """One message to each site: the round before is completed, and the next one made if there is one."""
    setup, progress = office.setup, office.journey.last
    began, number = time.perf_counter(), progress.round + 1
    evaluate = is_evaluated(setup.options, progress.round)
    turned_out = _turnout(office, number) if number <= setup.options.rounds else None
    cohort = () if turned_out is None else turned_out.cohort
    tray = _tray(office, number, cohort)
    asked = office.living if evaluate else cohort
    quorum = _needed(office, turned_out, asked)
    bytes_down = _ask(office, number, cohort, asked, tray, quorum, evaluate=evaluate)
    refuse_divergence(tray.refusals, len(cohort))
    note_reports(office)
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
    return round(passed * (1 + float(getattr(setup.played.cost(progress.state), extra))))


def _turnout(office: Office, number: int) -> Turnout:
    options = office.setup.options
    return turnout(
        options.participation,
        fraction=options.fraction,
        seed=options.seed,
        round_number=number,
        num_examples=office.record.num_train,
        passes=(),
        presence=_presence(office),
    )


def _needed(office: Office, turned_out: Turnout | None, asked: Collection[int]) -> int:
    """Answers without which a round does not close; the last scores, which decide what is selected, need some too."""
    if turned_out is None:
        share = office.setup.options.participation.quorum
        return max(1, math.ceil(share * len(asked))) if asked else 0
    return turned_out.quorum if turned_out.cohort else 0


def _presence(office: Office) -> Presence | None:
    """Forgotten sites are never there; where there are none, all draws are as in a simulation."""
    living = set(office.living)
    if len(living) == len(office.everyone):
        return None
    return Presence(tuple(((1, math.inf),) if i in living else () for i in office.everyone))


def _tray(office: Office, number: int, cohort: Sequence[int]) -> Tray:
    names, replies = office.plan.federation.names, office.folder / REPLIES
    template = NO_UPDATE
    if cohort:
        example = Outbox(office.setup, office.journey.last.state, cohort[:1]).of(cohort[0])
        template = office.plan.templates.answering(example)
    asked = frozenset(cohort)
    expected = Expected(office.deployment.run, number, asked, template, further=check_of(office.setup.played))
    if cohort:
        make_folder(replies)
    spool = Spool(replies, template, cohort) if cohort else None
    roll = office.post.roll
    return Tray(expected, {name: i for i, name in enumerate(names)}, roll.board, spool, roll.reports)


def _ask(
    office: Office,
    number: int,
    cohort: Sequence[int],
    asked: Collection[int],
    tray: Tray,
    quorum: int,
    *,
    evaluate: bool,
) -> int:
    """Sends the messages of a round and waits for what comes back; bytes sent to the cohort."""
    setup, names, state = office.setup, office.plan.federation.names, office.journey.last.state
    others = [i for i in asked if i not in set(cohort)]
    boxes = {i: box for some in (cohort, others) if some for box in [Outbox(setup, state, some)] for i in some}
    since, selected = office.since(), office.since_selected()
    rate = rate_of_round(setup.training, min(number, setup.options.rounds), setup.options.rounds)
    terms, sent = office.plan.federation.terms.plain(), dict.fromkeys(cohort, 0)

    def letter(i: int, failures: int) -> Letter:
        tree = boxes[i].of(i)
        if i in sent:
            sent[i] = tree_bytes(tree)
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
            seconds=office.plan.federation.deploy.limit(failures),
        )
        return lettered(order, tree)

    letters: dict[str, Callable[[int], Letter]] = {names[i]: partial(letter, i) for i in asked}
    counts = _counter(tray, cohort)
    group, size = f"round {number}" if cohort else "last scores", tray.expected.template.num_bytes
    missing = office.post.ask(Asking("round", group, letters, counts, quorum, size))
    for name, why in sorted(missing.items()):
        log.warning("round %d goes on without %s: %s", number, name, shortened(why, 500))
    return sum(sent.values())


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
    office.post.roll.board.reached(number)
    scored = "" if line.validation is None else f"; round {line.round} scored {line.validation.mean_accuracy():.4f}"
    log.info("round %d of %d: %d replies%s", number, office.setup.options.rounds, len(tray.admitted), scored)
