"""What a run leaves behind: typed records, written as one folder of plain files that cannot execute code.

A run folder holds::

    config.toml          everything that was asked for, resolved
    run.json             RunRecord without its rounds: versions, data hash, clients, status
    partition.json       who got which item (`fedmerge.data.Partition`); absent for a user's own files
    partition.svg        its picture
    serving.json         what later clients need: scaling of the inputs, network, training (`fedmerge onboard`)
    rounds.jsonl         one RoundRecord per line, flushed after every round
    models.safetensors   the server's state at the selected round, whose scores are reported
    last.safetensors     the same after the last round

Merging weights and whatever else tells of single clients stand in files that only their owner may read (mode 0600):
run.json, rounds.jsonl, both .safetensors, the partition and its picture, and report.html.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from fedmerge.core.errors import FedmergeError, together
from fedmerge.core.files import append_text, write_atomically
from fedmerge.core.options import build_options
from fedmerge.core.strict_json import MOST_FILE_BYTES, parse_json_table, read_bounded
from fedmerge.core.text import shortened
from fedmerge.experiment.choice import Choice
from fedmerge.experiment.record_checks import faults_of_round, faults_of_run

T = TypeVar("T")
Status = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Scores:
    """How the model that each client would use does on one split of its own data.

    Attributes:
        accuracy: [N], share of right answers, 0..1; NaN is written as null for a client without items in the split.
        loss: [N], mean cross-entropy in nats.
    """

    accuracy: tuple[float | None, ...]
    loss: tuple[float | None, ...]

    def mean_accuracy(self) -> float:
        """Mean over the clients that have items in this split."""
        known = [value for value in self.accuracy if value is not None]
        return math.fsum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class RoundRecord:
    """One round of one run; round 0 is the state before any training.

    Attributes:
        round: Number of rounds completed.
        cohort: Client indices that took part, ascending.
        seconds: Wall time of the round without evaluation.
        bytes_down: Bytes sent to the whole cohort.
        bytes_up: Bytes received from the whole cohort.
        forward: Training examples passed forward, all clients together.
        backward: Training examples passed backward.
        state: What the method says of its state, for example ``{"num_models": 5}``.
        mixing: [N][d] merging weights of every client at evaluated rounds; None for methods without them.
        validation: Scores at evaluated rounds, else None.
        test: Scores at evaluated rounds, else None.
        dropped: Clients of the cohort that never answered.
        refused: Replies that were not believed: ``client`` (None if that could not be read) and ``reason``, one of
            `fedmerge.core.replies.REASONS`.
        abandoned: Whether there were too few replies, so that nothing changed.
        virtual_seconds: What the round took on the virtual clock; None without a deadline.
    """

    round: int
    cohort: tuple[int, ...]
    seconds: float
    bytes_down: int
    bytes_up: int
    forward: int
    backward: int
    state: Mapping[str, Any]
    mixing: tuple[tuple[float, ...], ...] | None = None
    validation: Scores | None = None
    test: Scores | None = None
    dropped: tuple[int, ...] = ()
    refused: tuple[Mapping[str, Any], ...] = ()
    abandoned: bool = False
    virtual_seconds: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """A whole run.

    Attributes:
        label: How tables call it, for example ``fedmerge`` or ``fedmerge official``.
        method: Registered name.
        options: The method's own options, resolved.
        seed: Decides data split, initial model, cohorts and batches.
        status: ``finished``, or what stopped it.
        client_names: [N].
        groups: [N] true group of each client where the partition knows it.
        num_train: [N] examples; num_validation and num_test alike.
        class_names: Readable classes.
        num_params: P, length of the vector that travels.
        setting: One line about data, partition and model.
        data_sha256: Of the items and their split; equal for runs that may be compared.
        versions: Of fedmerge, python, torch, numpy and the machine's description.
        finetuned: Test scores after optional local fine-tuning of the selected round's models.
        finetuned_validation: The same on validation.
        seconds: Wall time of the whole run.
        rounds: In order; the last may be an unevaluated one if the run was interrupted.
        class_counts: [N][K] train examples of each class; None in runs written before this was kept.
        tasks: [N] name of each client's task or domain; None where there is nothing to tell apart.
        samples: What the clients' language models make of a few test prompts: client, task, prompt, completion, wanted;
            None for other networks.
        select: Which round is reported: the best on validation, or the last.
        engine: What ran the clients, and why; None in runs written before this was kept.
    """

    label: str
    method: str
    options: Mapping[str, Any]
    seed: int
    status: Status
    client_names: tuple[str, ...]
    groups: tuple[int, ...] | None
    num_train: tuple[int, ...]
    num_validation: tuple[int, ...]
    num_test: tuple[int, ...]
    class_names: tuple[str, ...]
    num_params: int
    setting: str
    data_sha256: str
    versions: Mapping[str, Any]
    seconds: float = 0.0
    finetuned: Scores | None = None
    finetuned_validation: Scores | None = None
    rounds: tuple[RoundRecord, ...] = ()
    class_counts: tuple[tuple[int, ...], ...] | None = None
    tasks: tuple[str, ...] | None = None
    samples: tuple[Mapping[str, str], ...] | None = None
    select: Literal["validation", "last"] = "validation"
    engine: Choice | None = None

    def evaluated(self) -> tuple[RoundRecord, ...]:
        """The rounds that carry scores."""
        return tuple(record for record in self.rounds if record.test is not None)

    def last(self) -> RoundRecord:
        """The last evaluated round.

        Raises:
            FedmergeError: if the run was stopped before its first evaluation.
        """
        evaluated = self.evaluated()
        if not evaluated:
            raise FedmergeError(f"run {self.label!r} (seed {self.seed}) has no evaluated round yet")
        return evaluated[-1]

    def selected(self) -> RoundRecord:
        """The evaluated round with the best mean validation accuracy, the earliest of equals; test is not looked at.

        Without any validation items, or where the run asks for it, this is the last evaluated round.
        """
        last = self.last()
        return last if self.select == "last" else select(self.evaluated())


def select(evaluated: Sequence[RoundRecord]) -> RoundRecord:
    """The record with the best mean validation accuracy, the earliest of equals; the last one if none has any.

    Two records are compared on the clients that were scored in both: a round is not better because a client that does
    badly was away.

    Args:
        evaluated: In order, at least one. Selecting pair by pair as rounds come in gives the same record.
    """
    best = evaluated[0]
    for record in evaluated[1:]:
        known = best.validation is not None and not math.isnan(best.validation.mean_accuracy())
        if not known or _gain(best, record) > 0:
            best = record
    return best


def _gain(best: RoundRecord, record: RoundRecord) -> float:
    """By how much the mean validation accuracy of a record is above that of the best one, over common clients.

    A later record without any in common is taken for better: nothing speaks for the earlier one.
    """
    if best.validation is None or record.validation is None:
        return 0.0
    pairs = list(zip(best.validation.accuracy, record.validation.accuracy, strict=True))
    common = [(old, new) for old, new in pairs if old is not None and new is not None]
    if not common and any(new is not None for _, new in pairs):
        return math.inf
    return math.fsum(new for _, new in common) - math.fsum(old for old, _ in common)


def to_plain(value: Any) -> Any:
    """Dataclasses, arrays and tuples as what JSON knows; non-finite numbers become null.

    >>> to_plain(Scores((1.0, float("nan")), (0.5, None)))
    {'accuracy': [1.0, None], 'loss': [0.5, None]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_run(folder: Path, run: RunRecord) -> None:
    """Writes ``run.json`` (without rounds), which only its owner may read: it tells of every client."""
    plain = to_plain(dataclasses.replace(run, rounds=()))
    del plain["rounds"]
    if run.evaluated():
        plain["selected_round"] = run.selected().round  # for other readers; `selected` finds it in the rounds
    write_atomically(folder / "run.json", json.dumps(plain, indent=1) + "\n", private=True)


def append_rounds(folder: Path, records: Sequence[RoundRecord]) -> bytes:
    """Appends lines to ``rounds.jsonl``, on the disk when this returns. Gives back what was written."""
    text = "".join(json.dumps(to_plain(record)) + "\n" for record in records)
    return append_text(folder / "rounds.jsonl", text, private=True, durable=True)


def _record_of(
    cls: type[T], plain: dict[str, Any], where: str, scores: tuple[str, ...], check: Callable[[T], list[str]]
) -> T:
    """A record from plain values.

    Raises:
        FedmergeError: naming `where` and every value that does not fit.
    """
    faults: list[str] = []
    values = dict(plain)
    for name in scores:
        if isinstance(values.get(name), dict):
            values[name] = build_options(Scores, values[name], f"{where}: {name}", faults)
    record = None if faults else build_options(cls, values, where, faults)
    if record is not None:
        faults += [f"{where}: {fault}" for fault in check(record)]
    if record is None or faults:
        raise FedmergeError(together(faults))
    return record


def _read_rounds(path: Path, num_clients: int) -> tuple[RoundRecord, ...]:
    """All whole lines; a torn last line (the run was killed while writing it) is left out."""
    if not path.exists():
        return ()
    with path.open("rb") as file:
        return tuple(rounds_from(iter(lambda: file.readline(MOST_FILE_BYTES), b""), num_clients, path))


def rounds_from(lines: Iterable[bytes], num_clients: int, path: Path | str) -> Iterator[RoundRecord]:
    """The rounds that the lines of ``rounds.jsonl`` hold, without a torn last one.

    Args:
        lines: With their line breaks.
        num_clients: Of the run, N.
        path: What messages call the file.

    Raises:
        FedmergeError: naming the line that is damaged.
    """
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if line == b"\n":
            continue
        try:
            plain = parse_json_table(line)
        except ValueError as error:
            if not line.endswith(b"\n") and len(line) < MOST_FILE_BYTES:
                return
            raise _damaged(where, error) from error
        yield _record_of(
            RoundRecord, plain, where, ("validation", "test"), lambda record: faults_of_round(record, num_clients)
        )


def _damaged(where: str, error: Exception) -> FedmergeError:
    return FedmergeError(f"{where} is damaged: {shortened(str(error))}; the run cannot be used, make it again")


def read_run(folder: Path | str) -> RunRecord:
    """Reads a run folder.

    Raises:
        FedmergeError: if the folder is not a run or a file in it is damaged; names the file.
    """
    folder = Path(folder)
    record = read_run_alone(folder)
    return dataclasses.replace(record, rounds=_read_rounds(folder / "rounds.jsonl", len(record.client_names)))


def read_run_alone(folder: Path) -> RunRecord:
    """The same without its rounds."""
    path = folder / "run.json"
    if not path.is_file():
        raise FedmergeError(f"{folder} is not a run: it has no run.json; give a folder that `fedmerge run` wrote")
    try:
        content = read_bounded(path)
    except ValueError as error:
        raise _damaged(str(path), error) from error
    return run_from(content, path)


def run_from(content: bytes, path: Path | str) -> RunRecord:
    """The run, without its rounds, that the content of ``run.json`` describes.

    Args:
        content: Of the file.
        path: What messages call it.

    Raises:
        FedmergeError: naming every value that does not fit.
    """
    try:
        plain = parse_json_table(content)
    except ValueError as error:
        raise _damaged(str(path), error) from error
    plain.pop("selected_round", None)
    scores = ("finetuned", "finetuned_validation")
    return _record_of(RunRecord, {**plain, "rounds": ()}, str(path), scores, faults_of_run)
