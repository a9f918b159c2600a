"""The round loop: one method on one federation, from the first draw to the last record."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.core.defences import guarded
from fedmerge.core.ensemble import Personal
from fedmerge.core.errors import DivergedError, UsageError
from fedmerge.core.keeping import keeping, travelling
from fedmerge.core.memory import keep_freed
from fedmerge.core.protocol import Algorithm, Batches, Federation
from fedmerge.core.randomness import fresh_module_randomness
from fedmerge.core.replies import Refusal, reasons_text
from fedmerge.core.spaces import in_space
from fedmerge.core.text import printable
from fedmerge.core.vector import Layout, layout_of
from fedmerge.data import FederatedData
from fedmerge.experiment.attacks import attackers, tampered
from fedmerge.experiment.choice import Choice, objective_of
from fedmerge.experiment.config import RunOptions
from fedmerge.experiment.fastest import Workload, fastest_engine
from fedmerge.experiment.federation import (
    channels_last,
    drawer,
    federation_facts,
    in_precision,
    make_module,
)
from fedmerge.experiment.participation import Presence, Turnout, presence_of, turnout
from fedmerge.experiment.privacy_check import privacy_of
from fedmerge.experiment.record import RoundRecord, Scores
from fedmerge.experiment.spread import spread
from fedmerge.experiment.trial import check_module, runtime_for
from fedmerge.privacy import PrivacyForecast
from fedmerge.runtime import (
    Engine,
    Fleet,
    Meeting,
    finetuned,
    first_fleet,
    personal_models,
    run_round,
    score,
)
from fedmerge.runtime.place import Place, device_of
from fedmerge.training import LocalTraining, Planned, Tally, one_pass, rate_of_round

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """All that stays the same during a run.

    Attributes:
        algorithm: The method.
        played: The method as it is played: on what clients do not keep.
        data: The clients, in the run's precision.
        module: The network, with the weights of draw 0.
        layout: Of the module.
        engine: Runs the clients.
        choice: Why it is this engine.
        training: What a client does in a round.
        options: Rounds, seed and the like.
        facts: What the method is told.
        passes: [N] training examples that each client passes in a round; empty without a deadline, which needs them.
        presence: When clients can be asked, if a trace says so.
        attackers: Clients that lie.
        privacy: What the run claims, if it is a private one.
    """

    algorithm: Algorithm[Any]
    played: Algorithm[Any]
    data: FederatedData
    module: nn.Module
    layout: Layout
    engine: Engine
    choice: Choice
    training: LocalTraining
    options: RunOptions
    facts: Federation
    passes: tuple[int, ...] = ()
    presence: Presence | None = None
    attackers: tuple[int, ...] = ()
    privacy: PrivacyForecast | None = None


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        state: The server's.
        fleet: The clients'.
        round: Completed rounds.
    """

    state: Any
    fleet: Fleet
    round: int


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on one thread: faster for small networks, and the same bits on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(
    algorithm: Algorithm[Any],
    data: FederatedData,
    model: Any,
    training: LocalTraining,
    options: RunOptions,
    *,
    choice: Choice | None = None,
) -> tuple[Setup, Progress]:
    """Network, layout, engine and the state before the first round.

    Args:
        algorithm: The method.
        data: The clients.
        model: A recipe, a module, or a function that makes one.
        training: What a client does in a round.
        options: Rounds, seed and the like.
        choice: The engine that the run took when it began, for one that goes on.
    """
    keep_freed()
    dtype = options.dtype
    module = make_module(model, data, options.seed, dtype=dtype)
    layout = layout_of(module, head=options.head, frozen=options.frozen)
    data = channels_last(in_precision(data, dtype))
    check_module(module, data, training)
    splits = ((client.train, client.validation, client.test) for client in data.clients)
    remember(module, torch.cat([examples.inputs for three in splits for examples in three]))
    engine, choice = _engine_of(module, layout, data, training, options, choice)
    engine = spread(engine, choice, module, layout, training.descent(), data, options)
    facts = federation_facts(data, layout)
    draw = drawer(model, data, options.seed, layout, dtype)
    played = played_method(algorithm, layout, options)
    privacy = privacy_of(algorithm, played, travelling(layout, options.keep), options, len(data.clients))
    state = played.init(draw, facts, options.seed)
    N = len(data.clients)
    fleet = first_fleet(played, draw(0), N, layout.num_trainable, options.buffers)
    setup = Setup(
        algorithm,
        played,
        data,
        module,
        layout,
        engine,
        choice,
        training,
        options,
        facts,
        passes=_passes(training, data) if options.participation.deadline is not None else (),
        presence=presence_of(options.participation, [client.name for client in data.clients]),
        attackers=attackers(options.attack, N, options.seed),
        privacy=privacy,
    )
    return setup, Progress(state, fleet, 0)


def played_method(algorithm: Algorithm[Any], layout: Layout, options: RunOptions) -> Algorithm[Any]:
    """The method as it is played: on what clients do not keep, in the space that adapters are averaged in, guarded.

    Args:
        algorithm: The method.
        layout: Of the network.
        options: Of the run.
    """
    spaced = in_space(algorithm, travelling(layout, options.keep), options.merging)
    return keeping(guarded(spaced, options.defences), layout, options.keep)


def _engine_of(
    module: nn.Module,
    layout: Layout,
    data: FederatedData,
    training: LocalTraining,
    options: RunOptions,
    choice: Choice | None,
) -> tuple[Engine, Choice]:
    """The engine that was chosen before, or is chosen now."""
    descent, place = training.descent(), Place(device_of(options.device), options.precision)
    if choice is not None:
        return choice.engine(module, layout, descent, objective_of(data), place), choice
    runtime = runtime_for(training, options.runtime, module, layout)
    work = Workload(training, options.rounds, options.fraction)
    with one_thread():
        return fastest_engine(runtime, module, layout, descent, data, work, options.fold, place, options.kernels)


def _passes(training: LocalTraining, data: FederatedData) -> tuple[int, ...]:
    """Training examples that each client passes in a round; counting them takes a draw where steps are given."""
    return tuple(training.passes(client.num_train) for client in data.clients)


def remember(module: nn.Module, inputs: Tensor) -> None:
    """Lets a network with a frozen lower part compute that part's outputs for these inputs once, in their order."""
    learn = getattr(module, "remember", None)
    if callable(learn):
        learn(inputs)


def attendance(setup: Setup, round_number: int) -> Turnout:
    """Who is asked in a round and who answers; the same for every method."""
    options = setup.options
    return turnout(
        options.participation,
        fraction=options.fraction,
        seed=options.seed,
        round_number=round_number,
        num_examples=[client.num_train for client in setup.data.clients],
        passes=setup.passes,
        presence=setup.presence,
    )


def advance(setup: Setup, progress: Progress) -> tuple[Progress, RoundRecord]:
    """One round; the record carries no scores yet."""
    number, options, clients = progress.round + 1, setup.options, setup.data.clients
    began = time.perf_counter()
    turned_out = attendance(setup, number)
    training = turned_out.training
    rate = rate_of_round(setup.training, number, options.rounds)
    batches = [Planned(clients[i].train, setup.training, rate, options.seed, number, i) for i in training]
    num_examples = torch.tensor([clients[i].num_train for i in training], dtype=torch.int64)
    cost = setup.played.cost(progress.state)
    with fresh_module_randomness(options.seed, "dropout", number):
        meeting = _meeting(setup, turned_out, number)
        result = run_round(setup.played, progress.state, progress.fleet, meeting, batches, num_examples, setup.engine)
    passed = sum(sum(steps.sizes()) for steps in batches)
    record = RoundRecord(
        round=number,
        cohort=turned_out.cohort,
        seconds=time.perf_counter() - began,
        bytes_down=result.bytes_down,
        bytes_up=result.bytes_up,
        forward=round(passed * (1 + cost.extra_forward)),
        backward=round(passed * (1 + cost.extra_backward)),
        state=described(setup.played, result.state),
        dropped=tuple(sorted(turned_out.dropped)),
        refused=_refused(turned_out, result.refusals),
        abandoned=result.abandoned,
        virtual_seconds=turned_out.seconds,
    )
    _tell(setup, record, result.refusals)
    return Progress(result.state, result.fleet, number), record


def _refused(turned_out: Turnout, refusals: Sequence[Refusal]) -> tuple[dict[str, Any], ...]:
    """Replies that do not count, for the record; those after the deadline need not be computed for that."""
    late: list[tuple[int | None, str]] = [(client, "late") for client in sorted(turned_out.late)]
    found = [*late, *((refusal.client, refusal.reason) for refusal in refusals)]
    return tuple({"client": client, "reason": reason} for client, reason in found)


def _meeting(setup: Setup, turned_out: Turnout, number: int) -> Meeting:
    options = setup.options
    transit = None
    if setup.attackers:
        transit = partial(
            tampered, options.attack, attackers=setup.attackers, seed=options.seed, believed=options.defences
        )
    return Meeting(
        cohort=torch.tensor(turned_out.cohort, dtype=torch.int64),
        trained=torch.tensor(turned_out.training, dtype=torch.int64),
        quorum=turned_out.quorum,
        run=str(options.seed),
        number=number,
        transit=transit,
    )


_NAMED = 5
"""Clients that a message names."""


def _tell(setup: Setup, record: RoundRecord, refusals: Sequence[Refusal]) -> None:
    """Says aloud what was refused and that a round was abandoned."""
    if refusals:
        names = [
            "?" if refusal.client is None else printable(setup.data.clients[refusal.client].name)
            for refusal in refusals[:_NAMED]
        ]
        more = " ..." if len(refusals) > _NAMED else ""
        log.warning(
            "round %d: replies refused (%s) of %s%s; for example %s",
            record.round,
            reasons_text(refusals),
            ", ".join(names),
            more,
            refusals[0].detail,
        )
    if record.abandoned:
        log.warning(
            "round %d abandoned: %d of %d clients replied, %s needed; the models stay as they were",
            record.round,
            len(record.cohort) - len(record.dropped) - len(record.refused),
            len(record.cohort),
            f"{100 * setup.options.participation.quorum:g} %",
        )


def described(algorithm: Algorithm[Any], state: Any) -> dict[str, Any]:
    """What the record of a round says of the server's state."""
    return {**algorithm.describe(state), "server_floats": algorithm.cost(state).server_floats}


def models_now(setup: Setup, progress: Progress) -> list[Personal]:
    """The model that every client would use now."""
    training = setup.training
    passes = [one_pass(client.train, training.batch_size, training.lr) for client in setup.data.clients]
    return personal_models(setup.played, progress.state, progress.fleet, passes, setup.engine)


def first_record(setup: Setup, progress: Progress) -> RoundRecord:
    """Round 0: nothing trained, nothing sent."""
    return RoundRecord(
        round=0,
        cohort=(),
        seconds=0.0,
        bytes_down=0,
        bytes_up=0,
        forward=0,
        backward=0,
        state=described(setup.played, progress.state),
    )


def evaluate(setup: Setup, progress: Progress, record: RoundRecord) -> RoundRecord:
    """The record with every client's scores on its own validation and test examples."""
    models = models_now(setup, progress)
    if setup.options.finetune_epochs:
        _vector(models[0])  # a run that cannot end is refused before its first round
    weights = setup.played.mixing(progress.state)
    return replace(
        record,
        validation=scores_of(setup, models, "validation"),
        test=scores_of(setup, models, "test"),
        mixing=None if weights is None else tuple(tuple(round(a, 6) for a in row) for row in weights.tolist()),
    )


def scores_of(setup: Setup, models: Sequence[Personal], split: str) -> Scores:
    """Accuracy and loss of each client's model on its own `split`.

    Raises:
        DivergedError: naming the clients whose loss is not finite.
    """
    batches: list[Batches] = [one_pass(getattr(client, split)) for client in setup.data.clients]
    tallies = score(models, batches, setup.engine)
    lost = [client.name for client, t in zip(setup.data.clients, tallies, strict=True) if not t.loss.isfinite()]
    if lost:
        raise DivergedError(
            f"clients {', '.join(lost)}: the loss on their {split} examples is NaN or infinite: their training "
            "diverged; lower the learning rate (training.lr) or check their data"
        )
    return Scores(tuple(_ratio(t, t.right) for t in tallies), tuple(_ratio(t, t.loss) for t in tallies))


def _ratio(tallied: Tally, total: Tensor) -> float | None:
    return float(total / tallied.count) if tallied.count > 0 else None


def finetune(setup: Setup, progress: Progress) -> tuple[Scores, Scores]:
    """Validation and test scores after local fine-tuning of every client's model at the run's first learning rate.

    A schedule may have taken the rate to zero by the end of the run; fine-tuning at that rate would do nothing.
    """
    options = setup.options
    training = replace(setup.training, epochs=options.finetune_epochs, steps=None)
    batches = [
        Planned(c.train, training, setup.training.lr, options.seed, options.rounds + 1, i)
        for i, c in enumerate(setup.data.clients)
    ]
    with fresh_module_randomness(options.seed, "dropout", options.rounds + 1):
        models = finetuned([_vector(model) for model in models_now(setup, progress)], batches, setup.engine)
    return scores_of(setup, models, "validation"), scores_of(setup, models, "test")


def _vector(model: Personal) -> Tensor:
    if isinstance(model, Tensor):
        return model
    raise UsageError(
        "finetune_epochs: this method's clients use several networks at once, which local fine-tuning does not cover; "
        "leave it out"
    )


def rounds(setup: Setup, progress: Progress, *, begun: bool = False) -> Iterator[tuple[Progress, RoundRecord]]:
    """Round 0, unless the run has begun already, and then every round that is left, with scores where they are due."""
    if not begun:
        yield progress, evaluate(setup, progress, first_record(setup, progress))
    while progress.round < setup.options.rounds:
        progress, record = advance(setup, progress)
        due = is_evaluated(setup.options, progress.round)
        yield progress, evaluate(setup, progress, record) if due else record


def is_evaluated(options: RunOptions, round_number: int) -> bool:
    """Whether the clients' models are scored after a round; round 0 is before the first."""
    return round_number % options.evaluate_every == 0 or round_number == options.rounds
